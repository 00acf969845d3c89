"""pytest tests/test_order.py"""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pvtcap.order import Order, Place, generator

shard_sizes = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any)


@given(shard_sizes, st.integers(1, 5), st.integers(0, 3))
def test_each_epoch_holds_each_sample_exactly_once(sizes: list[int], window: int, seed: int) -> None:
    order = Order(sizes, seed=seed, window_shards=window)
    every = Counter((shard, index) for shard, size in enumerate(sizes) for index in range(size))
    for epoch in range(3):
        places = [order.place(epoch * sum(sizes) + position) for position in range(sum(sizes))]
        assert Counter((place.shard, place.sample) for place in places) == every
        assert {place.epoch for place in places} == {epoch}
        assert [place.position for place in places] == list(range(sum(sizes)))


@given(shard_sizes, st.integers(1, 5), st.lists(st.integers(0, 500), max_size=20))
def test_a_place_does_not_depend_on_what_was_asked_before(sizes: list[int], window: int, jumps: list[int]) -> None:
    wandering = Order(sizes, seed=7, window_shards=window)
    for position in jumps:
        assert wandering.place(position) == Order(sizes, seed=7, window_shards=window).place(position)


def test_epochs_and_seeds_differ_and_samples_mix_within_a_window_only() -> None:
    order = Order([100] * 8, seed=0, window_shards=4)
    epochs = [[order.place(epoch * 800 + position)[2:] for position in range(800)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert [order.place(p) for p in range(800)] != [
        Order([100] * 8, seed=1, window_shards=4).place(p) for p in range(800)
    ]
    first_window = {shard for shard, _ in epochs[0][:400]}
    assert len(first_window) == 4
    assert first_window.isdisjoint(shard for shard, _ in epochs[0][400:])
    # Shuffled well: the first tenth of a window already comes from each of its shards.
    assert {shard for shard, _ in epochs[0][:40]} == first_window


def test_random_numbers_belong_to_a_position_of_an_epoch() -> None:
    def draws(seed: int, epoch: int, position: int) -> list[float]:
        return list(generator(seed, Place(epoch, position, shard=0, sample=0)).random(3))

    assert draws(0, 1, 2) == draws(0, 1, 2)
    different = [draws(0, 1, 2), draws(1, 1, 2), draws(0, 2, 2), draws(0, 1, 3)]
    assert len(np.unique(different)) == 12
