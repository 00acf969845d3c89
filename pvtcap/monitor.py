"""What a run says while it runs: the console, ``log.jsonl`` and TensorBoard. Rank 0 only; elsewhere it is silent.

A line of log.jsonl is one JSON object: ``step``, ``kind`` (train, val, captions, evaluate, checkpoint, bad, spike,
event) and the numbers under the same names as TensorBoard's scalars; a spike has the photos' keys, an event its text.
docs/monitoring.md explains each. A resumed run drops the lines beyond the step it goes on from: curves have no overlap.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pvtcap import rankreading, recipes, runlog
from pvtcap.batch import BadSample
from pvtcap.config import Config
from pvtcap.dist import World
from pvtcap.eventfiles import EventFiles
from pvtcap.flops import StepFlops, peak_flops
from pvtcap.rankreading import Losses, RankReading
from pvtcap.scoring import SHEET, WORST, Scored
from pvtcap.shardset import write_json

_PACKAGES = ("pvtcap", "torch", "deepspeed", "timm", "transformers", "tokenizers", "numpy", "pillow")


@dataclass(frozen=True)
class StepStats:
    """One optimizer step over all ranks. ``loss`` is nats a token; the last two are this rank's.

    ``losses`` are there where data.train has several ShardSets.
    """

    loss: float
    grad_norm: float
    lr: float
    photos: int
    captions: int
    tokens: int
    seconds: float
    data_wait_seconds: float
    losses: Losses = field(default_factory=dict)


class Monitor:
    """``start_step`` is the last step already done: 0 in a new run; ``sources`` are the names of data.train's."""

    def __init__(
        self,
        config: Config,
        deepspeed: Mapping[str, Any],
        world: World,
        start_step: int,
        total_steps: int,
        flops: StepFlops | None = None,
        sources: Sequence[str] = (),
    ) -> None:
        self.run, self.total_steps, self.every = config.run.dir, total_steps, config.train.log_every_steps
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=not world.is_first)
        self.config, self.world, self.flops, self.sources = config, world, flops, sources
        self._peak = peak_flops(config, _device_name(world))
        self._window: list[StepStats] = []
        self._started, self._start_step = time.monotonic(), start_step
        self._writer: EventFiles | None = None
        self._bar = self._progress(start_step)
        if not world.is_first:
            return
        self.run.mkdir(parents=True, exist_ok=True)
        (self.run / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        write_json(self.run / "deepspeed.json", dict(deepspeed))
        write_json(self.run / "environment.json", environment(world))
        self._log, self._kept = _open_log(self.run, start_step)
        self._writer = EventFiles(self.run / "tensorboard", config, start_step)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
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
        """Collect a step; every ``train.log_every_steps`` write the mean of those collected. Collective."""
        self._window.append(stats)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, loss=f"{stats.loss:.3f}")
        if step % self.every and step != self.total_steps:
            return
        window, self._window = self._window, []
        waited = sum(stats.data_wait_seconds for stats in window)
        losses = rankreading.merged([stats.losses for stats in window])
        readings = self.world.gather(RankReading.take(waited, losses, self.world.device))
        if readings is not None:
            self._write_window(step, window, readings)

    def _write_window(self, step: int, window: Sequence[StepStats], readings: Sequence[RankReading]) -> None:
        stats, optim, world = window[-1], self.config.optim, self.world
        seconds = sum(stats.seconds for stats in window)
        tokens = sum(stats.tokens for stats in window)
        photos, captions = sum(stats.photos for stats in window), sum(stats.captions for stats in window)
        loss = sum(stats.loss * stats.tokens for stats in window) / tokens
        numbers = {
            "train/loss": loss,
            "train/perplexity": _perplexity(loss),
            "train/lr": stats.lr,
            "train/grad_norm": sum(stats.grad_norm for stats in window) / len(window),
            "speed/images_per_second": photos / seconds,
            "speed/images_per_second_per_device": photos / seconds / world.size,
            "speed/captions_per_second": captions / seconds,
            "speed/captions_per_second_per_device": captions / seconds / world.size,
            "speed/tokens_per_second": tokens / seconds,
            "speed/step_seconds": seconds / len(window),
            **rankreading.numbers(readings, seconds, self.sources),
        }
        if "encoder" in self.config.train.what:
            numbers["train/lr_encoder"] = stats.lr * (optim.encoder_lr or optim.lr) / optim.lr
        if self.flops is not None:
            per_device = self.flops.total(photos, captions, tokens) / seconds / world.size
            numbers["speed/model_tflops_per_device"] = per_device / 1e12
            if self._peak is not None:
                numbers["speed/mfu"] = per_device / self._peak
        self._write("train", step, numbers)
        self.say(
            f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  loss {loss:.3f}  "
            f"lr {stats.lr:.1e}  grad {numbers['train/grad_norm']:.2f}  "
            f"{numbers['speed/images_per_second']:.0f} images/s  "
            f"{numbers['speed/captions_per_second']:.0f} captions/s  "
            f"data wait {numbers['data/wait_share']:.0%}{self._slowest(numbers)}  left {self._time_left(step)}"
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
            self._writer.text("events", text, step)
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

    def captioned(self, step: int, seconds: float) -> None:
        """The captions of an evaluation are there; its scores come later, beside the steps."""
        self._write("captions", step, {"val/caption_seconds": seconds})

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
                self._writer.picture(tag, scored.out / name, scored.step)

    def _write(
        self, kind: str, step: int, numbers: Mapping[str, float], *, scalars: bool = True, **more: object
    ) -> None:
        if self._writer is None:
            return
        print(json.dumps({"step": step, "kind": kind, **numbers, **more}), file=self._log, flush=True)
        if scalars:
            self._writer.scalars(numbers, step)

    def _progress(self, start_step: int) -> Progress | None:
        """A bar below the lines, where a person watches; a file, or Slurm's log, has the lines alone."""
        if not self.console.is_terminal or not self.world.is_first:
            return None
        columns = (MofNCompleteColumn(), BarColumn(), TextColumn("loss {task.fields[loss]}"), TimeElapsedColumn())
        bar = Progress(TextColumn("step"), *columns, TextColumn("left"), TimeRemainingColumn(), console=self.console)
        bar.add_task("step", total=self.total_steps, completed=start_step, loss="?")
        return bar

    def _slowest(self, numbers: Mapping[str, float]) -> str:
        """Which rank waits for its data, where it does and others do not."""
        worst = numbers["data/wait_share_worst"]
        far = worst > 0.1 and worst > 2 * numbers["data/wait_share"]
        return f" (rank {int(numbers['data/wait_worst_rank'])}: {worst:.0%})" if far else ""

    def _time_left(self, step: int) -> str:
        done = step - self._start_step
        seconds = int((time.monotonic() - self._started) / done * (self.total_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def environment(world: World) -> dict[str, Any]:
    """What a later reader needs to know about where a run ran."""
    return {
        "world_size": world.size,
        "device": _device_name(world),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_revision": recipes.git_revision(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
    }


def _device_name(world: World) -> str:
    return torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or "cpu"


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
