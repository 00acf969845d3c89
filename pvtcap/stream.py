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
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pvtcap import featureformat, pixels
from pvtcap.batch import BadSample, Batch
from pvtcap.config import BatchPlan, DataConfig
from pvtcap.dist import World
from pvtcap.errors import ShardError
from pvtcap.loader import Rooms, Work, load
from pvtcap.order import Draws, Place
from pvtcap.readahead import ReadAhead
from pvtcap.shardformat import FeatureFormat
from pvtcap.shardset import Sample, ShardReader, ShardSet
from pvtcap.sources import SourceReader, Sources
from pvtcap.text import IGNORE, CaptionTokenizer

_MOST_OPEN = 400  # shards of a ShardSet in one process; the usual limit is 1,024 files, and some shards are two
_MOST_AHEAD = 64


@dataclass(frozen=True)
class View:
    """How the model is to see samples."""

    data: DataConfig
    tokenizer: CaptionTokenizer
    max_tokens: int

    def photo_bytes(self, shardset: ShardSet) -> int:
        """What a photo of it, or its features, take in a batch."""
        features = shardset.manifest.features
        return 3 * self.data.image_px**2 if features is None else 2 * math.prod(features.shape)

    def room(self, rooms: Rooms, photos: int, features: FeatureFormat | None) -> Tensor:
        """Where the photos of a batch go: uint8 (B, 3, side, side), channels_last; of features float16 (B, E, h, w)."""
        if features is not None:
            shape = photos, *features.shape
            return rooms.next(2 * math.prod(shape)).view(torch.float16).view(shape)
        side_px = self.data.image_px
        return rooms.next(photos * side_px * side_px * 3).view(photos, side_px, side_px, 3).permute(0, 3, 1, 2)

    def collate(self, photos: Tensor, samples: list[Sample], captions: Sequence[Sequence[str]]) -> Batch:
        """Rows without captions get one, empty, and no labels."""
        rows = self.tokenizer.pack([chosen or [""] for chosen in captions], self.max_tokens)
        for row, chosen in enumerate(captions):
            if not chosen:
                rows.labels[row] = IGNORE
        return Batch(
            photos=photos,
            tokens=torch.from_numpy(rows.tokens),
            labels=torch.from_numpy(rows.labels),
            predictors=torch.from_numpy(rows.predictors),
            positions=torch.from_numpy(rows.positions),
            segments=torch.from_numpy(rows.segments),
            samples=tuple(sample._replace(photo=b"") for sample in samples),
            num_captions=sum(map(len, captions)),
        )


