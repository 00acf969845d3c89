"""Encoded photos to square uint8 tensors: decode, crop, mirror, resize. Nothing here is random by itself.

    augmented(bytes, where, 384, 0.5, 0.5, draw) ─▶ (3, 384, 384)     for training
    whole(bytes, where, 384)                     ─▶ (3, 384, 384)     for everything else
    stacked([…])                                 ─▶ (B, 3, 384, 384); or a part of room(B, 384) as each one's ``out``

All of it lies in memory as decoders write it, the three bytes of a pixel together (torch's channels_last): torch's
resizing is twice as quick on that, and turning it round would cost as much again. The pixels depend on the bytes and
the draw, not on the number of threads or the instructions that a processor has.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pvtcap.errors import ShardError
from pvtcap.jpeg import Pixels
from pvtcap.photo import BadPhoto, upright_pixels

BLANK_LEVEL = 127  # grey: near the mean of photos, so a blanked photo is a quiet input and not an odd one
# When it has been decoded, a photo of which half the area is to fill 384 px is at most 1,629 px on its short side: this
# is for those, and twice as long.
_DESK_BYTES = 16 << 20


class UndecodablePhoto(ShardError):
    """The bytes of the photo at ``where`` are no whole photo: ``reason`` is two or three words that can be counted."""

    def __init__(self, reason: str, detail: str, where: object) -> None:
        what = reason if reason == "not a photo" else f"not a readable photo ({detail})"
        super().__init__(what, where=where, do="Leave it out, or give a JPEG, PNG or WebP file.")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[object, ...]:
        return UndecodablePhoto, (self.reason, self.detail, self.where)


class CropDraw(NamedTuple):
    """Four numbers in [0, 1): the crop's area from the least to all, where its corner is, whether it is mirrored."""

    area: float
    top: float
    left: float
    flip: float

    @classmethod
    def of(cls, generator: np.random.Generator) -> CropDraw:
        """The generator's next four."""
        return cls(*generator.random(4).tolist())


def decode(encoded: bytes, where: object) -> Tensor:
    """Encoded photo → (3, H, W) uint8 RGB, upright, at full size. Raises UndecodablePhoto."""
    return torch.from_numpy(_decoded(encoded, where)).permute(2, 0, 1)


def whole(encoded: bytes, where: object, side_px: int, out: Tensor | None = None) -> Tensor:
    """Encoded photo → (3, side, side) uint8, uncropped; written to ``out`` where that is given. Raises
    UndecodablePhoto.
    """
    return _square(_decoded(encoded, where, side_px, into=_desk.memory), side_px, out)


def augmented(
    encoded: bytes,
    where: object,
    side_px: int,
    min_area: float,
    flip_probability: float,
    draw: CropDraw,
    out: Tensor | None = None,
) -> Tensor:
    """Encoded photo → (3, side, side) uint8: a random crop of at least ``min_area`` of it with its aspect, made square,
    perhaps mirrored; written to ``out`` where that is given. Raises UndecodablePhoto.
    """
    area, top, left, flip = draw
    share = math.sqrt(min_area + (1 - min_area) * area)
    photo = _decoded(encoded, where, side_px, share, into=_desk.memory)
    height, width = photo.shape[:2]
    crop_height, crop_width = max(1, round(height * share)), max(1, round(width * share))
    y, x = round(top * (height - crop_height)), round(left * (width - crop_width))
    return _square(photo[y : y + crop_height, x : x + crop_width], side_px, out, mirrored=flip < flip_probability)


def square(photo: Pixels, side_px: int) -> Tensor:
    """uint8 RGB (H, W, 3) → (3, side, side): ``whole`` for pixels that somebody else decoded."""
    return _square(photo, side_px)


def resized(photo: Pixels, width: int, height: int) -> Pixels:
    """uint8 RGB (H, W, 3) → (height, width, 3): antialiased bicubic."""
    scaled = functional.interpolate(_standing(_without_gaps(photo)), [height, width], mode="bicubic", antialias=True)
    lying: Pixels = scaled[0].permute(1, 2, 0).numpy()
    return lying


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
    # Mirroring the crop costs less than mirroring the result: it is the copy that is made anyway.
    standing = _standing(torch.from_numpy(photo).flip(1) if mirrored else _without_gaps(photo))
    if out is None:
        return functional.interpolate(standing, [side_px, side_px], mode="bicubic", antialias=True)[0]
    # What interpolate() calls, but for its ``out``: a batch's memory is written once, and used again for the next one.
    torch.ops.aten._upsample_bicubic2d_aa.out(standing, [side_px, side_px], False, None, None, out=out[None])
    return out


def _without_gaps(photo: Pixels) -> Tensor:
    """Its rows one behind the other, or torch takes a slow way."""
    return torch.from_numpy(np.ascontiguousarray(photo))


def _standing(lying: Tensor) -> Tensor:
    """(H, W, 3) → (1, 3, H, W), channels_last; torch tells by the first dimension's stride, too."""
    return lying[None].permute(0, 3, 1, 2)


class _Desk(threading.local):
    """Where a thread decodes photos that it makes square at once, each over the last one.

    An allocator has another place for each, which the processor's caches must fetch first: 4 to 5 % of the time of
    decoding and resizing. Pages that no photo has reached take no memory.
    """

    def __init__(self) -> None:
        self.memory: Pixels = np.empty(_DESK_BYTES, np.uint8)


_desk = _Desk()


def _decoded(
    encoded: bytes, where: object, least_px: int | None = None, share: float = 1.0, into: Pixels | None = None
) -> Pixels:
    """(H, W, 3), upright; smaller than it is where ``upright_pixels`` may make it so."""
    try:
        return upright_pixels(encoded, least_px, share, into)
    except BadPhoto as error:
        raise UndecodablePhoto(error.reason, error.detail, where) from None
