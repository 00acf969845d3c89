"""TensorBoard's files of a run: scalars grouped as people look at them, texts, pictures, hyperparameters.

The tab "Custom scalars" has charts of what is read together; "HParams" has the configuration beside the last losses and
scores. A run that goes on writes behind the step it goes on from; TensorBoard drops what an earlier start wrote beyond.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pvtcap.config import Config
from pvtcap.configfile import flat

_SCORED = ("val/loss", "val/CIDEr", "val/Bleu_4", "val/METEOR", "val/ROUGE_L", "train/loss")
_SOURCES = "loss of each source"
CHARTS = {
    "learning": {
        "loss": ("train/loss", "val/loss"),
        _SOURCES: ("train/loss_of/.*",),
        "perplexity": ("train/perplexity", "val/perplexity"),
        "gradient norm": ("train/grad_norm",),
        "learning rates": ("train/lr", "train/lr_encoder"),
    },
    "scores": {
        "CIDEr, SPICE": ("val/CIDEr", "val/SPICE"),
        "BLEU": ("val/Bleu_.",),
        "METEOR, ROUGE-L": ("val/METEOR", "val/ROUGE_L"),
    },
    "speed": {
        "captions and images a second": ("speed/captions_per_second", "speed/images_per_second"),
        "model FLOPs utilisation": ("speed/mfu",),
        "share of time waiting for data: mean, and the worst rank's": ("data/wait_share", "data/wait_share_worst"),
    },
    "machine": {
        "memory, GiB": ("memory/.*",),
        "seconds of a checkpoint, validation, captions": ("checkpoint/seconds", "val/seconds", "val/caption_seconds"),
        "photos left out": ("data/bad_samples",),
    },
}  # by category and title; tags are regular expressions


class EventFiles:
    """``start_step`` is the last step already done. Only rank 0 has one."""

    def __init__(self, folder: Path, config: Config, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter, summary

        self._writer: Any
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)
        self._writer.add_text("config", f"```yaml\n{config.to_yaml()}\n```", start_step)
        # TensorBoard matches from the start only: without an end, train/loss would be all that begin so.
        charts = {
            category: {title: ["Multiline", [f"{tag}$" for tag in tags]] for title, tags in titles.items()}
            for category, titles in CHARTS.items()
        }
        if len(config.data.train) < 2:
            del charts["learning"][_SOURCES]  # it would be empty
        self._writer.add_custom_scalars(charts)
        if not start_step:
            # SummaryWriter.add_hparams would make another run of it; the scores are those that the run writes anyway.
            make: Any = summary.hparams  # untyped
            for one in make(_flat(config), dict.fromkeys(_SCORED, 0.0)):
                self._writer.file_writer.add_summary(one)

    def scalars(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def text(self, tag: str, text: str, step: int) -> None:
        self._writer.add_text(tag, text, step)

    def picture(self, tag: str, file: Path, step: int) -> None:
        """A PNG, as it is."""
        with Image.open(file) as image:
            self._writer.add_image(tag, np.array(image.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _flat(config: Config) -> dict[str, bool | int | float | str]:
    """As TensorBoard takes it: what is not a number as text."""
    tree = flat(config.model_dump(mode="json"))
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in tree.items()}
