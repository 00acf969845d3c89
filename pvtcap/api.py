"""Captions from Python: ``import pvtcap`` gives ``pvtcap.Captioner``.

captioner = pvtcap.Captioner.from_checkpoint("runs/mine")             # a run, a checkpoint, or an exported folder
for caption in captioner.caption(["dog.jpg", PIL.Image.open("cat.png")], num_beams=5):
    print(caption.text, caption.score)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pvtcap import captioner as model_module
from pvtcap import jsonfile, pixels, weights
from pvtcap.checkpoint import VOCAB, Checkpoint
from pvtcap.config import Config, EvaluateConfig
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.errors import CheckpointError, ConfigError, ShardError
from pvtcap.photo import BadPhoto, upright_rgb
from pvtcap.photosource import PhotoFile, read_photo
from pvtcap.text import CaptionTokenizer
from pvtcap.weightfiles import read_tensors

Photo = str | Path | bytes | Image.Image | Tensor | np.ndarray
HUB_CONFIG, HUB_WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Caption:
    """``score`` is the mean log-probability (nats) of the caption's tokens, the end included: 0 would be certain."""

    text: str
    score: float


class Captioner:
    """A trained model, whole, in eval mode, with its vocabulary and the photo size and search it was trained with."""

    def __init__(self, model: model_module.Captioner, tokenizer: CaptionTokenizer, config: Config) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        *,
        encoder_weights: str | None = None,
        decoder: str | None = None,
    ) -> Self:
        """Open a checkpoint, a run folder (its latest checkpoint), or a folder that ``pvtcap export --to hf`` wrote.

        ``device`` None: a GPU if there is one. ``encoder_weights`` and ``decoder`` say where frozen weights lie now, if
        not where they were in the training. Raises CheckpointError.
        """
        path = Path(path)
        where = World.alone(str(device) if device is not None else None).device
        if (path / HUB_CONFIG).is_file():
            return cls._from_hub_folder(path, where)
        opened = Checkpoint.open(path)
        model = opened.captioner(where, encoder_weights=encoder_weights, decoder=decoder)
        return cls(model, opened.tokenizer(), opened.config)

    @classmethod
    def _from_hub_folder(cls, folder: Path, device: torch.device) -> Self:
        what = "not a model that pvtcap exported"
        try:
            tree = jsonfile.read(folder / HUB_CONFIG, CheckpointError, what)["pvtcap"]
        except (LookupError, TypeError):
            raise CheckpointError(what, where=folder / HUB_CONFIG, wanted="its key 'pvtcap'") from None
        config = parse(tree, where=folder / HUB_CONFIG)
        tokenizer = CaptionTokenizer.from_file(folder / VOCAB, config.text.prompt)
        with weights.Undrawn():
            model = model_module.Captioner(config, tokenizer.size)
        state = read_tensors(folder / HUB_WEIGHTS)
        weights.fill(model, state, folder / HUB_WEIGHTS, may_lack=weights.tied_names(model))
        return cls(model.to(device).eval(), tokenizer, config)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def caption(self, images: Photo | Sequence[Photo], **search: Any) -> list[Caption]:
        """A caption for each image, in order.

        An image is a path, the bytes of a file, a PIL image, or uint8 RGB pixels: a (H, W, 3) array or a (3, H, W)
        tensor. ``search`` are keys of the configuration's evaluate section (num_beams, max_length, min_length,
        repetition_penalty, micro_batch), over those of the training. Raises ShardError for what is not a photo.
        """
        photos = [images] if isinstance(images, str | Path | bytes | Image.Image | Tensor | np.ndarray) else images
        how = self.search(**search)
        captions: list[Caption] = []
        for start in range(0, len(photos), how.micro_batch):
            squares = [self.square(photo) for photo in photos[start : start + how.micro_batch]]
            captions += self.caption_squares(pixels.stacked(squares), how)
        return captions

    def search(self, **changed: Any) -> EvaluateConfig:
        """The evaluate section with some keys changed, None: unchanged; ConfigError when one is unknown or wrong."""
        given = {name: value for name, value in changed.items() if value is not None}
        evaluate = {**self.config.evaluate.model_dump(), **given}
        return parse({"evaluate": evaluate}, where="caption").evaluate

    def square(self, photo: Photo) -> Tensor:
        """uint8 (3, S, S), S the side that the model was trained with."""
        side_px = self.config.data.image_px
        if isinstance(photo, bytes):
            return pixels.whole(photo, "bytes", side_px)
        if isinstance(photo, str | Path):
            return pixels.whole(_file(Path(photo)), photo, side_px)
        return pixels.square(_pixels(photo), side_px)

    @torch.inference_mode()
    def caption_squares(self, photos_B3SS: Tensor, how: EvaluateConfig) -> list[Caption]:
        """Captions of photos that ``square`` made."""
        tokenizer, decoder = self.tokenizer, self.model.decoder
        patches = self.model.patches(photos_B3SS.to(self.device))
        rows = decoder.generate(patches, tokenizer.prefix, tokenizer.end_id, tokenizer.pad_id, how)
        logits = decoder.lm(input_ids=rows[:, :-1], encoder_hidden_states=patches, use_cache=False).logits
        chosen = rows[:, 1:]
        log_BT = torch.log_softmax(logits.float(), dim=-1).gather(2, chosen[:, :, None])[:, :, 0]
        # Tokens behind the prompt count, up to the first [SEP] and with it.
        ended = (chosen == tokenizer.end_id).cumsum(1) - (chosen == tokenizer.end_id).long()
        counted = (ended == 0).long()
        counted[:, : len(tokenizer.prefix) - 1] = 0
        scores = (log_BT * counted).sum(1) / counted.sum(1).clamp(min=1)
        texts = [tokenizer.decode(row) for row in rows.tolist()]
        return [Caption(text, float(score)) for text, score in zip(texts, scores.tolist(), strict=True)]


def _file(path: Path) -> bytes:
    try:
        return read_photo(PhotoFile(path))
    except BadPhoto as error:
        raise ShardError(error.reason, where=path, got=error.detail) from None


def _pixels(photo: Image.Image | Tensor | np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8."""
    if isinstance(photo, Image.Image):
        return np.array(upright_rgb(photo))
    pixels_HW3 = photo.permute(1, 2, 0).numpy(force=True) if isinstance(photo, Tensor) else np.asarray(photo)
    if pixels_HW3.ndim != 3 or pixels_HW3.shape[2] != 3 or pixels_HW3.dtype != np.uint8:
        raise ConfigError(
            "not an image",
            got=f"{type(photo).__name__}, {pixels_HW3.dtype} {tuple(photo.shape)}",
            wanted="uint8, a (H, W, 3) array or a (3, H, W) tensor",
        )
    return pixels_HW3.copy()
