"""Train a Captioner. Takes a Config and a World, leaves a run folder; knows nothing of captions' scores.

    with World.start() as world:
        finished = run(config, world, resume="auto", evaluation=None, notice=None, watch=None)

``evaluation`` captions checkpoints just written, and scores them while training goes on; a ``notice`` asks to leave; a
``watch`` ends a run of which a rank stalls. ``cli`` passes all three.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from rich.markup import escape

from pvtcap import elastic
from pvtcap.afterstep import AfterStep, Evaluation
from pvtcap.batch import BadSample, Batch
from pvtcap.checkpoint import ENGINE, Checkpoint
from pvtcap.config import BatchPlan, Config, ranks_in_words
from pvtcap.dist import World
from pvtcap.engine import Engine, deepspeed_dict, lr_scale
from pvtcap.errors import TrainError
from pvtcap.flops import StepFlops
from pvtcap.job import Job, prepare
from pvtcap.ledger import Ledger
from pvtcap.monitor import Monitor, StepStats
from pvtcap.preemption import Notice
from pvtcap.profile import profiled
from pvtcap.rankreading import Losses, merged
from pvtcap.runfolder import owned
from pvtcap.shardset import write_json
from pvtcap.sources import Sources
from pvtcap.spikes import SpikeWatch
from pvtcap.stallwatch import StallWatch
from pvtcap.stream import train_batches
from pvtcap.text import IGNORE
from pvtcap.weightreport import weights_table
from pvtcap.zerostate import refuse_code


def run(
    config: Config,
    world: World,
    *,
    resume: str = "auto",
    evaluation: Evaluation | None = None,
    notice: Notice | None = None,
    watch: StallWatch | None = None,
) -> bool:
    """Train to the end, or from the last checkpoint to the end; False: asked to leave before, with a checkpoint.

    Every rank calls it, and all leave at the same step.
    """
    job = prepare(config, world, resume)
    with owned(config.run.dir, world):
        engine = start_engine(job, config, world)
        ledger = Ledger(
            config.run.dir, job.train, world, start_step=job.start_step, max_bad_fraction=config.data.max_bad_fraction
        )
        ours = deepspeed_dict(config, job.plan)
        flops = _flops(job, config) if world.is_first else None
        with Monitor(config, ours, world, job.start_step, job.total_steps, flops, job.train.names) as monitor:
            _introduce(job, config, world, monitor)
            beat = (lambda: None) if watch is None else watch.beat
            after = AfterStep(engine, job, ledger, world, monitor, evaluation, beat)
            after.begin()
            for step, leave in _steps(engine, job, ledger, world, monitor, after, notice):
                if watch is not None:
                    watch.beat(step)
                if leave:
                    return False
            with nullcontext() if watch is None else watch.paused():
                after.tell(wait=True)  # for the scorer, on rank 0; the metrics have time limits of their own
            monitor.say(f"done: {job.total_steps} steps; {config.run.dir}")
    return True


def _steps(
    engine: Engine,
    job: Job,
    ledger: Ledger,
    world: World,
    monitor: Monitor,
    after: AfterStep,
    notice: Notice | None,
) -> Iterator[tuple[int, bool]]:
    """Do the steps that are left; after each, its number and whether all are to leave, their checkpoint complete."""
    config = engine.config
    batches = train_batches(
        job.train, job.view, job.plan, world, seed=config.run.seed, first_step=job.start_step, lent=True
    )
    spikes = SpikeWatch(config.train.spike_sigmas)
    votes, by_source = _votes(world, notice, after.save_is_late), job.train if len(job.train.shardsets) > 1 else None
    for step in profiled(range(job.start_step + 1, job.total_steps + 1), config, world):
        scale = lr_scale(step, job.total_steps, config.optim)
        done = train_step(
            engine, batches, ledger, job.plan, world, step=step, scale=scale, votes=votes, by_source=by_source
        )
        leave, save = (count > 0 for count in done.votes)
        leave = leave and step < job.total_steps
        monitor.bad_samples(step, done.bad, ledger.num_bad)
        monitor.step(step, done.stats)
        if spikes.sees(done.stats.loss):
            monitor.spike(step, done.stats.loss, spikes.expected, world.gather(done.keys))
        after.look(step, save=save or leave, leave=leave)
        if leave:
            assert notice is not None, "only a notice asks to leave"
            monitor.leaving(step, notice.reason, notice.seconds_ago())
            world.barrier()  # a rank that ends before the others are done looks like one that failed
        yield step, leave


def _introduce(job: Job, config: Config, world: World, monitor: Monitor) -> None:
    monitor.say(job.summary(config, world))
    if any(one.taken for one in job.loaded):
        monitor.say(escape(weights_table(job.loaded)))  # a path may have brackets
    for line in job.refused:
        monitor.event(job.start_step, f"not used: {line}")
    if job.resumed is not None:
        monitor.event(job.start_step, _how_it_goes_on(job.resumed, config, world))


def start_engine(job: Job, config: Config, world: World) -> Engine:
    """The engine, with the state of the checkpoint to go on from if there is one. Collective."""
    resumed = job.resumed
    if resumed is None:
        return Engine(job.model, config, job.plan, world)
    changed = elastic.is_needed(resumed, config, world.size)
    world.on_first_rank(lambda: refuse_code(resumed.path / ENGINE))
    engine = Engine(job.model, config, job.plan, world, universal=changed and config.zero.stage > 0)
    if not changed:
        engine.load(str(resumed.path), ENGINE)
        return engine
    folder = config.run.dir / "checkpoints" / f"{resumed.path.name}.universal"
    world.on_first_rank(lambda: elastic.convert(resumed, folder, config, engine.groups))
    if config.zero.stage > 0:
        engine.load(str(folder), ENGINE)
    else:
        elastic.load_plain(engine.optimizer, engine.groups, folder)
    world.barrier()  # all have read it
    world.on_first_rank(lambda: shutil.rmtree(folder))
    return engine


def _how_it_goes_on(resumed: Checkpoint, config: Config, world: World) -> str:
    before, now = resumed.manifest, resumed.config
    both = ((before.world_size, now), (world.size, config))
    shapes = [f"{ranks_in_words(size)}, ZeRO-{of.zero.stage}" for size, of in both]
    return f"going on from step {before.step} with {shapes[1]}" + (
        f" (was {shapes[0]})" if shapes[0] != shapes[1] else ""
    )


@dataclass(frozen=True)
class Done:
    """An optimizer step: its numbers, what of it could not be decoded on any rank, this rank's keys, all votes."""

    stats: StepStats
    bad: list[BadSample]
    keys: list[str]
    votes: tuple[float, ...]