def train_batches(
    sources: Sources,
    view: View,
    plan: BatchPlan,
    world: World,
    *,
    seed: int,
    first_step: int,
    lent: bool = False,
) -> Iterator[Batch]:
    """Endless micro-batches of this rank, ``plan.accumulation`` a step, beginning with step ``first_step`` (from 0).

    With ``lent`` their photos stay where a worker process has put them, and as they are until the next step's first
    batch is asked for; a copy of each would cost a third of what decoding small photos does.
    """
    work = _TrainBatches(sources, view, plan, world.rank, seed)
    numbers = itertools.count(first_step * plan.accumulation)
    batches = _load(work, numbers, view, world, lent=plan.accumulation if lent else 0)
    with ExitStack() as stack:
        ahead = [
            stack.enter_context(part) for part in _read_ahead(sources, view.data, work.slots, world, seed, first_step)
        ]
        for number, batch in enumerate(batches, start=first_step * plan.accumulation):
            for part in ahead:
                part.reached(number // plan.accumulation)
            yield batch


def whole_batches(
    shardset: ShardSet,
    view: View,
    micro_batch: int,
    world: World,
    *,
    even: bool,
    numbers: Sequence[int] | None = None,
    allow_missing: bool = False,
) -> Iterator[Batch]:
    """This rank's part of the whole set in storage order: photos uncropped, all captions, each sample exactly once.

    The set is cut into batches first and then dealt to ranks, so a batch is the same at any world size. With ``even``
    every rank gets as many batches as any other (each forward pass of ZeRO-3 is a collective): a rank with nothing left
    repeats the set's first batch without labels or samples. ``numbers`` are the batches to give instead of this rank's;
    with ``allow_missing`` a photo that cannot be read is in its batch's ``missing``, and not an error.
    """
    batches = _WholeBatches(shardset, view, micro_batch, allow_missing)
    mine = range(world.rank, len(batches), world.size) if numbers is None else numbers
    yield from _load(batches, mine, view, world)
    if even and len(mine) < -(-len(batches) // world.size):
        yield next(_load(batches, [0], view, world)).without_labels()


def _read_ahead(
    sources: Sources, data: DataConfig, slots: range, world: World, seed: int, first_step: int
) -> Iterator[AbstractContextManager[ReadAhead]]:
    """For each ShardSet at a URL, a thread that fetches what these slots will read."""
    # A cache that is full of what is to come has no room for what is in use.
    max_bytes = round(data.cache_gb * 1e9 / 4 / len(sources.shardsets) / world.local_size)
    for number, shardset in enumerate(sources.shardsets):
        if shardset.mirror is not None:
            needs = sources.order(data, seed).needs(first_step, slots)  # an order of its own: threads do not share one
            located = ((need.step, *sources.locate(need.source, need.shard)) for need in needs)
            mine = ((step, shard) for step, of, shard in located if of == number)
            yield ReadAhead(shardset, mine, max_bytes=max_bytes, max_shards=_MOST_AHEAD)


class _Batches(Work[Batch]):
    """``rooms`` is where workers leave the photos of their batches, each of at most ``room_bytes``."""

    rooms: Rooms
    room_bytes: int


class _Item(NamedTuple):
    """A sample that has been read; ``show`` writes it, as the model is to see it, to its place in the batch."""

    where: str
    sample: Sample
    captions: Sequence[str]
    show: Callable[[Tensor], object]


class _TrainBatches(_Batches):
    """Batch ``step * accumulation + turn`` is a micro-batch of one rank, whose slots are neighbours in the order."""

    def __init__(self, sources: Sources, view: View, plan: BatchPlan, rank: int, seed: int) -> None:
        self.view, self.plan, self.draws = view, plan, Draws(seed)
        of_rank = plan.accumulation * plan.micro_batch
        self.slots = range(rank * of_rank, (rank + 1) * of_rank)
        self.order = sources.order(view.data, seed)
        # The windows of its lanes, and a shard more of each where one ends; more would fill the cache for nothing.
        max_open = len(self.order.lanes(self.slots)) * (view.data.shuffle_window_shards + 1)
        self.reader = SourceReader(sources, min(max_open, _MOST_OPEN))
        self.room_bytes = plan.micro_batch * view.photo_bytes(sources.shardsets[0])

    def make(self, number: int) -> Batch:
        step, turn = divmod(number, self.plan.accumulation)
        first = step * self.plan.global_batch + self.slots.start + turn * self.plan.micro_batch
        places = [self.order.place(position) for position in range(first, first + self.plan.micro_batch)]
        # The first photo is decoded when all else is done: decoding drives everything out of the processor's caches, so
        # that reading takes three times as long between two photos as behind another's reading.
        items = [self._read(place) for place in places]
        photos = self.view.room(self.rooms, len(places), self.reader.features(places[0]))
        samples, captions, bad = [item.sample for item in items], [item.captions for item in items], []
        batch = self.view.collate(photos, samples, captions)
        for row, (item, photo) in enumerate(zip(items, photos, strict=True)):
            self.board.begin(item.where)
            try:
                item.show(photo)
            except pixels.UndecodablePhoto as error:
                bad.append(BadSample(places[row], item.where, item.sample.key, error.reason))
                photo[:], captions[row] = pixels.BLANK_LEVEL, []
        if bad:
            batch = self.view.collate(photos, samples, captions)
        return replace(batch, places=tuple(places), bad=tuple(bad))

    def _read(self, place: Place) -> _Item:
        self.board.begin(self.reader.number(place), fetching=self.reader.is_remote(place))
        where = self.reader.where(place)
        self.board.begin(where)
        sample, draw = self.reader.read(place), self.draws.at(place.position)
        captions = self._chosen_captions(sample, draw)
        return _Item(where, sample, captions, self._shown(sample, where, self.reader.features(place), draw))

    def _chosen_captions(self, sample: Sample, draw: np.random.Generator) -> Sequence[str]:
        most = self.view.data.captions_per_photo
        if len(sample.captions) <= most:
            return sample.captions
        return [sample.captions[number] for number in sorted(draw.permutation(len(sample.captions))[:most])]

    def _shown(
        self, sample: Sample, where: str, features: FeatureFormat | None, draw: np.random.Generator
    ) -> Callable[[Tensor], object]:
        data, encoded = self.view.data, sample.photo
        if features is not None:
            view = int(draw.integers(len(features.views)))
            return lambda photo: photo.copy_(featureformat.load(encoded, features, view, where))
        if data.blank_photos:
            return lambda photo: photo.fill_(pixels.BLANK_LEVEL)
        crop, least, flip = pixels.CropDraw.of(draw), data.crop_min_area, data.flip_probability
        return lambda photo: pixels.augmented(encoded, where, data.image_px, least, flip, crop, out=photo)


class _WholeBatches(_Batches):
    """Batch n is samples n * micro_batch … of the set in storage order."""

    def __init__(self, shardset: ShardSet, view: View, micro_batch: int, allow_missing: bool) -> None:
        self.shardset, self.view, self.micro_batch, self.allow_missing = shardset, view, micro_batch, allow_missing
        self.reader = ShardReader(shardset, max_open=2)  # it goes through them in order
        self.starts = np.cumsum([0, *shardset.sizes])
        self.room_bytes = min(micro_batch, shardset.num_samples) * view.photo_bytes(shardset)

    def __len__(self) -> int:
        return -(-self.shardset.num_samples // self.micro_batch)

    def make(self, number: int) -> Batch:
        first = number * self.micro_batch
        positions = range(first, min(first + self.micro_batch, self.shardset.num_samples))
        read: list[tuple[str, Sample]] = []
        samples: list[Sample] = []
        missing: list[tuple[str, str]] = []
        for position in positions:
            shard = int(np.searchsorted(self.starts, position, side="right")) - 1
            index = position - int(self.starts[shard])
            self.board.begin(self.reader.number(shard, index), fetching=self.shardset.mirror is not None)
            where = self.reader.where(shard, index)
            self.board.begin(where)
            with self._missed(self.reader.key(shard, index), missing):
                read.append((where, self.reader.read(shard, index)))
        photos = self.view.room(self.rooms, len(positions), self.shardset.manifest.features)
        for where, sample in read:
            self.board.begin(where)
            with self._missed(sample.key, missing):
                self._show(sample, where, photos[len(samples)])
                samples.append(sample)
        # A batch of which nothing could be read has one row without a sample.
        captions = [list(sample.captions) for sample in samples] or [[]]
        return replace(self.view.collate(photos[: len(captions)], samples, captions), missing=tuple(missing))

    @contextmanager
    def _missed(self, key: str, missing: list[tuple[str, str]]) -> Iterator[None]:
        """What cannot be read in here is noted, if that is allowed."""
        try:
            yield
        except ShardError as error:
            if not self.allow_missing:
                raise
            missing.append((key, str(error)))

    def _show(self, sample: Sample, where: str, photo: Tensor) -> None:
        side_px, features = self.view.data.image_px, self.shardset.manifest.features
        if features is not None:
            photo.copy_(featureformat.load(sample.photo, features, featureformat.SQUARE, where))
        elif self.view.data.blank_photos:
            photo[:] = pixels.BLANK_LEVEL
        else:
            pixels.whole(sample.photo, where, side_px, out=photo)


def _load(work: _Batches, numbers: Iterable[int], view: View, world: World, lent: int = 0) -> Iterator[Batch]:
    """The photos of the last ``lent`` batches may lie in the workers' rooms; with none, each batch has its own."""
    workers, on_gpu = view.data.workers, world.device.type == "cuda"
    work.rooms = Rooms(workers, work.room_bytes, max(lent, min(1, workers)))
    batches = load(
        work,
        numbers,
        workers=workers,
        timeout_s=view.data.worker_timeout_s,
        rank=world.rank,
        pin_memory=on_gpu,
    )
    for batch in batches:
        # Out of the worker's room before another batch is asked for; pinning has copied it already.
        yield batch if on_gpu or lent or not workers else replace(batch, photos=batch.photos.clone())
