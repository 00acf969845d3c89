"""Encoded photos to square uint8 tensors: decode, crop, mirror, resize. Nothing here is random by itself.

    augmented(bytes, where, 384, 0.5, 0.5, draw) ─▶ (3, 384, 384)     for training
    whole(bytes, where, 384)                     ─▶ (3, 384, 384)     for everything else
    stacked([…])                                 ─▶ (B, 3, 384, 384); or a part of room(B, 384) as each one's ``out``

All of it lies in memory as decoders write it, the three bytes of a pixel together (torch's channels_last): torch's
resizing is twice as quick on that, and turning it round would cost as much again. The pixels depend on the bytes and
the draw, not on the number of threads or the instructions that a processor has.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pvtcap.errors import ShardError
from pvtcap.photo import BadPhoto, is_upright, pillow_errors, upright_rgb

BLANK_LEVEL = 127  # grey: near the mean of photos, so a blanked photo is a quiet input and not an odd one
# A JPEG's decoder can halve its sides for little; with at least this many pixels for one of the result, resizing hides
# it. ``encode_photo`` draws the line there, too.
_SPARE = 1.5

Pixels = NDArray[np.uint8]


class UndecodablePhoto(ShardError):
    """The bytes of the photo at ``where`` are no whole photo: ``reason`` is two or three words that can be counted."""

    def __init__(self, reason: str, detail: str, where: object) -> None:
        what = reason if reason == "not a photo" else f"not a readable photo ({detail})"
        super().__init__(what, where=where, do="Leave it out, or give a JPEG, PNG or WebP file.")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[object, ...]:
        return UndecodablePhoto, (self.reason, self.detail, self.where)


def decode(encoded: bytes, where: object) -> Tensor:
    """Encoded photo → (3, H, W) uint8 RGB, upright, at full size. Raises UndecodablePhoto."""
    return torch.from_numpy(_decoded(encoded, where)).permute(2, 0, 1)


def whole(encoded: bytes, where: object, side_px: int, out: Tensor | None = None) -> Tensor:
    """Encoded photo → (3, side, side) uint8, uncropped; written to ``out`` where that is given. Raises
    UndecodablePhoto.
    """
    return _square(_decoded(encoded, where, least_px=side_px), side_px, out)


def augmented(
    encoded: bytes,
    where: object,
    side_px: int,
    min_area: float,
    flip_probability: float,
    draw: np.random.Generator,
    out: Tensor | None = None,
) -> Tensor:
    """Encoded photo → (3, side, side) uint8: a random crop of at least ``min_area`` of it with its aspect, made square,
    perhaps mirrored; written to ``out`` where that is given. Takes four numbers from ``draw``, whatever the photo.
    Raises UndecodablePhoto.
    """
    area, top, left, flip = draw.random(4)
    share = float(np.sqrt(min_area + (1 - min_area) * area))
    photo = _decoded(encoded, where, least_px=side_px, share=share)
    height, width = photo.shape[:2]
    crop_height, crop_width = max(1, round(height * share)), max(1, round(width * share))
    y, x = round(top * (height - crop_height)), round(left * (width - crop_width))
    return _square(photo[y : y + crop_height, x : x + crop_width], side_px, out, mirrored=flip < flip_probability)


def square(photo: Pixels, side_px: int) -> Tensor:
    """uint8 RGB (H, W, 3) → (3, side, side): ``whole`` for pixels that somebody else decoded."""
    return _square(photo, side_px)


def blank(side_px: int) -> Tensor:
    """A grey (3, side, side) uint8 picture."""
    return torch.full((side_px, side_px, 3), BLANK_LEVEL, dtype=torch.uint8).permute(2, 0, 1)


def room(photos: int, side_px: int) -> Tensor:
    """Room for a batch of photos, (B, 3, side, side) uint8, channels_last: what ``out`` is a part of."""
    return torch.empty((photos, side_px, side_px, 3), dtype=torch.uint8).permute(0, 3, 1, 2)


def stacked(photos: Sequence[Tensor]) -> Tensor:
    """B photos (3, H, W) of one size → (B, 3, H, W), channels_last. torch.stack would turn each of them round."""
    batch = room(len(photos), photos[0].shape[1])
    for place, photo in zip(batch, photos, strict=True):
        place.copy_(photo)
    return batch


def _square(photo: Pixels, side_px: int, out: Tensor | None = None, mirrored: bool = False) -> Tensor:
    """(H, W, 3) → (3, side, side), antialiased bicubic; the aspect is given up, as BLIP does."""
    # Without gaps between rows, or torch takes a slow way. Mirroring the crop costs less than mirroring the result: it
    # is the copy that is made anyway.
    lying = torch.from_numpy(photo).flip(1) if mirrored else torch.from_numpy(np.ascontiguousarray(photo))
    standing = lying[None].permute(0, 3, 1, 2)
    if out is None:
        return functional.interpolate(standing, [side_px, side_px], mode="bicubic", antialias=True)[0]
    # What interpolate() calls, but for its ``out``: a batch's memory is written once, and used again for the next one.
    torch.ops.aten._upsample_bicubic2d_aa.out(standing, [side_px, side_px], False, None, None, out=out[None])
    return out


def _decoded(encoded: bytes, where: object, least_px: int | None = None, share: float = 1.0) -> Pixels:
    """(H, W, 3), upright. A large JPEG comes at a half, a quarter or an eighth of its size where that leaves ``share``
    of each side with pixels to spare for ``least_px``.
    """
    try:
        with pillow_errors(), Image.open(io.BytesIO(encoded)) as image:
            # Pillow reads the head in any case: what it refuses there (its limit on pixels, too) stays refused.
            photo = _quickly(encoded, image, least_px, share)
            # The copy is needed: torch wants memory it may write to.
            return np.array(upright_rgb(image)) if photo is None else photo
    except BadPhoto as error:
        raise UndecodablePhoto(error.reason, error.detail, where) from None


def _quickly(encoded: bytes, image: Image.Image, least_px: int | None, share: float) -> Pixels | None:
    """A plain, faultless JPEG by libjpeg-turbo alone; None for everything else, which is Pillow's to judge."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or not is_upright(image):
        return None
    divisor = 1
    if least_px is not None:
        smallest = min(image.size) * share
        divisor = next((by for by in (8, 4, 2) if smallest >= _SPARE * least_px * by), 1)
    width, height = (-(-side // divisor) for side in image.size)
    try:
        # These minima and no others choose 1 / divisor. Strict: a warning is an error, as of a photo cut short.
        photo: Pixels = simplejpeg.decode_jpeg(
            encoded, "RGB", min_height=height, min_width=width, min_factor=divisor, strict=True
        )
    except ValueError:
        return None
    return photo
