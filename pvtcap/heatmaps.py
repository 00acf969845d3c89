"""Where a captioner looks for each word of a caption: its cross-attention, drawn over the photo.

    pictures = HeatMaps(checkpoint, device, shardset, how, blank=False)(rows)      # of captions.jsonl
    pictures["1000268201"][0].word, pictures["1000268201"][0].jpeg

A word's map is that of the token before it, whose output chose the word: the softmax of its queries over the photo's
patches, averaged over layers and heads, and over the pieces of a word that has several. Attention says what was read,
not what was decisive (Jain and Wallace, "Attention is not Explanation", 2019).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pvtcap import pixels
from pvtcap.captioner import Captioner
from pvtcap.checkpoint import Checkpoint
from pvtcap.config import EvaluateConfig
from pvtcap.errors import EvaluationError
from pvtcap.htmlreport import WordPicture
from pvtcap.scoring import Photos
from pvtcap.shardset import ShardSet
from pvtcap.text import CaptionTokenizer

_GREY, _HEAT = 0.75, 0.75  # of the photo's brightness, and how much the colour covers of it at most
_PICTURE_PX, _QUALITY = 160, 80


@dataclass(frozen=True)
class WordMap:
    """A word, and how its attention is spread over the photo: float32 (rows, columns), summing to 1."""

    word: str
    attention: NDArray[np.float32]


def word_maps(model: Captioner, tokenizer: CaptionTokenizer, photo_3HW: Tensor, caption: str) -> list[WordMap]:
    """The caption's words, in order, for one uint8 photo. The model must be whole and in eval mode."""
    words = tokenizer.words(caption)
    ids = [*tokenizer.prefix, *(piece for _, pieces in words for piece in pieces)]
    with torch.inference_mode():
        patches_1PD = model.patches(photo_3HW[None])
        attention_TP = model.decoder.photo_attention(patches_1PD, torch.tensor([ids], device=patches_1PD.device))[0]
    side = math.isqrt(attention_TP.shape[1])  # photos are shown as squares, and so are their patches
    maps, chosen_by = [], len(tokenizer.prefix) - 1
    for word, pieces in words:
        mean_P = attention_TP[chosen_by : chosen_by + len(pieces)].mean(0)
        maps.append(WordMap(word, mean_P.reshape(side, side).cpu().numpy()))
        chosen_by += len(pieces)
    return maps


def heated(photo: Image.Image, attention: NDArray[np.float32]) -> Image.Image:
    """The photo in grey, red where the model looks and yellow where it looks most, also where the photo is dark."""
    span = float(np.ptp(attention)) or 1.0
    heat = Image.fromarray((attention - np.min(attention)) / span).resize(photo.size, Image.Resampling.BICUBIC)
    heat_HW1 = np.clip(np.asarray(heat), 0, 1)[..., None]
    grey_HW1 = _GREY * np.asarray(photo.convert("L"), dtype=np.float32)[..., None]
    colour_HW3 = np.concatenate([np.full_like(heat_HW1, 255), 220 * heat_HW1, np.zeros_like(heat_HW1)], axis=2)
    mixed_HW3 = grey_HW1 + _HEAT * heat_HW1 * (colour_HW3 - grey_HW1)
    return Image.fromarray(mixed_HW3.round().astype(np.uint8))


class HeatMaps:
    """Pictures for rows of captions.jsonl, by a checkpoint's model. The ShardSet has passed ``check``.

    ``blank``: the model is shown grey pictures, as it was for these captions.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, shardset: ShardSet, how: EvaluateConfig, *, blank: bool
    ) -> None:
        self.side_px, self.blank = checkpoint.config.data.image_px, blank
        self.model = checkpoint.captioner(device, [shardset]).cast(how.precision)
        self.tokenizer, self.photos, self.device = checkpoint.tokenizer(), Photos(shardset), device

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[WordPicture]]:
        """By key."""
        found, side_px = {}, self.side_px
        for row in rows:
            key = row["key"]
            shown = pixels.blank(side_px) if self.blank else pixels.whole(self.photos.encoded(key), key, side_px)
            with Image.open(io.BytesIO(self.photos.read(key))) as image:
                image.thumbnail((_PICTURE_PX, _PICTURE_PX))
                small = image.convert("RGB")
            maps = word_maps(self.model, self.tokenizer, shown.to(self.device), row["caption"])
            found[key] = [WordPicture(one.word, _jpeg(heated(small, one.attention))) for one in maps]
        return found


def check(shardset: ShardSet) -> None:
    """EvaluationError where there are no photos to draw over."""
    if shardset.manifest.features is not None:
        raise EvaluationError(
            "heat maps are drawn over photos, and here are only their features",
            where=shardset.location,
            do="Give the ShardSet of photos that the features were made of, or leave out --heat-maps.",
        )


def _jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()
