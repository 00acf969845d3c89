"""A photo on its way into a shard: where it comes from, and how it becomes the JPEG that is stored.

    PhotoFile(path) | PhotoInZip(path, member) | PhotoBytes(data)   .read() ─▶ bytes ─▶ encode_photo() ─▶ EncodedPhoto

A source is cheap to make and to send to another process; only ``read`` touches the disk. Whatever is wrong with a
photo is a ``BadPhoto`` with a reason of two or three words, so that a build can count it and go on.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Protocol

from PIL import Image, UnidentifiedImageError

from pvtcap.errors import ShardError

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

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
        return self.path.read_bytes()


@dataclass(frozen=True, slots=True)
class PhotoInZip:
    """A member of a ZIP, read without unpacking."""

    path: Path
    member: str

    def read(self) -> bytes:
        try:
            return _open_zip(self.path).read(self.member)
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


@dataclass(frozen=True, slots=True)
class PhotoMissing:
    """A photo that no place has; known before it is read."""

    name: str

    def read(self) -> bytes:
        raise BadPhoto("missing photo", f"no {self.name} among the photos")


class PhotoPlace:
    """Where a dataset's photos are: a folder, or a ZIP.

    A folder is asked by relative path. A ZIP is asked by member name or, as archives differ in the folder that they
    wrap around the photos, by base name. Raises ShardError when ``path`` is neither.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: dict[str, list[str]] | None = None
        self._listed: dict[str, frozenset[str]] = {}
        if path.is_dir():
            return
        if not path.exists():
            raise ShardError("no such folder or ZIP of photos", where=path)
        if not zipfile.is_zipfile(path):
            raise ShardError("neither a folder nor a ZIP of photos", where=path)
        self._members = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for member in (name for name in archive.namelist() if not name.endswith("/")):  # "/": a folder
                    self._members.setdefault(PurePosixPath(member).name, []).append(member)
        except zipfile.BadZipFile as error:
            raise ShardError(f"damaged ZIP: {error}", where=path, do="Copy or download it again.") from None

    def find(self, name: str) -> PhotoFile | PhotoInZip | PhotoOutside:
        """The source of one photo, which may turn out to be missing when it is read."""
        if self._members is None:
            if _leads_outside(name):
                return PhotoOutside(name)
            return PhotoFile(self.path / os.path.normpath(name))
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

    def has(self, name: str) -> bool:
        """Whether a photo of this name is there. A folder is listed once, which is quicker than asking for each."""
        folder, _, base = os.path.normpath(name).rpartition("/")
        return base in (self._names(folder) if self._members is None else self._members)

    def _names(self, folder: str) -> frozenset[str]:
        if folder not in self._listed:
            try:
                self._listed[folder] = frozenset(entry.name for entry in (self.path / folder).iterdir())
            except PermissionError as error:
                raise ShardError(f"cannot read the folder: {error.strerror}", where=self.path / folder) from None
            except (OSError, ValueError):  # no such folder, or nothing that can be the name of one
                self._listed[folder] = frozenset()
        return self._listed[folder]


class PhotoPlaces:
    """Several folders and ZIPs that hold a dataset's photos together. Raises ShardError when a path is neither."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.places = [PhotoPlace(path) for path in paths]

    def find(self, *names: str) -> PhotoSource:
        """The source of one photo that may have any of these ``names``, in the first place that has it.

        A name that leads outside is never read, whether a folder or a ZIP is asked.
        """
        for name in names:
            if _leads_outside(name):
                return PhotoOutside(name)
        for place in self.places:
            for name in names:
                if place.has(name):
                    return place.find(name)
        return PhotoMissing(names[0])


@dataclass(frozen=True, slots=True)
class Encoding:
    """How photos are stored, and which are: ``short_side_px`` scales down, never up; the two limits are on the photo
    as it comes, and None and 0 are no limits. ``max_aspect_ratio`` is the long side over the short one.
    """

    short_side_px: int | None = None
    jpeg_quality: int = 90
    min_side_px: int = 0
    max_aspect_ratio: float | None = None


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
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte or half a surrogate pair
        raise BadPhoto("unreadable photo", str(error)) from error


def encode_photo(raw: bytes, encoding: Encoding) -> EncodedPhoto:
    """Decode ``raw`` in full and give the JPEG to store, its short side at most ``encoding.short_side_px``.

    A JPEG that is RGB, upright and small enough is returned as it is, byte for byte. Everything else is turned
    upright (EXIF), laid over white where it is transparent, converted to RGB, scaled down (never up) and encoded;
    metadata and colour profiles are dropped then. Raises BadPhoto.
    """
    with _pillow_errors(), Image.open(io.BytesIO(raw)) as image:
        width, height = image.size
        _check_sides(width, height, encoding)
        target = _scaled_down(width, height, encoding.short_side_px)
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
        rgb.save(encoded, "JPEG", quality=encoding.jpeg_quality)
        return EncodedPhoto(encoded.getvalue(), *rgb.size)


def decode_photo(raw: bytes) -> tuple[int, int]:
    """Decode every pixel of ``raw``, to see that it can be; gives (width, height). Raises BadPhoto."""
    with _pillow_errors(), Image.open(io.BytesIO(raw)) as image:
        image.load()
        return image.size


def close_zips() -> None:
    """Close the archives that ``PhotoInZip.read`` keeps open in this process."""
    _open_zip.cache_clear()


def _leads_outside(name: str) -> bool:
    path = os.path.normpath(name)
    return path.startswith("/") or path.split("/")[0] == ".."


@lru_cache(maxsize=4)
def _open_zip(path: Path) -> zipfile.ZipFile:
    # Opening an archive reads its whole directory: once a process, not once a photo.
    return zipfile.ZipFile(path)


def _check_sides(width: int, height: int, encoding: Encoding) -> None:
    short, long = sorted((width, height))
    if short < encoding.min_side_px:
        raise BadPhoto("photo too small", f"{width} x {height}")
    if encoding.max_aspect_ratio is not None and long > encoding.max_aspect_ratio * short:
        raise BadPhoto("photo too long", f"{width} x {height}")


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
def _pillow_errors() -> Iterator[None]:
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
