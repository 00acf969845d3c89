"""A trace of some training steps of rank 0 (``train.profile_steps``), for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch.profiler import ProfilerActivity

from pvtcap.config import Config
from pvtcap.dist import World

_FIRST = 3  # steps left out: buffers are made in the first, and what is compiled is in the second


def profiled(steps: Iterable[int], config: Config, world: World) -> Iterator[int]:
    """The same steps; while those that are asked for go by, rank 0 is traced into RUN/profile/step_A-B.json.gz."""
    left = iter(steps)
    if config.train.profile_steps and world.is_first:
        yield from itertools.islice(left, _FIRST)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if world.device.type == "cuda" else [])]
        traced = []
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            for step in itertools.islice(left, config.train.profile_steps):
                yield step
                traced.append(step)
        if traced:
            folder = config.run.dir / "profile"
            folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"step_{traced[0]:08}-{traced[-1]:08}.json.gz"))
    yield from left
