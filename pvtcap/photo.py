"""A photo on its way into a shard: where it comes from, and how it becomes the JPEG that is stored.

    PhotoFile(path) | PhotoInZip(path, member) | PhotoBytes(data)   .read() ─▶ bytes ─▶ encode_photo() ─▶ EncodedPhoto

A source is cheap to make and to send to another process; only ``read`` touches the disk. Whatever is wrong with a
photo is a ``BadPhoto`` with a reason of two or three words, so that a build can count it and go on.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from PIL import Image, UnidentifiedImageError

from pvtcap.errors import ShardError

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
MAX_PHOTO_BYTES = 256 << 20  # encoded; no camera's photo is near it, and a ZIP can expand to anything

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders are known to raise for bytes that are not what they seem.
_DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
)


class BadPhoto(ShardError):
    """A photo that cannot be stored: ``reason`` is what a build counts, ``detail`` the exception's own words."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, got=detail or None)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[object, ...]:
        return BadPhoto, (self.reason, self.detail)


class PhotoSource(Protocol):
    """Anything that gives a photo's bytes; it is pickled to the worker that reads it."""

    def read(self) -> bytes:
        """The encoded photo. Raises OSError, or BadPhoto with a reason of its own."""


@dataclass(frozen=True, slots=True)
class PhotoFile:
    path: Path

    def read(self) -> bytes:
        # O_NONBLOCK: a FIFO of that name would wait for a writer.
        with open(self.path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise BadPhoto("unreadable photo", "not a plain file")
            _check_bytes(found.st_size)
            return file.read()


@dataclass(frozen=True, slots=True)
class PhotoInZip:
    """A member of a ZIP, read without unpacking."""

    path: Path
    member: str

    def read(self) -> bytes:
        try:
            archive = _open_zip(self.path)
            member = archive.getinfo(self.member)
            _check_bytes(member.file_size)
            # zipfile unpacks as much as is asked for of these two, and all that there is of the others.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BadPhoto("unreadable photo", f"neither stored nor deflated in {self.path.name}")
            with archive.open(member) as file:
                return file.read(member.file_size)
        except KeyError:
            raise FileNotFoundError(f"no {self.member} in {self.path}") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise BadPhoto("unreadable photo", str(error)) from error


@dataclass(frozen=True, slots=True)
class PhotoBytes:
    data: bytes

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True, slots=True)
class PhotoOutside:
    """A name such as ``../../etc/passwd``, which leads out of the folder of photos: never read."""

    name: str

    def read(self) -> bytes:
        raise BadPhoto("name outside the folder", self.name)


