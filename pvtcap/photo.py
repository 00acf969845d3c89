"""A photo's bytes: what is wrong with them, and how they become the JPEG that is stored.

    bytes ─▶ encode_photo(bytes, Encoding(short_side_px=384)) ─▶ EncodedPhoto

Whatever is wrong with a photo is a ``BadPhoto`` with a reason of two or three words, so that a build can count it and
go on.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from PIL import Image, UnidentifiedImageError

from pvtcap.errors import ShardError

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


def encode_photo(raw: bytes, encoding: Encoding) -> EncodedPhoto:
    """Decode ``raw`` in full and give the JPEG to store, its short side at most ``encoding.short_side_px``.

    A JPEG that is RGB, upright and small enough is returned as it is, byte for byte. Everything else is turned
    upright (EXIF), laid over white where it is transparent, converted to RGB, scaled down (never up) and encoded;
    metadata and colour profiles are dropped then. Raises BadPhoto.
    """
    with pillow_errors(), Image.open(io.BytesIO(raw)) as image:
        width, height = image.size
        _check_sides(width, height, encoding)
        target = _scaled_down(width, height, encoding.short_side_px)
        if target != (width, height):
            # The JPEG decoder can halve sizes for next to nothing; from 1.5 times the target on, resampling hides it.
            image.draft("RGB", (round(1.5 * target[0]), round(1.5 * target[1])))
        image.load()
        orientation = image.getexif().get(_ORIENTATION, 1)
        if image.format == "JPEG" and image.mode == "RGB" and orientation not in _UPRIGHT and target == (width, height):
            return EncodedPhoto(raw, width, height)
        rgb = _to_rgb(image)
        if rgb.size != target:
            rgb = rgb.resize(target, Image.Resampling.HAMMING)  # sharper than a mean over areas, and as quick
        if orientation in _UPRIGHT:
            rgb = rgb.transpose(_UPRIGHT[orientation])
        encoded = io.BytesIO()
        rgb.save(encoded, "JPEG", quality=encoding.jpeg_quality)
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


def is_upright(image: Image.Image) -> bool:
    """Whether ``upright_rgb`` would leave the photo as it lies; reads no pixels."""
    return image.getexif().get(_ORIENTATION, 1) not in _UPRIGHT


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
