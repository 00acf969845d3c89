"""Samples → batches for one rank.

A batch is named by its number alone, so any worker process of any rank can make it, in any order: the stream's state
is one integer, and resuming is starting to count from there. Photos travel as uint8; the model normalises them on its
own device. Example::

    view = View(config.data, tokenizer, config.text.max_tokens)
    for batch in train_batches(Sources.open(config.data), view, plan, world, seed=0, first_step=0): ...
    for batch in whole_batches(ShardSet.open(path), view, 32, world, even=False): ...
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pvtcap import pixels
from pvtcap.config import BatchPlan, DataConfig
from pvtcap.dist import World
from pvtcap.loader import Work, load
from pvtcap.order import Place, generator
from pvtcap.shardset import Sample, ShardReader, ShardSet
from pvtcap.sources import SourceReader, Sources
from pvtcap.text import IGNORE, CaptionTokenizer, pad_rows

_TENSORS = ("photos", "tokens", "labels", "positions", "segments")


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

    ``photos`` (B, 3, H, W) uint8, RGB; ``tokens``, ``labels``, ``positions``, ``segments`` (B, T) int64, see ``text``;
    ``samples`` as stored but without the photos' bytes; ``num_captions`` those packed here. In training ``places`` are
    the samples'; the row of a ``bad`` sample is a grey picture without labels, from which nothing is learned.
    """

    photos: Tensor
    tokens: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor
    samples: tuple[Sample, ...]
    num_captions: int
    places: tuple[Place, ...] = ()
    bad: tuple[BadSample, ...] = ()

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted: what a sum of losses is divided by."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> Self:
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS})

    def pin_memory(self) -> Self:
        """Called by torch's DataLoader where the device is a GPU."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS})

    def without_labels(self) -> Self:
        """The same shapes and no loss: keeps a rank in step when it has no batch left."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE), samples=(), num_captions=0)


@dataclass(frozen=True)
class View:
    """How the model is to see samples."""

    data: DataConfig
    tokenizer: CaptionTokenizer
    max_tokens: int

    def collate(self, photos: list[Tensor], samples: list[Sample], captions: list[list[str]]) -> Batch:
        """Rows without captions get one, empty, and no labels."""
        packed = [self.tokenizer.pack(chosen or [""], self.max_tokens) for chosen in captions]
        rows = pad_rows(packed, self.tokenizer.pad_id)
        for row, chosen in enumerate(captions):
            if not chosen:
                rows.labels[row] = IGNORE
        return Batch(
            photos=pixels.stacked(photos),
            tokens=torch.from_numpy(rows.tokens),
            labels=torch.from_numpy(rows.labels),
            positions=torch.from_numpy(rows.positions),
            segments=torch.from_numpy(rows.segments),
            samples=tuple(replace(sample, photo=b"") for sample in samples),
            num_captions=sum(map(len, captions)),
        )


def train_batches(
    sources: Sources, view: View, plan: BatchPlan, world: World, *, seed: int, first_step: int
) -> Iterator[Batch]:
    """Endless micro-batches of this rank, ``plan.accumulation`` a step, beginning with step ``first_step`` (from 0)."""
    work = _TrainBatches(sources, view, plan, world.rank, seed)
    return _load(work, itertools.count(first_step * plan.accumulation), view, world)


def whole_batches(shardset: ShardSet, view: View, micro_batch: int, world: World, *, even: bool) -> Iterator[Batch]:
    """This rank's part of the whole set in storage order: photos uncropped, all captions, each sample exactly once.

    The set is cut into batches first and then dealt to ranks, so a batch is the same at any world size. With ``even``
    every rank gets as many batches as any other (each forward pass of ZeRO-3 is a collective): a rank with nothing left
    repeats the set's first batch without labels or samples.
    """
    batches = _WholeBatches(shardset, view, micro_batch)
    mine = range(world.rank, len(batches), world.size)
    yield from _load(batches, mine, view, world)
    if even and len(mine) < -(-len(batches) // world.size):
        yield next(_load(batches, [0], view, world)).without_labels()


class _TrainBatches(Work[Batch]):
    """Batch ``step * accumulation + turn`` is a micro-batch of one rank, whose slots are neighbours in the order."""

    def __init__(self, sources: Sources, view: View, plan: BatchPlan, rank: int, seed: int) -> None:
        self.view, self.plan, self.seed = view, plan, seed
        self.first_slot = rank * plan.accumulation * plan.micro_batch
        self.order = sources.order(view.data, seed)
        self.reader = SourceReader(sources)

    def make(self, number: int) -> Batch:
        step, turn = divmod(number, self.plan.accumulation)
        first = step * self.plan.global_batch + self.first_slot + turn * self.plan.micro_batch
        places = [self.order.place(position) for position in range(first, first + self.plan.micro_batch)]
        photos, samples, captions, bad = [], [], [], []
        for place in places:
            self.board.begin(self.reader.number(place))
            where = self.reader.where(place)
            self.board.begin(where)
            draw = generator(self.seed, place)
            sample = self.reader.read(place)
            chosen = self._chosen_captions(sample, draw)
            try:
                photo = self._photo(sample, where, draw)
            except pixels.UndecodablePhoto as error:
                bad.append(BadSample(place, where, sample.key, error.reason))
                photo, chosen = pixels.blank(self.view.data.image_px), []
            photos.append(photo)
            samples.append(sample)
            captions.append(chosen)
        return replace(self.view.collate(photos, samples, captions), places=tuple(places), bad=tuple(bad))

    def _chosen_captions(self, sample: Sample, draw: np.random.Generator) -> list[str]:
        chosen = draw.permutation(len(sample.captions))[: self.view.data.captions_per_photo]
        return [sample.captions[number] for number in sorted(chosen)]

    def _photo(self, sample: Sample, where: str, draw: np.random.Generator) -> Tensor:
        data = self.view.data
        if data.blank_photos:
            return pixels.blank(data.image_px)
        return pixels.augmented(sample.photo, where, data.image_px, data.crop_min_area, data.flip_probability, draw)


class _WholeBatches(Work[Batch]):
    """Batch n is samples n * micro_batch … of the set in storage order."""

    def __init__(self, shardset: ShardSet, view: View, micro_batch: int) -> None:
        self.shardset, self.view, self.micro_batch = shardset, view, micro_batch
        self.reader = ShardReader(shardset)
        self.starts = np.cumsum([0, *shardset.sizes])

    def __len__(self) -> int:
        return -(-self.shardset.num_samples // self.micro_batch)

    def make(self, number: int) -> Batch:
        first = number * self.micro_batch
        photos, samples = [], []
        for position in range(first, min(first + self.micro_batch, self.shardset.num_samples)):
            shard = int(np.searchsorted(self.starts, position, side="right")) - 1
            index = position - int(self.starts[shard])
            self.board.begin(self.reader.number(shard, index))
            where = self.reader.where(shard, index)
            self.board.begin(where)
            sample = self.reader.read(shard, index)
            photos.append(self._photo(sample, where))
            samples.append(sample)
        return self.view.collate(photos, samples, [list(sample.captions) for sample in samples])

    def _photo(self, sample: Sample, where: str) -> Tensor:
        side_px = self.view.data.image_px
        if self.view.data.blank_photos:
            return pixels.blank(side_px)
        return pixels.whole(sample.photo, where, side_px)


def _load(work: Work[Batch], numbers: Iterable[int], view: View, world: World) -> Iterator[Batch]:
    return load(
        work,
        numbers,
        workers=view.data.workers,
        timeout_s=view.data.worker_timeout_s,
        rank=world.rank,
        pin_memory=world.device.type == "cuda",
    )
