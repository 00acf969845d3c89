"""A photo's bytes: what is wrong with them, and the pixels that they are.

    with opened(bytes) as image:                    # the head is read, and nothing else
        image.size
        rgb_pixels(bytes, image)                    # (H, W, 3) uint8, upright

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
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from pvtcap import jpeg
from pvtcap.errors import ShardError
from pvtcap.jpeg import Pixels

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


@contextmanager
def opened(raw: bytes) -> Iterator[Image.Image]:
    """The photo by its head, and whatever goes wrong inside as BadPhoto."""
    with pillow_errors(), Image.open(io.BytesIO(raw)) as image:
        yield image


def rgb_pixels(raw: bytes, image: Image.Image, least_px: int | None = None, share: float = 1.0) -> Pixels:
    """(H, W, 3) uint8 of ``image``, which is ``opened(raw)``: upright, over white where it is transparent, writable.

    A large JPEG comes at a half, a quarter or an eighth of its size where that leaves ``share`` of each side with
    pixels to spare for ``least_px``. Within ``opened`` whatever is wrong is a BadPhoto.
    """
    # Pillow has read the head in any case: what it refuses there (its limit on pixels, too) stays refused.
    photo = _quickly(raw, image, least_px, share)
    # The copy is needed: torch wants memory it may write to.
    return np.array(upright_rgb(image)) if photo is None else photo


def upright_pixels(raw: bytes, least_px: int | None = None, share: float = 1.0, into: Pixels | None = None) -> Pixels:
    """What ``rgb_pixels`` gives, for bytes of which nothing else is wanted; it may lie in the memory of ``into``.
    Raises BadPhoto.
    """
    size = jpeg.plain_size(raw)
    photo = None if size is None else jpeg.decoded(raw, size, least_px, share, into)
    if photo is not None:
        return photo
    with opened(raw) as image:
        return rgb_pixels(raw, image, least_px, share)


def decode_photo(raw: bytes) -> tuple[int, int]:
    """Decode every pixel of ``raw``, to see that it can be; gives (width, height). Raises BadPhoto."""
    with opened(raw) as image:
        rgb_pixels(raw, image)
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
    rgb, turn = _to_rgb(image), _turn(image)
    return rgb if turn is None else rgb.transpose(turn)


def lies_sideways(image: Image.Image) -> bool:
    """Whether its width and height change places when it is turned upright; reads no pixels."""
    return image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)


def is_upright(image: Image.Image) -> bool:
    """Whether ``upright_rgb`` would leave the photo as it lies; reads no pixels."""
    return _turn(image) is None


def _turn(image: Image.Image) -> Image.Transpose | None:
    return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))


def _quickly(raw: bytes, image: Image.Image, least_px: int | None, share: float) -> Pixels | None:
    """A faultless JPEG by libjpeg-turbo alone; None for everything else, which is Pillow's to judge. An MPO, a
    telephone's, is several JPEGs of which the first counts.
    """
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    if (photo := jpeg.decoded(raw, image.size, least_px, share)) is None:
        return None
    turn = _turn(image)
    return photo if turn is None else np.array(Image.fromarray(photo).transpose(turn))


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
