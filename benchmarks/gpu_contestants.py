"""What ``gpu.py`` measures: a part of it, in a process of its own. Prints nothing; writes a line a contestant.

    PYTHONPATH=benchmarks python -c 'import gpu_contestants; gpu_contestants.main()' SPEC.json OUT.jsonl

SPEC has the part's kind, a ``Size`` and the contestants, all as plain values. The first line of OUT says that the part
is ready; each of the others belongs to a contestant, in their order. A failure ends the process, its reason being the
last line: whoever ran out of GPU memory or lost its worker processes does not go on with what is left of them.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_data import data
from gpu_part import Found, Part, synchronize, timed
from torch import Tensor
from torch.nn import functional
from train_step import CAPTIONS, RowEach, steps_of, unpacked

from pvtcap import dryrun
from pvtcap.batch import Batch
from pvtcap.config import Config, batch_plan
from pvtcap.dist import World
from pvtcap.engine import deepspeed_dict, parameter_groups
from pvtcap.flops import StepFlops
from pvtcap.job import Job, make_tokenizer, prepare
from pvtcap.ledger import Ledger
from pvtcap.loader import Rooms
from pvtcap.monitor import StepStats
from pvtcap.rankmemory import Sizes, rank_memory
from pvtcap.sources import Sources
from pvtcap.stream import View, train_batches
from pvtcap.text import IGNORE
from pvtcap.train import start_engine, train_step


def _peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


def steps(part: Part) -> Iterator[Found]:
    """Training steps on batches that lie on the device: the loader has no part in it.

    The contestants share the loop ("engine", DeepSpeed's, or "packed" and "a row each", bare ones), stage, and compile.
    """
    one = part.contestants[0]
    with World.start() as world:
        config = part.config({**one, "input": "photos"})
        job = prepare(config, world, "none")
        bare = one["loop"] != "engine"
        step_of = _bare_steps(job, config, world, one["loop"]) if bare else _engine_steps(job, config, world)
        yield {"ready": True}
        for contestant in part.contestants:
            batches = _batches(part, contestant, job, world)
            step, size = step_of(batches), part.size
            seconds = timed(step, world.device, size["warm_up"], size["steps"])
            median, need = statistics.median(seconds), _need(config, job, contestant)
            # A caption a row needs no more than packed ones by its mathematics, and is given no more.
            flops = statistics.mean(need.total(len(one.photos), one.num_captions, one.num_labels) for one in batches)
            yield {
                **_rates(contestant["photos"], median, flops),
                "seconds": seconds,
                "memory_gib": _peak_gib(world.device),
                **({} if bare else {"planned_gib": _planned_gib(config, job, max(batches, key=_row_length))}),
            }
            del batches, step


def _row_length(batch: Batch) -> int:
    return batch.tokens.shape[1]


def _planned_gib(config: Config, job: Job, batch: Batch) -> float:
    """What ``pvtcap plan`` would say of this very batch on a GPU."""
    model = dryrun.meta_captioner(config, job.view.tokenizer.size)
    shape = tuple(batch.photos.shape[1:]) if batch.photos.is_floating_point() else None
    photos, tokens = len(batch.photos), int((batch.segments >= 0).sum())
    step = dryrun.step_bytes(
        model, photos, config.data.image_px, math.ceil(tokens / photos), batch.num_labels, features=shape
    )
    bucket = deepspeed_dict(config, job.plan)["zero_optimization"]["reduce_bucket_size"]
    planned = rank_memory(Sizes.of(model), step, config.zero.stage, config.precision, 1, bucket)
    return planned.gpu / 2**30


def _rates(photos: int, seconds: float, flops: float) -> Found:
    rates = {"photos_per_s": photos / seconds, "captions_per_s": photos * CAPTIONS / seconds}
    return {"step_s": seconds, **rates, "model_tflops": flops / seconds / 1e12}


def _need(config: Config, job: Job, contestant: dict[str, Any]) -> StepFlops:
    tokenizer = job.view.tokenizer
    return StepFlops.of(config, tokenizer.size, len(tokenizer.prefix), contestant["input"] == "features")


def _batches(part: Part, contestant: dict[str, Any], job: Job, world: World) -> list[Batch]:
    """Two of the stream's, since rows differ in length; larger ones than there are photos are put together."""
    photos, most = contestant["photos"], part.size["data_photos"]
    shown = part.config({**contestant, "photos": min(photos, most)}).data
    view = replace(job.view, data=shown)
    stream = train_batches(Sources.open(shown), view, batch_plan(shown, 1), world, seed=0, first_step=0)
    return [
        _together([batch.to(world.device) for batch in itertools.islice(stream, max(1, photos // most))])
        for _ in range(2)
    ]


def _together(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]

    def rows(name: str, fill: int) -> Tensor:
        each = [getattr(one, name) for one in batches]
        longest = max(one.shape[1] for one in each)
        return torch.cat([functional.pad(one, (0, longest - one.shape[1]), value=fill) for one in each])

    return Batch(
        torch.cat([one.photos for one in batches]), rows("tokens", 0), rows("labels", IGNORE),
        rows("predictors", 0), rows("positions", 0), rows("segments", -1), (), sum(one.num_captions for one in batches),
    )  # fmt: skip


StepOf = Callable[[list[Batch]], Callable[[], object]]


def _engine_steps(job: Job, config: Config, world: World) -> StepOf:
    engine = start_engine(job, config, world)

    def step_of(batches: list[Batch]) -> Callable[[], object]:
        turns = itertools.cycle([(batch, 1 / batch.num_labels) for batch in batches])

        def step() -> None:  # what ``train.train_step`` asks of the engine
            batch, scale = next(turns)
            engine.forward_backward(batch, scale)
            assert engine.gradients_are_finite()
            engine.step(0.1)

        return step

    return step_of


def _bare_steps(job: Job, config: Config, world: World, loop: str) -> StepOf:
    """Float32 weights, bf16 by autocast, torch's fused AdamW: what one writes without DeepSpeed."""

    def autocast(loss: Callable[..., Tensor], *given: Any) -> Tensor:
        with torch.autocast(world.device.type, torch.bfloat16):
            return loss(*given)

    if loop == "packed":
        ours = job.model.to(world.device)
        ours.train()

        def packed(batches: list[Batch]) -> Callable[[], object]:
            turns = itertools.cycle([(batch, batch.num_labels) for batch in batches])
            groups = parameter_groups(ours, config.optim)
            return steps_of(ours, groups, lambda: autocast(lambda batch, count: ours(batch) / count, *next(turns)))

        return packed
    model = RowEach(job.model, config.model.dropout).to(world.device)
    model.text.train()
    if config.train.compile:
        model.text.compile()

    def row_each(batches: list[Batch]) -> Callable[[], object]:
        # A photo, or its features, for each of its captions; on the device before the time begins.
        rows = [[one.to(world.device) for one in unpacked(batch, job.view.tokenizer)] for batch in batches]
        turns, learning = itertools.cycle(rows), [*model.text.parameters(), *model.projection.parameters()]
        return steps_of(model, learning, lambda: autocast(model, *next(turns)))

    return row_each


def loader(part: Part) -> Iterator[Found]:
    """Photos a second that ``train_batches`` delivers, pinned where there is a GPU; nobody trains meanwhile."""
    world = World.alone()
    yield {"ready": True}
    for contestant in part.contestants:
        config = part.config(contestant)
        sources = Sources.open(config.data)
        view = View(config.data, make_tokenizer(config, sources), config.text.max_tokens)
        batches = train_batches(sources, view, batch_plan(config.data, 1), world, seed=0, first_step=0)
        for _ in itertools.islice(batches, _made_ahead(contestant["workers"])):
            pass
        started, count = time.perf_counter(), 0
        while count < part.size["steps"] or time.perf_counter() - started < part.size["seconds"]:
            next(batches)
            count += 1
        yield {"photos_per_s": count * contestant["photos"] / (time.perf_counter() - started)}
        batches.close()  # type: ignore[attr-defined]  # its workers would go on beside the next contestant's


def _made_ahead(workers: int) -> int:
    """Batches that may lie ready, and one more of each worker: what comes behind them has been waited for."""
    return (Rooms.PREFETCH + 1) * workers + 1


def whole_loop(part: Part) -> Iterator[Found]:
    """``pvtcap.train.train_step`` on the stream, as ``pvtcap train`` calls it: without monitor and checkpoints."""
    (contestant,) = part.contestants
    config = part.config(contestant)
    with World.start() as world:
        job = prepare(config, world, "none")
        engine = start_engine(job, config, world)
        ledger = Ledger(config.run.dir, job.train, world, start_step=0, max_bad_fraction=0.0)
        yield {"ready": True}
        batches = train_batches(job.train, job.view, job.plan, world, seed=0, first_step=0)
        numbers = itertools.count(1)

        def step() -> StepStats:
            return train_step(engine, batches, ledger, job.plan, world, step=next(numbers), scale=0.1).stats

        for _ in range(part.size["warm_up"] + _made_ahead(contestant["workers"])):
            step()
        synchronize(world.device)
        started, seen = time.perf_counter(), list[StepStats]()
        while len(seen) < part.size["steps"] or time.perf_counter() - started < part.size["seconds"]:
            seen.append(step())
        synchronize(world.device)
        seconds = (time.perf_counter() - started) / len(seen)
        need = _need(config, job, contestant)
        flops = statistics.mean(need.total(one.photos, one.captions, one.tokens) for one in seen)
        waited = sum(one.data_wait_seconds for one in seen) / sum(one.seconds for one in seen)
        found = _rates(contestant["photos"], seconds, flops)
        yield {**found, "num_steps": len(seen), "wait_share": waited, "memory_gib": _peak_gib(world.device)}


KINDS = {"data": data, "steps": steps, "loader": loader, "whole loop": whole_loop}


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    part = Part(spec["kind"], Path(spec["folder"]), spec["size"], spec["contestants"])
    with Path(sys.argv[2]).open("w") as file:

        def tell(line: Found) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()  # a process that is killed has told what it had

        try:
            for found in KINDS[part.kind](part):
                tell(found)
        except Exception as error:
            tell({"problem": f"{type(error).__name__}: {error}"})
            raise
