"""What is due after a training step: validation loss, a checkpoint, captions of it, scores that have come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from pvtcap import saving
from pvtcap.dist import World
from pvtcap.engine import Engine
from pvtcap.job import Job
from pvtcap.ledger import Ledger
from pvtcap.monitor import Monitor
from pvtcap.scoring import Scored
from pvtcap.shardset import ShardSet
from pvtcap.stream import View, whole_batches


class Evaluation(Protocol):
    """Captions and scores of checkpoints: captions by all ranks, scores beside the steps that follow."""

    def start(self, checkpoint: Path, step: int) -> None:
        """Caption with a checkpoint just written; collective."""

    def owed(self) -> list[tuple[Path, int]]:
        """Checkpoints, and their steps, whose evaluation a stopped run began and did not bring to its scores."""

    def finished(self, *, wait: bool = False) -> Iterator[Scored]:
        """What has been scored since last asked, on rank 0; with ``wait``, all that is left."""


class AfterStep:
    """All of it is collective: every rank calls it, in the same order. ``beat`` as in ``val_loss``."""

    def __init__(
        self,
        engine: Engine,
        job: Job,
        ledger: Ledger,
        world: World,
        monitor: Monitor,
        evaluation: Evaluation | None,
        beat: Callable[[], None],
    ) -> None:
        self.engine, self.job, self.ledger, self.world = engine, job, ledger, world
        self.monitor, self.evaluation, self.config = monitor, evaluation, engine.config
        self._beat, self._last_save = beat, time.monotonic()

    def begin(self) -> None:
        """Before the first step: a new run is looked at; one that goes on may owe scores of where it was stopped."""
        job, step = self.job, self.job.start_step
        if job.resumed is None:
            self.look(0)
            return
        every, last = self.config.train.val_every_steps, step == job.total_steps
        if due(every, step, last) and self.world.on_first_rank(lambda: not self.monitor.has("val", step)):
            self._validate(step)
        if self.evaluation is not None:
            owed = dict(self.evaluation.owed())
            if self._scoring_is_due(step) and self.world.on_first_rank(lambda: not self.monitor.has("evaluate", step)):
                owed[job.resumed.path] = step
            for folder, of_step in owed.items():
                self._caption(folder, of_step)

    def save_is_late(self) -> bool:
        """Has it been ``checkpoint.every_minutes`` since the last one?"""
        every = self.config.checkpoint.every_minutes
        return every is not None and time.monotonic() - self._last_save >= 60 * every

    def look(self, step: int, *, save: bool = False, leave: bool = False) -> None:
        """``save``: a checkpoint is due anyhow; ``leave``: nothing but that has time."""
        last = step == self.job.total_steps
        if due(self.config.train.val_every_steps, step, last) and not leave:
            self._validate(step)
        scoring = self._scoring_is_due(step)
        if scoring or save or (step and (last or due(self.config.checkpoint.every_steps, step, last))):
            folder = self._save(step)
            if scoring and not leave:
                self._caption(folder, step)
        if not leave:
            self.tell()

    def tell(self, *, wait: bool = False) -> None:
        """Hand on what has been scored meanwhile."""
        for scored in self.evaluation.finished(wait=wait) if self.evaluation is not None else ():
            self.monitor.scores(scored)
            saving.prune(self.config)  # the best may be another now

    def _caption(self, folder: Path, step: int) -> None:
        assert self.evaluation is not None, "asked for where there is one"
        started = time.perf_counter()
        self.evaluation.start(folder, step)
        self.monitor.captioned(step, time.perf_counter() - started)

    def _validate(self, step: int) -> None:
        if self.job.val is not None:
            started = time.perf_counter()
            micro_batch = self.job.plan.micro_batch
            loss = val_loss(self.engine, self.job.val, self.job.view, self.world, micro_batch, self._beat)
            self.monitor.val(step, loss, time.perf_counter() - started)

    def _scoring_is_due(self, step: int) -> bool:
        how, last = self.config.evaluate, step == self.job.total_steps
        due_now = due(how.every_steps, step, last) if step else how.at_start
        return self.evaluation is not None and self.job.val is not None and due_now

    def _save(self, step: int) -> Path:
        started = time.perf_counter()
        self.ledger.write(step)
        folder = saving.save(
            self.engine,
            self.job.view.tokenizer,
            self.config,
            self.job.plan,
            self.world,
            step=step,
            train_data=self.job.train.describe(),
            encoder_sha256=self.job.encoder_sha256,
            weight_files=self.job.weight_files,
        )
        self._last_save = time.monotonic()
        self.monitor.saved(step, time.perf_counter() - started)
        return folder


def val_loss(
    engine: Engine, val: ShardSet, view: View, world: World, micro_batch: int, beat: Callable[[], None] = lambda: None
) -> float:
    """Mean loss (nats a token) over the whole set, each sample exactly once, at any world size.

    ``beat`` is called after each batch: whoever watches over the run sees that it moves.
    """
    loss_sum, num_labels = 0.0, 0
    for batch in whole_batches(val, view, micro_batch, world, even=True):
        loss_sum += engine.loss_sum(batch)
        num_labels += batch.num_labels
        beat()
    loss_sum, num_labels_all = world.sum([loss_sum, num_labels])
    return loss_sum / num_labels_all


def due(every_steps: int | None, step: int, last: bool) -> bool:
    """Is something with this cadence due after ``step``? A cadence that is set is also due at the start and the end."""
    return every_steps is not None and (last or step % every_steps == 0)