def train_step(
    engine: Engine,
    batches: Iterator[Batch],
    ledger: Ledger,
    plan: BatchPlan,
    world: World,
    *,
    step: int,
    scale: float,
    votes: Callable[[], tuple[float, ...]] = tuple,
    by_source: Sources | None = None,
) -> Done:
    """One optimizer step on one global batch; the loss is a sum over tokens divided by the global token count.

    ``by_source``: the losses of this rank are told apart by the ShardSet that their photos are of.
    ``votes`` are numbers of this rank that are added up over ranks on the way. Raises TrainError, on all ranks and
    before any weight has changed, when the loss or a gradient is not finite.
    """
    started = time.perf_counter()
    micro_batches = [next(batches) for _ in range(plan.accumulation)]
    waited = time.perf_counter() - started
    labels, captions = (sum(getattr(b, name) for b in micro_batches) for name in ("num_labels", "num_captions"))
    num_labels, num_captions, num_bad = map(int, world.sum([labels, captions, ledger.take(micro_batches)]))
    bad = ledger.judge(step) if num_bad else []
    local_sum, losses = 0.0, list[Losses]()
    for turn, batch in enumerate(micro_batches):
        if turn:
            engine.accumulate()
        torch.manual_seed(dropout_seed(engine.config.run.seed, step, turn, world.rank))
        local_sum += engine.forward_backward(batch, scale=1 / max(1, num_labels))  # 0 where all photos are bad
        losses += source_losses(batch, engine.row_losses(), by_source) if by_source else []
    broken = not (math.isfinite(local_sum) and engine.gradients_are_finite())
    loss_sum, num_broken, *voted = world.sum([local_sum, broken, *votes()])
    keys = [sample.key for batch in micro_batches for sample in batch.samples]
    if num_broken:
        stop_not_finite(engine.config, world, step, local_sum, keys if broken else [])
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
        losses=merged(losses),
    )
    return Done(stats, bad, keys, tuple(voted))


def source_losses(batch: Batch, row_losses: list[float], sources: Sources) -> list[Losses]:
    """Of each row of a batch: its loss and labels, under its ShardSet's number."""
    labels = (batch.labels != IGNORE).sum(1).tolist()
    numbers = [sources.locate(place.source, place.shard)[0] for place in batch.places]
    return [{number: (loss, count)} for number, loss, count in zip(numbers, row_losses, labels, strict=True)]


def _flops(job: Job, config: Config) -> StepFlops:
    tokenizer = job.view.tokenizer
    features = job.train.shardsets[0].manifest.features is not None
    return StepFlops.of(config, tokenizer.size, len(tokenizer.prefix), features)


def dropout_seed(seed: int, step: int, turn: int, rank: int) -> int:
    """Dropout of one micro-batch, as a function of where it stands: nothing to save, nothing to restore."""
    value = 0
    for part in (seed, step, turn, rank):
        value = (value * 1_000_003 + part + 1) % 2**63
    return value


def stop_not_finite(config: Config, world: World, step: int, local_sum: float, keys: Sequence[str]) -> None:
    """All ranks stop before the optimizer moves; the error names the samples of the ranks where it broke.

    All of them are in the run folder's ``not_finite.json``.
    """
    parts = world.gather((math.isfinite(local_sum), list(keys)))

    def fail() -> None:
        assert parts is not None, "rank 0 gathers"
        named = [key for _, part in parts for key in part]
        what = "a gradient" if all(finite for finite, _ in parts) else "the loss"
        file = config.run.dir / "not_finite.json"
        write_json(file, {"step": step, "what": what, "keys": named})
        raise TrainError(
            f"{what} of step {step} is not finite; no weight was changed by it",
            got=", ".join(named[:64]),
            do=f"Lower optim.lr, lengthen optim.warmup_steps, or look at these samples (all: {file}).",
        )

    world.on_first_rank(fail)


def _votes(world: World, notice: Notice | None, save_is_late: Callable[[], bool]) -> Callable[[], tuple[float, ...]]:
    """Leave? Save? Any rank may be asked to leave; rank 0's clock alone says when a checkpoint is late."""
    return lambda: (notice is not None and notice.given, world.is_first and save_is_late())
