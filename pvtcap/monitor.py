"""What a run says while it runs: the console, ``log.jsonl`` and TensorBoard. Rank 0 only; elsewhere it is silent.

A line of log.jsonl is one JSON object: ``step``, ``kind`` (train, val, evaluate, checkpoint, bad, spike, event) and the
numbers under the same names as TensorBoard's scalars; a spike has the photos' keys, an event its text. A resumed run
drops the lines beyond the step it goes on from: curves have no overlap.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape

from pvtcap import recipes, runlog
from pvtcap.config import Config
from pvtcap.dist import World
from pvtcap.scoring import SHEET, WORST, Scored
from pvtcap.shardset import write_json
from pvtcap.stream import BadSample

_PACKAGES = ("pvtcap", "torch", "deepspeed", "timm", "transformers", "tokenizers", "numpy", "pillow")


@dataclass(frozen=True)
class StepStats:
    """One optimizer step over all ranks. ``loss`` is nats a token; times are in seconds, those of rank 0."""

    loss: float
    grad_norm: float
    lr: float
    photos: int
    captions: int
    tokens: int
    seconds: float
    data_wait_seconds: float


class Monitor:
    """``start_step`` is the last step already done: 0 in a new run."""

    def __init__(self, config: Config, deepspeed: Mapping[str, Any], world: World, start_step: int, total_steps: int):
        self.run, self.total_steps, self.every = config.run.dir, total_steps, config.train.log_every_steps
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=not world.is_first)
        self._window: list[StepStats] = []
        self._started, self._start_step = time.monotonic(), start_step
        self._writer: Any = None
        if not world.is_first:
            return
        self.run.mkdir(parents=True, exist_ok=True)
        (self.run / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        write_json(self.run / "deepspeed.json", dict(deepspeed))
        write_json(self.run / "environment.json", environment(world))
        self._log, self._kept = _open_log(self.run, start_step)
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.run / "tensorboard"), purge_step=start_step + 1 if start_step else None)
        self._writer.add_text("config", f"```yaml\n{config.to_yaml()}\n```", start_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._writer is not None:
            self._writer.close()
            self._log.close()

    def has(self, kind: str, step: int) -> bool:
        """Did the log of an earlier start already have a line of this kind for this step? Rank 0 knows."""
        return (kind, step) in self._kept

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        self.console.print(text)

    def step(self, step: int, stats: StepStats) -> None:
        """Collect a step; every ``train.log_every_steps`` write the mean of those collected."""
        self._window.append(stats)
        if step % self.every and step != self.total_steps:
            return
        window, self._window = self._window, []
        seconds = sum(stats.seconds for stats in window)
        tokens = sum(stats.tokens for stats in window)
        loss = sum(stats.loss * stats.tokens for stats in window) / tokens
        numbers = {
            "train/loss": loss,
            "train/perplexity": _perplexity(loss),
            "train/lr": stats.lr,
            "train/grad_norm": sum(stats.grad_norm for stats in window) / len(window),
            "speed/images_per_second": sum(stats.photos for stats in window) / seconds,
            "speed/captions_per_second": sum(stats.captions for stats in window) / seconds,
            "speed/step_seconds": seconds / len(window),
            "data/wait_share": sum(stats.data_wait_seconds for stats in window) / seconds,
        }
        self._write("train", step, numbers)
        self.say(
            f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  loss {loss:.3f}  "
            f"lr {stats.lr:.1e}  grad {numbers['train/grad_norm']:.2f}  "
            f"{numbers['speed/images_per_second']:.0f} images/s  "
            f"{numbers['speed/captions_per_second']:.0f} captions/s  "
            f"data wait {numbers['data/wait_share']:.0%}  left {self._time_left(step)}"
        )

    def bad_samples(self, step: int, bad: Sequence[BadSample], total: int) -> None:
        """Photos that were left out of a step, a line each for the person; how many it were since the run began."""
        if not bad:
            return
        self._write("bad", step, {"data/bad_samples": total})
        for one in bad:
            self.say(f"step {step}  left out: {one.where}: {one.reason}")

    def spike(self, step: int, loss: float, expected: float, keys: Sequence[Sequence[str]] | None) -> None:
        """A loss far above what was expected, with the keys of the photos of every rank (None but on rank 0)."""
        named = [key for part in keys or () for key in part]
        self._write("spike", step, {"train/loss": loss, "expected": expected}, scalars=False, keys=named)
        self.say(f"step {step}  loss {loss:.3f} where {expected:.3f} was expected; photos: {_shortened(named)}")

    def event(self, step: int, text: str) -> None:
        """Something that happened to the run: a line for the person, a line of the log, a text in TensorBoard."""
        self._write("event", step, {}, text=text)
        if self._writer is not None:
            self._writer.add_text("events", text, step)
        self.say(escape(text))

    def saved(self, step: int, seconds: float) -> None:
        """A checkpoint is complete."""
        self._write("checkpoint", step, {"checkpoint/seconds": seconds})

    def leaving(self, step: int, reason: str, seconds: float) -> None:
        """The run was asked to stop and has; ``seconds`` since it was asked."""
        since = f", {seconds:.1f} s after it" if seconds else ""
        self.event(step, f"stopped at step {step} of {self.total_steps} by {reason}: checkpoint complete{since}")
        self.say("start the same command again to go on")

    def val(self, step: int, loss: float, seconds: float) -> None:
        """Loss on the whole validation set, nats a token, and how long that took."""
        self._write("val", step, {"val/loss": loss, "val/perplexity": _perplexity(loss), "val/seconds": seconds})
        self.say(f"step {step}  [bold]val loss {loss:.4f}[/bold]  perplexity {_perplexity(loss):.2f}")

    def scores(self, scored: Scored) -> None:
        """Caption metrics of an evaluation, at the step it belongs to, and the pictures of captions it drew."""
        if scored.report is None:
            self.say(f"step {scored.step}  {scored.reason}")
            return
        known = {f"val/{name}": value for name, value in scored.report["scores"].items() if value is not None}
        self._write("evaluate", scored.step, known)
        named = (f"{name.removeprefix('val/')} {value:.3f}" for name, value in known.items())
        self.say(f"step {scored.step}  " + "  ".join(named))
        for tag, name in (("val/captions", SHEET), ("val/worst", WORST)):
            if self._writer is not None and (scored.out / name).is_file():
                with Image.open(scored.out / name) as image:
                    self._writer.add_image(tag, np.array(image.convert("RGB")), scored.step, dataformats="HWC")
                self._writer.flush()

    def _write(
        self, kind: str, step: int, numbers: Mapping[str, float], *, scalars: bool = True, **more: object
    ) -> None:
        if self._writer is None:
            return
        print(json.dumps({"step": step, "kind": kind, **numbers, **more}), file=self._log, flush=True)
        for name, value in numbers.items() if scalars else ():
            self._writer.add_scalar(name, value, step)

    def _time_left(self, step: int) -> str:
        done = step - self._start_step
        seconds = int((time.monotonic() - self._started) / done * (self.total_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def environment(world: World) -> dict[str, Any]:
    """What a later reader needs to know about where a run ran."""
    return {
        "world_size": world.size,
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_revision": recipes.git_revision(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
    }


def _perplexity(loss: float) -> float:
    return float(np.exp(min(loss, 80.0)))  # beyond that it overflows, and says nothing


def _open_log(run: Path, start_step: int) -> tuple[Any, set[tuple[str, int]]]:
    kept = [line for line in runlog.read(run) if line["step"] <= start_step]
    # Aside first: a run that is killed here must not lose its log.
    path = run / runlog.LOG
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)
    return path.open("a", encoding="utf-8"), {(line["kind"], line["step"]) for line in kept}


def _shortened(keys: Sequence[str]) -> str:
    return escape(", ".join(keys[:8]) + (f" and {len(keys) - 8} more (log.jsonl)" if len(keys) > 8 else ""))
