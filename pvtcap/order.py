"""Which sample stands at which position of the training stream: pure functions of (seed, position).

The stream is one endless line of positions 0, 1, 2, …; global batch n is positions n·G … n·G + G - 1. World size and
worker count do not occur here: a rank takes a range of the slots 0 … G - 1 of each batch.

* **Sources.** With weights, a fixed cycle of positions says which source each of them draws from, as evenly as the
  weights allow. Epoch e of a source of N samples is its draws e·N … e·N + N - 1: each sample exactly once.
* **Lanes.** Each slot belongs to one of L lanes, and neighbouring slots to the same or the next one. A source's shards
  stand in one shuffled line, the same for all epochs, and each lane owns a stretch of it: so a rank, and the machine it
  runs on, reads its own part of the data, in every epoch the same one (but for a few samples where stretches meet).
* **Windows.** In each epoch a lane goes through its shards in a new order, and samples are shuffled within a window of
  some shards. All lanes are read at once, so a batch mixes samples of L windows.

A seek is arithmetic and the permutation of one window a lane: it costs the same at any position.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pvtcap.errors import ConfigError

Ints = NDArray[np.int64]

# Keep the random streams drawn for different purposes apart.
_LINE, _SHARDS, _SAMPLES, _AUGMENT = 0, 1, 2, 3
_CYCLE = 1 << 14  # positions, at least: what weights are rounded to


class Place(NamedTuple):
    """The sample at a position: number ``sample`` of ``shard`` of ``source``, in that source's epoch ``epoch``."""

    position: int
    source: int
    epoch: int
    shard: int
    sample: int


class Need(NamedTuple):
    """A shard that some slots of the batches from ``step`` on (until their lane's next one) draw from."""

    step: int
    source: int
    shard: int


class Draws:
    """The random numbers for choosing captions and augmenting the sample at a position, whoever decodes it.

    One Philox for all (Salmon et al., 2011): its counter is the position. A generator of its own for each would take
    as long to make as its captions to pack.
    """

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, _AUGMENT]))
        self._state = self._generator.bit_generator.state

    def at(self, position: int) -> np.random.Generator:
        """Those of one position, from the first on; until the next call."""
        self._state["state"]["counter"][:] = 0, position, 0, 0
        self._generator.bit_generator.state = self._state
        return self._generator


class Cycle:
    """Which source each position draws from, repeated for ever: the arithmetic of draws, sources and lanes.

    ``global_batch`` G slots a step; lane l has the slots l·G/L … (l + 1)·G/L - 1, where ``num_lanes`` L is the largest
    divisor of G that is not above ``max_lanes``. Raises ConfigError for a weight too small to be drawn at all.
    """

    def __init__(self, weights: Sequence[float], *, global_batch: int, max_lanes: int) -> None:
        self.global_batch = global_batch
        self.num_lanes = max(n for n in range(1, min(max_lanes, global_batch) + 1) if global_batch % n == 0)
        steps = 1 if len(weights) == 1 else -(-_CYCLE // global_batch)
        self.length = steps * global_batch
        quotas = _apportion(weights, self.length)
        # The j-th of a source's q draws belongs at (j + 1/2) / q of the cycle; ties go to the first source.
        ideal = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in quotas])
        self.sources = np.repeat(np.arange(len(weights)), quotas)[np.argsort(ideal, kind="stable")]
        lanes = np.arange(self.length) % global_batch // (global_batch // self.num_lanes)
        self._of_source = [np.flatnonzero(self.sources == source) for source in range(len(weights))]
        self._of_lane = [
            [positions[lanes[positions] == lane] for lane in range(self.num_lanes)] for positions in self._of_source
        ]

    def source(self, position: int) -> int:
        return int(self.sources[position % self.length])

    def lane(self, position: int) -> int:
        return position % self.global_batch // (self.global_batch // self.num_lanes)

    def draws_before(self, position: int, source: int, lane: int | None = None) -> int:
        """How many positions below ``position`` draw from ``source`` (and belong to ``lane``)."""
        within = self._of_source[source] if lane is None else self._of_lane[source][lane]
        cycles, rest = divmod(position, self.length)
        return cycles * len(within) + int(within.searchsorted(rest))

    def position(self, draw: int, source: int, lane: int | None = None) -> int:
        """Where the draw with this number (from 0) from ``source`` (in ``lane``) stands: ``draws_before``, inverted."""
        within = self._of_source[source] if lane is None else self._of_lane[source][lane]
        cycles, rest = divmod(draw, len(within))
        return cycles * self.length + int(within[rest])


