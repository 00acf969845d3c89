"""pytest tests/test_slots.py"""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pvtcap.slots import Slot, Slots

PHOTOS, SIDE_PX = 3, 8


def photo(number: int) -> Tensor:
    """(3, side, side), no two alike nearby."""
    size = 3 * SIDE_PX * SIDE_PX
    return ((torch.arange(size) + number) % 256).to(torch.uint8).reshape(SIDE_PX, SIDE_PX, 3).permute(2, 0, 1)


class Batches(Dataset[Slot]):
    """Batch n is photos 3n, 3n + 1, 3n + 2; every fifth is one photo short."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots

    def __getitem__(self, number: int) -> Slot:
        return self.slots.fill(wanted(number))


def wanted(number: int) -> list[Tensor]:
    return [photo(PHOTOS * number + i) for i in range(PHOTOS - (number % 5 == 4))]


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 2)])
def test_no_batch_is_overwritten_before_it_is_taken(workers: int, prefetch: int) -> None:
    slots = Slots(workers, prefetch, PHOTOS, SIDE_PX)
    loader = DataLoader(
        Batches(slots),
        batch_size=None,
        sampler=range(40),
        num_workers=workers,
        prefetch_factor=prefetch,
        multiprocessing_context=multiprocessing.get_context("forkserver"),
    )
    taken = [slots.take(slot) for slot in loader]
    assert len(taken) == 40
    for number, batch in enumerate(taken):
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch, torch.stack(wanted(number)))
