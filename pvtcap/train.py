"""Train a Captioner. Takes a Config and a World, leaves a run folder; knows nothing of captions' scores.

    with World.start() as world:
        run(config, world, resume="auto", evaluation=None)

``evaluation``, if given, captions checkpoints just written, and scores them while training goes on; ``cli`` passes one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from rich.markup import escape

from pvtcap import checkpoint, frozenencoder, weights
from pvtcap.captioner import Captioner
from pvtcap.config import BatchPlan, Config, batch_plan
from pvtcap.dist import World
from pvtcap.engine import Engine, deepspeed_dict, lr_scale
from pvtcap.errors import ConfigError, TrainError
from pvtcap.ledger import Ledger
from pvtcap.monitor import Monitor, StepStats
from pvtcap.scoring import Scored
from pvtcap.shardset import ShardSet
from pvtcap.sources import Sources, open_shardset
from pvtcap.stream import BadSample, Batch, View, train_batches, whole_batches
from pvtcap.text import CaptionTokenizer
from pvtcap.weightreport import Loaded, SourceFile, source_files, weights_table


class Evaluation(Protocol):
    """Captions and scores of checkpoints: captions by all ranks, scores beside the steps that follow."""

    def start(self, checkpoint: Path, step: int) -> None:
        """Caption with a checkpoint just written; collective."""

    def finished(self, *, wait: bool = False) -> Iterator[Scored]:
        """What has been scored since last asked, on rank 0; with ``wait``, all that is left."""


def run(config: Config, world: World, *, resume: str = "auto", evaluation: Evaluation | None = None) -> None:
    """Train to the end, or from the last checkpoint to the end. Every rank calls it."""
    job = prepare(config, world, resume)
    engine = Engine(job.model, config, job.plan, world)
    if job.resumed is not None:
        engine.load(str(job.resumed.path), checkpoint.ENGINE)
    batches = train_batches(job.train, job.view, job.plan, world, seed=config.run.seed, first_step=job.start_step)
    ledger = Ledger(
        config.run.dir, job.train, world, start_step=job.start_step, max_bad_fraction=config.data.max_bad_fraction
    )
    with Monitor(config, deepspeed_dict(config, job.plan), world, job.start_step, job.total_steps) as monitor:
        monitor.say(job.summary(config, world))
        if any(one.taken for one in job.loaded):
            monitor.say(escape(weights_table(job.loaded)))  # a path may have brackets
        if job.start_step == 0:
            look(engine, job, ledger, world, monitor, 0, evaluation)
        for step in range(job.start_step + 1, job.total_steps + 1):
            scale = lr_scale(step, job.total_steps, config.optim)
            stats, bad = train_step(engine, batches, ledger, job.plan, world, step=step, scale=scale)
            monitor.bad_samples(step, bad, ledger.num_bad)
            monitor.step(step, stats)
            look(engine, job, ledger, world, monitor, step, evaluation)
            tell(evaluation, monitor)
        tell(evaluation, monitor, wait=True)
        monitor.say(f"done: {job.total_steps} steps; {config.run.dir}")


def train_step(
    engine: Engine,
    batches: Iterator[Batch],
    ledger: Ledger,
    plan: BatchPlan,
    world: World,
    *,
    step: int,
    scale: float,
) -> tuple[StepStats, list[BadSample]]:
    """One optimizer step on one global batch, and what of it could not be decoded on any rank.

    The loss is a sum over tokens divided by the global token count.
    """
    started = time.perf_counter()
    micro_batches = [next(batches) for _ in range(plan.accumulation)]
    waited = time.perf_counter() - started
    labels, captions = (sum(getattr(b, name) for b in micro_batches) for name in ("num_labels", "num_captions"))
    num_labels, num_captions, num_bad = map(int, world.sum([labels, captions, ledger.take(micro_batches)]))
    bad = ledger.judge(step) if num_bad else []
    local_sum = 0.0
    for turn, batch in enumerate(micro_batches):
        if turn:
            engine.accumulate()
        torch.manual_seed(dropout_seed(engine.config.run.seed, step, turn, world.rank))
        local_sum += engine.forward_backward(batch, scale=1 / max(1, num_labels))  # 0 where all photos are bad
    (loss_sum,) = world.sum([local_sum])
    if not math.isfinite(loss_sum):
        stop_not_finite(world, step, local_sum, micro_batches)
    grad_norm = engine.step(scale)
    stats = StepStats(
        loss=loss_sum / max(1, num_labels),
        grad_norm=grad_norm,
        lr=engine.config.optim.lr * scale,
        photos=plan.global_batch - num_bad,
        captions=num_captions,
        tokens=num_labels,
        seconds=time.perf_counter() - started,
        data_wait_seconds=waited,
    )
    return stats, bad


def look(
    engine: Engine, job: Job, ledger: Ledger, world: World, monitor: Monitor, step: int, evaluation: Evaluation | None
) -> None:
    """What is due after a step: validation loss, a checkpoint, captions of it."""
    config, last = engine.config, step == job.total_steps
    if job.val is not None and due(config.train.val_every_steps, step, last):
        monitor.val(step, val_loss(engine, job.val, job.view, world, job.plan.micro_batch))
    scoring = (
        evaluation is not None
        and job.val is not None
        and (due(config.evaluate.every_steps, step, last) if step else config.evaluate.at_start)
    )
    if scoring or (step and (last or due(config.checkpoint.every_steps, step, last))):
        ledger.write(step)
        folder = checkpoint.save(
            engine,
            job.view.tokenizer,
            config,
            job.plan,
            world,
            step=step,
            train_data=job.train.describe(),
            encoder_sha256=job.encoder_sha256,
            weight_files=job.weight_files,
        )
        if scoring and evaluation is not None:
            evaluation.start(folder, step)


def tell(evaluation: Evaluation | None, monitor: Monitor, *, wait: bool = False) -> None:
    """Hand on what has been scored meanwhile."""
    if evaluation is not None:
        for scored in evaluation.finished(wait=wait):
            monitor.scores(scored)


def val_loss(engine: Engine, val: ShardSet, view: View, world: World, micro_batch: int) -> float:
    """Mean loss (nats a token) over the whole set, each sample exactly once, at any world size."""
    loss_sum, num_labels = 0.0, 0
    for batch in whole_batches(val, view, micro_batch, world, even=True):
        loss_sum += engine.loss_sum(batch)
        num_labels += batch.num_labels
    loss_sum, num_labels_all = world.sum([loss_sum, num_labels])
    return loss_sum / num_labels_all


def due(every_steps: int | None, step: int, last: bool) -> bool:
    """Is something with this cadence due after ``step``? A cadence that is set is also due at the start and the end."""
    return every_steps is not None and (last or step % every_steps == 0)


@dataclass(frozen=True)
class Job:
    """All that a run needs before it has an engine; equal on all ranks."""

    plan: BatchPlan
    train: Sources
    val: ShardSet | None
    view: View
    model: Captioner
    encoder_sha256: str | None
    resumed: checkpoint.Checkpoint | None
    total_steps: int
    loaded: tuple[Loaded, ...]
    weight_files: tuple[SourceFile, ...]

    @property
    def start_step(self) -> int:
        return self.resumed.manifest.step if self.resumed else 0

    def summary(self, config: Config, world: World) -> str:
        learning = sum(parameter.numel() for parameter in self.model.trainable().values())
        begin = f"going on from step {self.start_step} of" if self.resumed else "training"
        return (
            f"{begin} {self.total_steps} steps: {self.train.num_samples:,} photos, global batch "
            f"{self.plan.global_batch} = {self.plan.micro_batch} × {world.size} ranks × {self.plan.accumulation}, "
            f"{world.device.type}, ZeRO-{config.zero.stage}, {config.precision}"
            + (f", {learning:,} parameters learn ({config.train.what})" if learning else "")
            + ("" if (features := self.train.shardsets[0].manifest.features) is None else f", from {features}")
        )


def prepare(config: Config, world: World, resume: str) -> Job:
    """Open data, find the checkpoint, build the model; everything that can be wrong is found here, before step 1."""
    plan = world.on_first_rank(lambda: batch_plan(config.data, world.size))
    sources = world.on_first_rank(lambda: Sources.open(config.data))
    world.on_first_rank(lambda: sources.order(config.data, config.run.seed) and None)  # are the weights possible?
    val = world.on_first_rank(lambda: open_shardset(config.data.val, config.data) if config.data.val else None)
    shown = [*sources.shardsets, *([] if val is None else [val])]
    world.on_first_rank(lambda: frozenencoder.check(config, shown, trained=sources.shardsets))
    total_steps = world.on_first_rank(lambda: length(config, sources.num_samples))
    resumed = world.on_first_rank(lambda: checkpoint.find_resume(config, resume))
    if resumed is not None:
        found = resumed
        world.on_first_rank(lambda: checkpoint.check_resumable(found, config, world, sources.describe()))
        tokenizer = resumed.tokenizer()
    else:
        tokenizer = world.on_first_rank(lambda: make_tokenizer(config, sources))
    model = Captioner(config, tokenizer.size)
    frozen_encoder = not model.encoder_trains
    loaded = load_weights(model, config, shown, resumed)
    if resumed is None:
        weight_files = world.on_first_rank(lambda: source_files(loaded))
    else:
        weight_files = resumed.manifest.weight_files  # what the run began with, all of it
    if resumed is not None and frozen_encoder:
        checkpoint.check_encoder(model, resumed.manifest, resumed.path)
    view = View(config.data, tokenizer, config.text.max_tokens)
    encoder_sha256 = model.encoder.fingerprint() if frozen_encoder else None
    return Job(plan, sources, val, view, model, encoder_sha256, resumed, total_steps, loaded, weight_files)


def load_weights(
    model: Captioner, config: Config, shown: Sequence[ShardSet], resumed: checkpoint.Checkpoint | None
) -> tuple[Loaded, ...]:
    """Fill the model from what the configuration names; what trains is left out when a checkpoint has it."""
    encoder = frozenencoder.ready(model, config, shown)
    loaded = [] if encoder is None else [encoder]
    if resumed is None:
        loaded.append(weights.load_projection(model, config))
    if resumed is None or "decoder" not in config.train.what:
        loaded.append(weights.load_decoder(model, config))
    return tuple(loaded)


def length(config: Config, train_samples: int) -> int:
    """Optimizer steps of the whole run."""
    if config.train.steps is not None:
        return config.train.steps
    if config.train.epochs is None:
        raise ConfigError("no length", where="train", do="Set train.epochs or train.steps.")
    return math.ceil(config.train.epochs * train_samples / config.data.global_batch)


def make_tokenizer(config: Config, sources: Sources) -> CaptionTokenizer:
    """The vocabulary ``text.vocab`` names, or one learned from the training captions."""
    if config.text.vocab != "train":
        return weights.load_vocab(config.text)
    captions = (caption for group in sources.captions() for caption in group)
    return CaptionTokenizer.train(captions, config.text.vocab_size, config.text.prompt)


def dropout_seed(seed: int, step: int, turn: int, rank: int) -> int:
    """Dropout of one micro-batch, as a function of where it stands: nothing to save, nothing to restore."""
    value = 0
    for part in (seed, step, turn, rank):
        value = (value * 1_000_003 + part + 1) % 2**63
    return value


def stop_not_finite(world: World, step: int, local_sum: float, micro_batches: list[Batch]) -> None:
    """All ranks stop before the optimizer moves; the error names the batches whose loss was not finite."""
    mine = [] if math.isfinite(local_sum) else [s.key for batch in micro_batches for s in batch.samples]
    keys = world.gather(mine)

    def fail() -> None:
        named = [key for part in keys or [] for key in part]
        raise TrainError(
            f"the loss of step {step} is not finite; no weight was changed by it",
            got=", ".join(named[:64]),
            do="Lower optim.lr, lengthen optim.warmup_steps, or look at these samples.",
        )

    world.on_first_rank(fail)
