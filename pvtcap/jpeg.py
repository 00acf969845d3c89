"""JPEGs by libjpeg-turbo alone: the usual ones, which need none of Pillow's knowledge.

    size = plain_size(raw)                           # None: Pillow is to look at it
    photo = decoded(raw, size)                       # None: it is not faultless, and Pillow's to judge

Pillow takes 30 µs to open a JPEG, and where decoding has driven it out of the processor's caches twice that: a tenth of
what a small photo takes in all.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

_START, _SCAN = b"\xff\xd8\xff", 0xDA
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; all coded after Huffman
# Quantization and Huffman tables, restarts, comments, Adobe's "Ducky": nothing that a photo's size, colours or way up
# depend on.
_HARMLESS = (0xDB, 0xC4, 0xDD, 0xFE, 0xEC)
_EXIF_OR_XMP, _PHOTOSHOP = 0xE1, 0xED
# What Pillow reads of JFIF, of a colour profile and of Adobe's note on colours is there; less may be an error to it.
_LEAST_BYTES = {0xE0: 14, 0xE2: 16, 0xEE: 12}
# A JPEG's decoder can halve its sides for little; with at least this many pixels for one of the result, resizing hides
# it.
_SPARE = 1.5


def plain_size(raw: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG whose head holds nothing out of the ordinary (ISO/IEC 10918-1, annex B): grey or three
    colours of 8 bits, no EXIF or XMP, by which it could be turned, and not above Pillow's limit on pixels.
    """
    size, at, end = None, 2, len(raw) - 10
    if raw[:3] != _START:
        return None
    while at < end and raw[at] == 0xFF:
        marker, length = raw[at + 1], raw[at + 2] << 8 | raw[at + 3]
        if marker == _SCAN:
            return size
        if marker in _FRAMES:
            height, width = raw[at + 5] << 8 | raw[at + 6], raw[at + 7] << 8 | raw[at + 8]
            few = 0 < width * height <= (Image.MAX_IMAGE_PIXELS or width * height)
            if size is not None or raw[at + 4] != 8 or raw[at + 9] not in (1, 3) or not few:
                return None
            size = width, height
        elif marker not in _HARMLESS and not _is_plain(marker, raw, at + 4, at + 2 + length):
            return None
        at += 2 + length
    return None


def _is_plain(marker: int, raw: bytes, start: int, end: int) -> bool:
    """Whether Pillow finds in ``raw[start:end]`` neither a fault nor how the photo lies."""
    if marker == _EXIF_OR_XMP:
        return not raw.startswith((b"Exif", b"http"), start)  # COCO's photos have had their XMP's name struck out
    if marker == _PHOTOSHOP:
        return raw[end - 6 : end - 2] != b"8BIM"  # Pillow would look for a length behind its end
    return marker in _LEAST_BYTES and end - start >= _LEAST_BYTES[marker]


def decoded(
    raw: bytes, size: tuple[int, int], least_px: int | None = None, share: float = 1.0, into: Pixels | None = None
) -> Pixels | None:
    """(H, W, 3) uint8 of a faultless JPEG of ``size`` (width, height) pixels, as it lies; None for any other.

    A large one comes at a half, a quarter or an eighth of its size where that leaves ``share`` of each side with pixels
    to spare for ``least_px``. It lies in the memory of ``into`` if there is room for it, and else in memory of its own.
    """
    divisor = 1
    if least_px is not None:
        smallest = min(size) * share
        divisor = next((by for by in (8, 4, 2) if smallest >= _SPARE * least_px * by), 1)
    width, height = (-(-side // divisor) for side in size)
    if into is not None and 3 * width * height > into.nbytes:
        into = None
    try:
        # These minima and no others choose 1 / divisor. Strict: a warning is an error, as of a photo cut short.
        photo: Pixels = simplejpeg.decode_jpeg(
            raw, "RGB", min_height=height, min_width=width, min_factor=divisor, buffer=into, strict=True
        )
    except ValueError:
        return None
    return photo
