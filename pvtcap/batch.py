"""A batch: what the stream makes and the model learns from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from pvtcap.loader import Placed
from pvtcap.order import Place
from pvtcap.shardset import Sample
from pvtcap.text import IGNORE

_ROWS = ("tokens", "labels", "predictors", "positions", "segments")
_TENSORS = ("photos", *_ROWS)


@dataclass(frozen=True)
class BadSample:
    """A sample whose photo cannot be decoded: where it stands, which it is, why."""

    place: Place
    where: str
    key: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B photos with their captions packed to T tokens a row.

    ``photos`` (B, 3, H, W) uint8, RGB, or their features (B, E, h, w) float16; ``tokens``, ``positions``, ``segments``
    (B, T), ``labels``, ``predictors`` (B, L) int64, see ``text``; ``samples`` as stored but without the photos' bytes;
    ``num_captions`` those packed here. In training ``places`` are the samples'; the row of a ``bad`` sample is a grey
    picture without labels, from which nothing is learned.
    """

    photos: Tensor
    tokens: Tensor
    labels: Tensor
    predictors: Tensor
    positions: Tensor
    segments: Tensor
    samples: tuple[Sample, ...]
    num_captions: int
    places: tuple[Place, ...] = ()
    bad: tuple[BadSample, ...] = ()
    missing: tuple[tuple[str, str], ...] = ()
    """(key, reason) of photos that could not be read, where those are allowed for; they are not in the tensors."""

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted: what a sum of losses is divided by."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> Self:
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS})

    def pin_memory(self) -> Self:
        """Called by torch's DataLoader where the device is a GPU."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS})

    def __reduce__(self) -> tuple[object, ...]:
        # A tensor on its way between processes is a file and a connection of its own: too much for so little.
        state = {name: getattr(self, name) for name in self.__dataclass_fields__}
        small = {name: state[name].numpy() for name in _ROWS}
        return _received, (type(self), Placed.of(self.photos), state | small | {"photos": None})

    def without_labels(self) -> Self:
        """The same shapes and no loss: keeps a rank in step when it has no batch left."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE), samples=(), num_captions=0)


def _received(kind: type[Batch], photos: Placed | Tensor, state: dict[str, Any]) -> Batch:
    large = photos.tensor() if isinstance(photos, Placed) else photos
    return kind(**(state | {name: torch.from_numpy(state[name]) for name in _ROWS} | {"photos": large}))
