"""Shared memory in which worker processes hand over batches of photos, used again and again.

torch's DataLoader gives each batch fresh shared memory: its pages cost more time than decoding small photos does (0.46
of 0.55 ms a photo at 384 px, with all copies). Here a worker writes to one of a few slots and sends its number; the
receiver takes a copy, in memory of its own, pinned if that is wanted. Example::

    slots = Slots(workers=2, prefetch=2, photos=32, side_px=384)     # before the workers start; part of their dataset
    slot = slots.fill(photos)                                        # in a worker
    photos_B3HW = slots.take(slot)                                   # by the receiver, before it asks for another batch
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class Slot(NamedTuple):
    """Where a worker has left ``size`` photos."""

    worker: int
    number: int
    size: int


class Slots:
    """Room for ``prefetch`` + 1 batches of up to ``photos`` photos, (3, side, side) uint8 each, for each worker.

    A DataLoader that keeps the order asks a worker for at most ``prefetch`` batches ahead of the one it hands out, so
    the slots taken in turn never meet, if the receiver takes its copy before it asks for the next batch.
    """

    def __init__(self, workers: int, prefetch: int, photos: int, side_px: int) -> None:
        shape = workers, prefetch + 1, photos, side_px, side_px, 3
        self._rooms: Tensor = torch.empty(shape, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        self._next = 0  # each worker process counts its own

    def fill(self, photos: Sequence[Tensor]) -> Slot:
        """In a worker: copy photos (3, side, side) to its next slot."""
        worker = get_worker_info()
        assert worker is not None, "slots are filled by a DataLoader's workers"
        number = self._next
        self._next = (number + 1) % self._rooms.shape[1]
        room = self._rooms[worker.id, number]
        assert len(photos) <= len(room), f"{len(photos)} photos in a slot for {len(room)}"
        for place, photo in zip(room, photos, strict=False):
            place.copy_(photo.permute(1, 2, 0))
        return Slot(worker.id, number, len(photos))

    def take(self, slot: Slot, pin_memory: bool = False) -> Tensor:
        """(B, 3, side, side) uint8, channels_last, a copy."""
        room = self._rooms[slot.worker, slot.number, : slot.size]
        return torch.empty(room.shape, dtype=room.dtype, pin_memory=pin_memory).copy_(room).permute(0, 3, 1, 2)