@dataclass(frozen=True, slots=True)
class _Epoch:
    """How one epoch of a source is dealt to lanes: where a lane's stretch starts in the line of shards, and its draws
    before this epoch; both have one entry more than there are lanes."""

    number: int
    starts: Ints
    earlier_draws: list[int]


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A lane's part of one epoch: pieces of shards in the order in which they are read, and the windows of them."""

    epoch: int
    shards: Ints
    firsts: Ints  # the first sample of each piece, within its shard
    ends: Ints  # running total of the pieces' lengths
    window_ends: Ints  # the same, at the end of each window


@dataclass(frozen=True, slots=True)
class _Window:
    epoch: int
    number: int
    shuffled: NDArray[np.uint32]


class _SourceOrder:
    """The order of one source with these shard ``sizes`` (in samples; zeros are fine)."""

    def __init__(self, number: int, sizes: Sequence[int], cycle: Cycle, seed: int, window_shards: int) -> None:
        self.number, self.cycle, self.seed, self.window_shards = number, cycle, seed, window_shards
        self.num_samples = sum(sizes)
        assert self.num_samples > 0, "ShardSet.open refuses empty sets"
        self._line = np.random.default_rng([seed, _LINE, number]).permutation(len(sizes))
        self._line_ends = np.cumsum(np.asarray(sizes, dtype=np.int64)[self._line])
        # A stream moves forward, so the last epoch, and of each lane the last window, are all that is asked for again.
        self._epoch: _Epoch | None = None
        self._stretches: dict[int, _Stretch] = {}
        self._windows: dict[int, _Window] = {}

    def place(self, position: int) -> Place:
        lane = self.cycle.lane(position)
        epoch = self.cycle.draws_before(position, self.number) // self.num_samples
        item = self.cycle.draws_before(position, self.number, lane) - self._dealt(epoch).earlier_draws[lane]
        stretch = self._stretch(epoch, lane)
        window = int(stretch.window_ends.searchsorted(item, side="right"))
        start = int(stretch.window_ends[window - 1]) if window else 0
        item = start + int(self._window(stretch, lane, window).shuffled[item - start])
        piece = int(stretch.ends.searchsorted(item, side="right"))
        before = int(stretch.ends[piece - 1]) if piece else 0
        return Place(
            position, self.number, epoch, int(stretch.shards[piece]), int(stretch.firsts[piece]) + item - before
        )

    def needs(self, position: int, lane: int) -> Iterator[Need]:
        """The shards that ``lane`` reads from ``position`` on, window by window, without end."""
        if not self.cycle.draws_before(self.cycle.length, self.number, lane):
            return  # the weights give this source nothing in this lane
        draw = self.cycle.draws_before(position, self.number, lane)
        while True:
            at = self.cycle.position(draw, self.number, lane)
            epoch = self.cycle.draws_before(at, self.number) // self.num_samples
            stretch, earlier = self._stretch(epoch, lane), self._dealt(epoch).earlier_draws[lane]
            window = int(stretch.window_ends.searchsorted(draw - earlier, side="right"))
            first = window * self.window_shards
            for shard in stretch.shards[first : first + self.window_shards]:
                yield Need(at // self.cycle.global_batch, self.number, int(shard))
            draw = earlier + int(stretch.window_ends[window])

    def _dealt(self, number: int) -> _Epoch:
        if self._epoch is None or self._epoch.number != number:
            cycle, lanes = self.cycle, range(self.cycle.num_lanes)
            begin, end = (cycle.position(epoch * self.num_samples, self.number) for epoch in (number, number + 1))
            earlier = [cycle.draws_before(begin, self.number, lane) for lane in lanes]
            counts = [cycle.draws_before(end, self.number, lane) - earlier[lane] for lane in lanes]
            self._epoch = _Epoch(number, np.cumsum([0, *counts]), earlier)
        return self._epoch

    def _stretch(self, epoch: int, lane: int) -> _Stretch:
        known = self._stretches.get(lane)
        if known is not None and known.epoch == epoch:
            return known
        start, end = map(int, self._dealt(epoch).starts[lane : lane + 2])
        first = int(self._line_ends.searchsorted(start, side="right"))
        last = int(self._line_ends.searchsorted(end, side="left"))
        pieces = np.arange(first, last + 1 if end > start else first)
        shard_starts = np.concatenate([[0], self._line_ends])[pieces]
        firsts = np.maximum(start, shard_starts)
        lengths = np.minimum(end, self._line_ends[pieces]) - firsts
        kept = lengths > 0
        pieces, shard_starts, firsts, lengths = pieces[kept], shard_starts[kept], firsts[kept], lengths[kept]
        shuffled = np.random.default_rng([self.seed, _SHARDS, self.number, epoch, lane]).permutation(len(pieces))
        ends = np.cumsum(lengths[shuffled])
        last_of_windows = (
            np.minimum(np.arange(0, len(pieces), self.window_shards) + self.window_shards, len(pieces)) - 1
        )
        stretch = _Stretch(
            epoch,
            self._line[pieces][shuffled],
            (firsts - shard_starts)[shuffled],
            ends,
            ends[last_of_windows],
        )
        self._stretches[lane] = stretch
        return stretch

    def _window(self, stretch: _Stretch, lane: int, number: int) -> _Window:
        known = self._windows.get(lane)
        if known is not None and (known.epoch, known.number) == (stretch.epoch, number):
            return known
        start = int(stretch.window_ends[number - 1]) if number else 0
        shuffled = np.arange(int(stretch.window_ends[number]) - start, dtype=np.uint32)
        np.random.default_rng([self.seed, _SAMPLES, self.number, stretch.epoch, lane, number]).shuffle(shuffled)
        self._windows[lane] = _Window(stretch.epoch, number, shuffled)
        return self._windows[lane]


class Order:
    """The order of some sources, each given by its shards' ``sizes`` in samples, drawn from by ``weights``.

    Two positions of one epoch of a source never hold the same sample; see the module for what else is promised.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        weights: Sequence[float],
        *,
        seed: int,
        global_batch: int,
        max_lanes: int,
        window_shards: int,
    ) -> None:
        self.cycle = Cycle(weights, global_batch=global_batch, max_lanes=max_lanes)
        self._sources = [
            _SourceOrder(number, of_source, self.cycle, seed, window_shards) for number, of_source in enumerate(sizes)
        ]

    def place(self, position: int) -> Place:
        """The sample at a position (>= 0) of the endless line."""
        return self._sources[self.cycle.source(position)].place(position)

    def lanes(self, slots: range) -> list[int]:
        """The lanes of these slots of each batch."""
        return sorted({self.cycle.lane(slot) for slot in slots})

    def needs(self, step: int, slots: range) -> Iterator[Need]:
        """The shards that these slots of the batches from ``step`` on read, in the order in which they are needed."""
        position = step * self.cycle.global_batch
        lanes = self.lanes(slots)
        of_lanes = (source.needs(position, lane) for source in self._sources for lane in lanes)
        return heapq.merge(*of_lanes, key=lambda need: need.step)


def _apportion(weights: Sequence[float], seats: int) -> list[int]:
    """Whole numbers in proportion to ``weights`` that sum to ``seats`` (largest remainders)."""
    exact = [weight * seats / sum(weights) for weight in weights]
    quotas = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda n: quotas[n] - exact[n])
    for number in by_remainder[: seats - sum(quotas)]:
        quotas[number] += 1
    if 0 in quotas:
        raise ConfigError(
            "a weight so small that its source would never be drawn",
            where="data.train",
            got=f"{weights[quotas.index(0)]:g} of {sum(weights):g}",
            wanted=f"at least 1 in {seats:,}",
        )
    return quotas