class PhotoPlace:
    """Where a dataset's photos are: a folder, or a ZIP.

    A folder is asked by relative path. A ZIP is asked by member name or, as archives differ in the folder that they
    wrap around the photos, by base name. Raises ShardError when ``path`` is neither.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: dict[str, list[str]] | None = None
        if path.is_dir():
            return
        if not path.exists():
            raise ShardError("no such folder or ZIP of photos", where=path)
        if not zipfile.is_zipfile(path):
            raise ShardError("neither a folder nor a ZIP of photos", where=path)
        self._members = {}
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                self._members.setdefault(PurePosixPath(member).name, []).append(member)

    def find(self, name: str) -> PhotoFile | PhotoInZip | PhotoOutside:
        """The source of one photo, which may turn out to be missing when it is read."""
        if self._members is None:
            inside = Path(os.path.normpath(name))
            if inside.is_absolute() or inside.parts[:1] == ("..",):
                return PhotoOutside(name)
            return PhotoFile(self.path / inside)
        members = self._members.get(PurePosixPath(name).name, [])
        if name in members or not members:
            return PhotoInZip(self.path, name)
        if len(members) > 1:
            raise ShardError(
                "several photos of one name in the ZIP",
                where=self.path,
                got=", ".join(members[:3]),
                do="Unpack it and give the folder that is meant.",
            )
        return PhotoInZip(self.path, members[0])


@dataclass(frozen=True, slots=True)
class EncodedPhoto:
    """A baseline-readable RGB JPEG, upright; ``width`` and ``height`` in pixels."""

    jpeg: bytes
    width: int
    height: int


def read_photo(source: PhotoSource) -> bytes:
    """The bytes of a photo; every failure to read it is a BadPhoto."""
    try:
        return source.read()
    except FileNotFoundError as error:
        raise BadPhoto("missing photo", str(error)) from error
    except OSError as error:
        raise BadPhoto("unreadable photo", str(error)) from error


def encode_photo(raw: bytes, short_side_px: int | None, jpeg_quality: int) -> EncodedPhoto:
    """Decode ``raw`` in full and give the JPEG to store, its short side at most ``short_side_px``.

    A JPEG that is RGB, upright and small enough is returned as it is, byte for byte. Everything else is turned
    upright (EXIF), laid over white where it is transparent, converted to RGB, scaled down (never up) and encoded;
    metadata and colour profiles are dropped then. Raises BadPhoto.
    """
    with pillow_errors(), Image.open(io.BytesIO(raw)) as image:
        width, height = image.size
        target = _scaled_down(width, height, short_side_px)
        if target != (width, height):
            # The JPEG decoder can halve sizes for next to nothing; from twice the target on, resampling hides it.
            image.draft("RGB", (2 * target[0], 2 * target[1]))
        image.load()
        orientation = image.getexif().get(_ORIENTATION, 1)
        if image.format == "JPEG" and image.mode == "RGB" and orientation not in _UPRIGHT and target == (width, height):
            return EncodedPhoto(raw, width, height)
        rgb = _to_rgb(image)
        if rgb.size != target:
            rgb = rgb.resize(target, Image.Resampling.LANCZOS)
        if orientation in _UPRIGHT:
            rgb = rgb.transpose(_UPRIGHT[orientation])
        encoded = io.BytesIO()
        rgb.save(encoded, "JPEG", quality=jpeg_quality)
        return EncodedPhoto(encoded.getvalue(), *rgb.size)


def decode_photo(raw: bytes) -> tuple[int, int]:
    """Decode every pixel of ``raw``, to see that it can be; gives (width, height). Raises BadPhoto."""
    with pillow_errors(), Image.open(io.BytesIO(raw)) as image:
        image.load()
        return image.size


def photo_size(file: IO[bytes]) -> tuple[int, int]:
    """(width, height) of a JPEG, PNG or WebP from its first bytes, without decoding it. Raises BadPhoto."""
    start = file.read(30)
    file.seek(0)
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        width, height = _webp_size(start)  # Pillow would read all of it
    else:
        with pillow_errors(), Image.open(file, formats=["JPEG", "PNG"]) as image:
            width, height = image.size
    if min(width, height) < 1:
        raise BadPhoto("damaged photo", f"{width} x {height} pixels")
    if width * height > (Image.MAX_IMAGE_PIXELS or width * height):
        raise BadPhoto("photo too large", f"{width} x {height} pixels")
    return width, height


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turned upright (EXIF), laid over white where it is transparent, converted to RGB."""
    rgb, orientation = _to_rgb(image), image.getexif().get(_ORIENTATION, 1)
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def close_zips() -> None:
    """Close the archives that ``PhotoInZip.read`` keeps open in this process."""
    _open_zip.cache_clear()


def _check_bytes(size: int) -> None:
    if size > MAX_PHOTO_BYTES:
        raise BadPhoto("photo too large (bytes)", f"{size:,}; wanted at most {MAX_PHOTO_BYTES:,}")


def _webp_size(start: bytes) -> tuple[int, int]:
    """From the first chunk of a WebP: lossy, lossless or extended (RFC 9649)."""
    kind, low = start[12:16], int.from_bytes(start[21:25], "little")
    if len(start) == 30 and kind == b"VP8 " and start[23:26] == b"\x9d\x01\x2a":
        return int.from_bytes(start[26:28], "little") & 0x3FFF, int.from_bytes(start[28:30], "little") & 0x3FFF
    if kind == b"VP8L" and start[20:21] == b"\x2f" and len(start) >= 25:
        return (low & 0x3FFF) + 1, (low >> 14 & 0x3FFF) + 1
    if len(start) == 30 and kind == b"VP8X":
        return int.from_bytes(start[24:27], "little") + 1, int.from_bytes(start[27:30], "little") + 1
    raise BadPhoto("damaged photo", "a WebP without its size")


@lru_cache(maxsize=4)
def _open_zip(path: Path) -> zipfile.ZipFile:
    # Opening an archive reads its whole directory: once a process, not once a photo.
    return zipfile.ZipFile(path)


def _scaled_down(width: int, height: int, short_side_px: int | None) -> tuple[int, int]:
    short = min(width, height)
    if short_side_px is None or short <= short_side_px:
        return width, height
    return max(1, round(width * short_side_px / short)), max(1, round(height * short_side_px / short))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow clips 16-bit greys at 255 when it converts them; scale them instead.
        image = image.convert("I").point(lambda grey: grey * (1 / 257)).convert("L")
    return image.convert("RGB")


@contextmanager
def pillow_errors() -> Iterator[None]:
    """Everything that Pillow raises for bad bytes, as BadPhoto with a reason that can be counted."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata, which we do not keep; of a decompression bomb we want to hear.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except UnidentifiedImageError:
        raise BadPhoto("not a photo", "Pillow does not know the format") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadPhoto("photo too large", str(error)) from error
    except _DECODER_ERRORS as error:
        truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise BadPhoto("truncated photo" if truncated else "damaged photo", str(error)) from error
