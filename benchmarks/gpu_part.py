"""A part of what ``gpu.py`` measures: its configurations, and how its steps are timed. See gpu_contestants.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from train_step import CAPTIONS

from pvtcap.config import Config
from pvtcap.configfile import parse

Found = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """``folder`` has the data, or will; ``size`` and the contestants are those of gpu.py as plain values."""

    kind: str
    folder: Path
    size: dict[str, Any]
    contestants: Sequence[dict[str, Any]]

    def config(self, contestant: dict[str, Any]) -> Config:
        size, shards = self.size, "features" if contestant["input"] == "features" else "shards"
        tree = {
            "run": {"dir": str(self.folder / f"run-{self.kind}-{shards}")},
            "data": {
                "train": str(self.folder / shards), "global_batch": contestant["photos"] or 1,
                "captions_per_photo": CAPTIONS, "image_px": size["px"], "workers": contestant["workers"],
            },
            "text": {"vocab": str(self.folder / "vocab.txt")},
            "model": {"encoder_weights": str(self.folder / "encoder.pth"), "decoder": "scratch", **size["model"]},
            "train": {"steps": 10**6, "compile": bool(contestant["compiled"]), "device_peak_tflops": size["peak"]},
            "zero": {"stage": contestant["stage"] or 0},
            "precision": "bf16",
        }  # fmt: skip
        return parse(tree, "gpu")


def timed(step: Callable[[], object], device: torch.device, warm_up: int, steps: int) -> list[float]:
    """Seconds of each step behind the warm-up; the device's highest memory is counted from there, too."""
    seconds = []
    for turn in range(warm_up + steps):
        if turn == warm_up and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds[warm_up:]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
