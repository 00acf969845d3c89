"""How photos are stored: the JPEG that a builder writes of whatever it was given.

bytes ─▶ encode_photo(bytes, Encoding(short_side_px=384)) ─▶ EncodedPhoto
"""

from __future__ import annotations

from dataclasses import dataclass

import simplejpeg

from pvtcap.photo import BadPhoto, is_upright, lies_sideways, opened, rgb_pixels

_LONGEST_PX = 65_500  # libjpeg's JPEG_MAX_DIMENSION


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
    upright (EXIF), laid over white where it is transparent, converted to RGB, scaled down (never up; bicubic with
    antialiasing) and encoded; metadata and colour profiles are dropped then. Raises BadPhoto.
    """
    with opened(raw) as image:
        _check_sides(*image.size, encoding)
        width, height = _scaled_down(*image.size, encoding.short_side_px)
        scaled = (width, height) != image.size
        photo = rgb_pixels(raw, image, least_px=min(width, height) if scaled else None)
        if not scaled and image.format == "JPEG" and image.mode == "RGB" and is_upright(image):
            return EncodedPhoto(raw, width, height)
        if lies_sideways(image):
            width, height = height, width
    if scaled:
        # Not above: torch takes more than a second to import, and who stores photos as they are needs none of it.
        from pvtcap.pixels import resized

        photo = resized(photo, width, height)
    if max(width, height) > _LONGEST_PX:
        raise BadPhoto("photo too long", f"{width} x {height}: a JPEG has at most {_LONGEST_PX:,} pixels a side")
    return EncodedPhoto(simplejpeg.encode_jpeg(photo, encoding.jpeg_quality, "RGB", "420"), width, height)


def modules_for(encoding: Encoding) -> tuple[str, ...]:
    """What ``encode_photo`` will import once it gets to work."""
    return (__name__,) if encoding.short_side_px is None else (__name__, "pvtcap.pixels")


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
