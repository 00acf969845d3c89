"""Which sample stands at which position of which epoch: pure functions of (seed, epoch, position).

The training stream is one endless line of positions 0, 1, 2, …; global batch n is positions n·G … n·G + G - 1 and
epoch e is positions e·N … e·N + N - 1, each of its N samples exactly once. Shards are shuffled, and samples within a
window of consecutive shuffled shards, so a seek to any position permutes one window and nothing else: its cost does not
grow with how far the run had come. World size and worker count do not occur here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Plan = tuple[NDArray[np.int64], NDArray[np.int64]]

_SHARDS, _SAMPLES, _AUGMENT = 0, 1, 2  # keep the random streams drawn for different purposes apart


class Place(NamedTuple):
    """A sample of a ShardSet at a position of an epoch."""

    epoch: int
    position: int  # within the epoch
    shard: int
    sample: int  # its number within the shard


class Order:
    """The order of a ShardSet with these shard ``sizes`` (in samples; zeros are fine), for all epochs."""

    def __init__(self, sizes: Sequence[int], *, seed: int, window_shards: int) -> None:
        self.seed, self.window_shards = seed, window_shards
        self.num_samples = sum(sizes)
        self._sizes = np.asarray(sizes, dtype=np.int64)
        assert self.num_samples > 0, "ShardSet.open refuses empty sets"
        # A stream moves forward, so the last epoch and the last window are all that is asked for again.
        self._epoch: tuple[int, Plan] | None = None
        self._window: tuple[tuple[int, int], Plan] | None = None

    def place(self, position: int) -> Place:
        """The sample at a position (>= 0) of the endless line."""
        epoch, within = divmod(position, self.num_samples)
        _, window_starts = self._epoch_plan(epoch)
        window = int(np.searchsorted(window_starts, within, side="right")) - 1
        shards, indices = self._window_plan(epoch, window)
        slot = within - int(window_starts[window])
        return Place(epoch, within, int(shards[slot]), int(indices[slot]))

    def _epoch_plan(self, epoch: int) -> Plan:
        """The epoch's shard order, and the position at which each window starts."""
        if self._epoch is not None and self._epoch[0] == epoch:
            return self._epoch[1]
        shards = np.random.default_rng([self.seed, _SHARDS, epoch]).permutation(len(self._sizes))
        counts = np.add.reduceat(self._sizes[shards], np.arange(0, len(shards), self.window_shards))
        plan = shards, np.concatenate([[0], np.cumsum(counts)[:-1]])
        self._epoch = epoch, plan
        return plan

    def _window_plan(self, epoch: int, window: int) -> Plan:
        """The shard and the index within it of each sample of one window, shuffled."""
        if self._window is not None and self._window[0] == (epoch, window):
            return self._window[1]
        first = window * self.window_shards
        shards = self._epoch_plan(epoch)[0][first : first + self.window_shards]
        chosen = np.repeat(shards, self._sizes[shards])
        indices = np.concatenate([np.arange(self._sizes[shard]) for shard in shards])
        shuffled = np.random.default_rng([self.seed, _SAMPLES, epoch, window]).permutation(len(chosen))
        plan = chosen[shuffled], indices[shuffled]
        self._window = (epoch, window), plan
        return plan


def generator(seed: int, place: Place) -> np.random.Generator:
    """The random numbers for choosing captions and augmenting the sample at ``place``, whoever decodes it."""
    return np.random.default_rng([seed, _AUGMENT, place.epoch, place.position])
