"""Encoded photos to square uint8 tensors: decode, crop, resize, mirror. Nothing here is random by itself."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pvtcap.errors import ShardError
from pvtcap.photo import BadPhoto, pillow_errors, upright_rgb

BLANK_LEVEL = 127  # grey: near the mean of photos, so a blanked photo is a quiet input and not an odd one


class UnreadablePhoto(ShardError):
    """A photo whose bytes cannot be decoded: training counts it and goes on, up to a share."""


def decode(encoded: bytes, where: object) -> Tensor:
    """Encoded photo → (3, H, W) uint8 RGB, upright. Raises UnreadablePhoto, naming ``where``."""
    try:
        with pillow_errors(), Image.open(io.BytesIO(encoded)) as image:
            # The copy is needed: torch wants memory it may write to.
            pixels = torch.from_numpy(np.array(upright_rgb(image)))
    except BadPhoto as error:
        reason = error.reason if error.reason == "not a photo" else f"not a readable photo ({error.detail})"
        raise UnreadablePhoto(reason, where=where, do="Leave it out, or give a JPEG, PNG or WebP file.") from None
    return pixels.permute(2, 0, 1)


def square(photo: Tensor, side_px: int) -> Tensor:
    """(3, H, W) uint8 → (3, side, side) uint8, antialiased bicubic; the aspect is given up, as BLIP does."""
    return functional.interpolate(photo[None], [side_px, side_px], mode="bicubic", antialias=True)[0]


def augmented(
    photo: Tensor, side_px: int, min_area: float, flip_probability: float, draw: np.random.Generator
) -> Tensor:
    """A random crop of at least ``min_area`` of the photo with its aspect, made square, perhaps mirrored."""
    area, top, left, flip = draw.random(4)
    _, height, width = photo.shape
    scale = float(np.sqrt(min_area + (1 - min_area) * area))
    crop_height, crop_width = max(1, round(height * scale)), max(1, round(width * scale))
    y, x = round(top * (height - crop_height)), round(left * (width - crop_width))
    cropped = square(photo[:, y : y + crop_height, x : x + crop_width], side_px)
    return cropped.flip(2) if flip < flip_probability else cropped


def blank(side_px: int) -> Tensor:
    """A grey (3, side, side) uint8 picture."""
    return torch.full((3, side_px, side_px), BLANK_LEVEL, dtype=torch.uint8)
