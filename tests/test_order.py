"""pytest tests/test_order.py"""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvtcap.errors import ConfigError
from pvtcap.order import Cycle, Draws, Order

sizes_of_a_source = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any)


@dataclass(frozen=True)
class Setting:
    """All that decides an order."""

    sizes: list[list[int]]
    weights: list[float]
    seed: int
    global_batch: int
    max_lanes: int
    window_shards: int

    def order(self) -> Order:
        return Order(
            self.sizes,
            self.weights,
            seed=self.seed,
            global_batch=self.global_batch,
            max_lanes=self.max_lanes,
            window_shards=self.window_shards,
        )


@st.composite
def settings_of_orders(draw: st.DrawFn) -> Setting:
    sizes = draw(st.lists(sizes_of_a_source, min_size=1, max_size=3))
    return Setting(
        sizes,
        draw(st.lists(st.floats(0.05, 1), min_size=len(sizes), max_size=len(sizes))),
        draw(st.integers(0, 3)),
        draw(st.integers(1, 24)),
        draw(st.integers(1, 30)),
        draw(st.integers(1, 5)),
    )


@given(settings_of_orders(), st.integers(0, 40))
@settings(deadline=None)
def test_each_epoch_of_each_source_holds_each_sample_exactly_once(chosen: Setting, first_step: int) -> None:
    order = chosen.order()
    first = first_step * chosen.global_batch
    drawn: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for position in range(first + 4 * sum(map(sum, chosen.sizes))):
        place = order.place(position)
        assert place.position == position
        drawn.setdefault((place.source, place.epoch), []).append((place.shard, place.sample))
    for source, sizes in enumerate(chosen.sizes):
        every = Counter((shard, sample) for shard, size in enumerate(sizes) for sample in range(size))
        epochs = sorted(epoch for of, epoch in drawn if of == source)
        assert epochs == list(range(len(epochs)))
        for epoch in epochs[:-1]:
            assert Counter(drawn[source, epoch]) == every
        if epochs:  # the last is still open
            assert not Counter(drawn[source, epochs[-1]]) - every


@given(settings_of_orders(), st.lists(st.integers(0, 500), max_size=20))
@settings(deadline=None)
def test_a_place_does_not_depend_on_what_was_asked_before(chosen: Setting, jumps: list[int]) -> None:
    wandering = chosen.order()
    for position in jumps:
        assert wandering.place(position) == chosen.order().place(position)


@given(settings_of_orders(), st.integers(0, 12), st.data())
@settings(deadline=None)
def test_what_will_be_read_is_foretold_in_the_order_in_which_it_is(
    chosen: Setting, first_step: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, chosen.global_batch - 1))
    slots = range(start, data.draw(st.integers(start + 1, chosen.global_batch)))
    order = chosen.order()
    needs = itertools.takewhile(lambda need: need.step < first_step + 12, chosen.order().needs(first_step, slots))
    steps: dict[tuple[int, int], int] = {}
    last = 0
    for need in needs:
        assert need.step >= last
        last = need.step
        steps.setdefault((need.source, need.shard), need.step)
    for step in range(first_step, first_step + 12):
        for slot in slots:
            place = order.place(step * chosen.global_batch + slot)
            assert steps[place.source, place.shard] <= step


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None)
def test_a_cycle_counts_what_it_draws(weights: list[float], global_batch: int, max_lanes: int) -> None:
    cycle = Cycle(weights, global_batch=global_batch, max_lanes=max_lanes)
    drawn: Counter[int | tuple[int, int]] = Counter()
    seam = 1000 * cycle.length
    for position in [*range(200), *range(seam - 5, seam + 5)]:
        source, lane = cycle.source(position), cycle.lane(position)
        if position < 200:
            assert cycle.draws_before(position, source) == drawn[source]
            assert cycle.draws_before(position, source, lane) == drawn[source, lane]
            drawn[source] += 1
            drawn[source, lane] += 1
        assert cycle.position(cycle.draws_before(position, source), source) == position
        assert cycle.position(cycle.draws_before(position, source, lane), source, lane) == position


def test_batches_hold_the_sources_by_weight() -> None:
    order = Order([[500], [100, 100], [900]], [6, 3, 1], seed=0, global_batch=50, max_lanes=8, window_shards=2)
    for step in range(40):
        counts = Counter(order.place(step * 50 + slot).source for slot in range(50))
        assert all(abs(counts[source] - wanted) <= 1 for source, wanted in enumerate((30, 15, 5)))


def test_a_weight_that_would_never_be_drawn_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weight so small .* got 1e-06 of 1; wanted at least 1 in"):
        Cycle([1, 1e-6], global_batch=8, max_lanes=8)


def many_shards() -> Setting:
    return Setting([[10] * 320], [1.0], 0, 64, 32, 2)


def test_epochs_and_seeds_differ_and_neighbours_come_from_far_apart() -> None:
    chosen = many_shards()
    order = chosen.order()
    epochs = [[order.place(epoch * 3200 + n)[3:] for n in range(3200)] for epoch in range(2)]
    other = Setting(chosen.sizes, chosen.weights, 1, 64, 32, 2).order()
    assert epochs[0] != epochs[1]
    assert epochs[0] != [other.place(n)[3:] for n in range(3200)]
    # A batch holds samples of every lane, and of each lane's window.
    assert len({shard for shard, _ in epochs[0][:64]}) >= 32
    # A lane's window is mixed: its samples are not in the shards' order.
    lane = [epochs[0][step * 64] for step in range(10)]
    assert lane != sorted(lane)
    assert len({shard for shard, _ in lane}) == 2


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_a_rank_reads_its_own_shards_in_every_epoch(num_ranks: int) -> None:
    order, per_rank = many_shards().order(), 64 // num_ranks
    read: list[list[set[int]]] = [[set(), set()] for _ in range(num_ranks)]
    for position in range(2 * 3200):
        read[position % 64 // per_rank][position // 3200].add(order.place(position).shard)
    for first, second in read:
        assert first == second  # 3,200 is a multiple of 64: not even the ends of the stretches move
    assert sum(len(first) for first, _ in read) <= 320 + num_ranks  # a stretch ends within a shard, at most


def test_a_rank_reads_few_shards_at_a_time() -> None:
    needs = many_shards().order().needs(0, range(64))
    first = list(itertools.takewhile(lambda need: need.step == 0, needs))
    assert len(first) == 32 * 2


def test_seeking_far_touches_one_window() -> None:
    order = Order([[1000] * 12_000], [1.0], seed=0, global_batch=64, max_lanes=32, window_shards=2)
    order.place(11_000_017)
    (source,) = order._sources
    assert [len(window.shuffled) for window in source._windows.values()] == [2000]


def test_random_numbers_belong_to_a_position() -> None:
    def draws(seed: int, position: int) -> list[float]:
        return list(Draws(seed).at(position).random(3))

    assert draws(0, 2) == draws(0, 2)
    assert len(np.unique([draws(0, 2), draws(1, 2), draws(0, 3)])) == 9
    again = pickle.loads(pickle.dumps(Draws(0)))
    for position in (3, 2, 2):  # in any order, and whatever was drawn before
        again.at(position).random(dtype=np.float32)
        assert list(again.at(position).random(3)) == draws(0, position)
