"""ShardSet → batches for one rank.

A batch is named by its number alone, so any worker process of any rank can make it, in any order: the stream's state
is one integer, and resuming is starting to count from there. Photos travel as uint8; the model normalises them on its
own device. Example::

    view = View(ShardSet.open(path), config.data, tokenizer, config.text.max_tokens)
    for batch in train_batches(view, plan, world, seed=0, first_step=0): ...
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pvtcap import pixels
from pvtcap.config import BatchPlan, DataConfig
from pvtcap.dist import World
from pvtcap.errors import PvtcapError, ShardError
from pvtcap.order import Order, Place, generator
from pvtcap.processes import start_worker
from pvtcap.shardset import Sample, ShardReader, ShardSet
from pvtcap.text import IGNORE, CaptionTokenizer, pad_rows

_TENSORS = ("photos", "tokens", "labels", "positions", "segments")


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B photos with their captions packed to T tokens a row.

    ``photos`` (B, 3, H, W) uint8, RGB; ``tokens``, ``labels``, ``positions``, ``segments`` (B, T) int64, see ``text``;
    ``samples`` as stored but without the photos' bytes; ``num_captions`` those packed here.
    """

    photos: Tensor
    tokens: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor
    samples: tuple[Sample, ...]
    num_captions: int
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

    def without_labels(self) -> Self:
        """The same shapes and no loss: keeps a rank in step when it has no batch left."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE), samples=(), num_captions=0)


@dataclass(frozen=True)
class View:
    """A ShardSet as the model is to see it."""

    shardset: ShardSet
    data: DataConfig
    tokenizer: CaptionTokenizer
    max_tokens: int

    def collate(self, photos: list[Tensor], samples: list[Sample], captions: list[list[str]]) -> Batch:
        rows = pad_rows([self.tokenizer.pack(chosen, self.max_tokens) for chosen in captions], self.tokenizer.pad_id)
        return Batch(
            photos=torch.stack(photos),
            tokens=torch.from_numpy(rows.tokens),
            labels=torch.from_numpy(rows.labels),
            positions=torch.from_numpy(rows.positions),
            segments=torch.from_numpy(rows.segments),
            samples=tuple(replace(sample, photo=b"") for sample in samples),
            num_captions=sum(map(len, captions)),
        )


def train_batches(view: View, plan: BatchPlan, world: World, *, seed: int, first_step: int) -> Iterator[Batch]:
    """Endless micro-batches of this rank, ``plan.accumulation`` a step, beginning with step ``first_step`` (from 0)."""
    return _load(_TrainBatches(view, plan, world.rank, seed), _count_from(first_step * plan.accumulation), view, world)


def whole_batches(
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
    batches = _WholeBatches(view, micro_batch, allow_missing)
    mine = range(world.rank, len(batches), world.size) if numbers is None else numbers
    yield from _load(batches, mine, view, world)
    if even and len(mine) < -(-len(batches) // world.size):
        yield _unwrap(batches[0]).without_labels()


class _TrainBatches(Dataset["Batch | PvtcapError"]):
    """Item ``step * accumulation + turn`` is a micro-batch of one rank."""

    def __init__(self, view: View, plan: BatchPlan, rank: int, seed: int) -> None:
        self.view, self.plan, self.rank, self.seed = view, plan, rank, seed
        self.order = Order(view.shardset.sizes, seed=seed, window_shards=view.data.shuffle_window_shards)
        self.reader = ShardReader(view.shardset)

    def __getitem__(self, number: int) -> Batch | PvtcapError:
        step, turn = divmod(number, self.plan.accumulation)
        first = step * self.plan.global_batch + (turn * self.plan.world_size + self.rank) * self.plan.micro_batch
        photos, samples, captions = [], [], []
        try:
            for position in range(first, first + self.plan.micro_batch):
                place = self.order.place(position)
                draw = generator(self.seed, place)
                sample = self.reader.read(place.shard, place.sample)
                captions.append(self._chosen_captions(sample, draw))
                photos.append(self._photo(sample, place, draw))
                samples.append(sample)
        except PvtcapError as error:
            return error
        return self.view.collate(photos, samples, captions)

    def _chosen_captions(self, sample: Sample, draw: np.random.Generator) -> list[str]:
        chosen = draw.permutation(len(sample.captions))[: self.view.data.captions_per_photo]
        return [sample.captions[number] for number in sorted(chosen)]

    def _photo(self, sample: Sample, place: Place, draw: np.random.Generator) -> Tensor:
        data = self.view.data
        if data.blank_photos:
            return pixels.blank(data.image_px)
        photo = pixels.decode(sample.photo, self.reader.where(place.shard, place.sample))
        return pixels.augmented(photo, data.image_px, data.crop_min_area, data.flip_probability, draw)


class _WholeBatches(Dataset["Batch | PvtcapError"]):
    """Item n is samples n * micro_batch … of the set in storage order."""

    def __init__(self, view: View, micro_batch: int, allow_missing: bool) -> None:
        self.view, self.micro_batch, self.allow_missing = view, micro_batch, allow_missing
        self.reader = ShardReader(view.shardset)
        self.starts = np.cumsum([0, *view.shardset.sizes])

    def __len__(self) -> int:
        return -(-self.view.shardset.num_samples // self.micro_batch)

    def __getitem__(self, number: int) -> Batch | PvtcapError:
        start = number * self.micro_batch
        photos, samples, missing = [], [], []
        try:
            for position in range(start, min(start + self.micro_batch, self.view.shardset.num_samples)):
                shard = int(np.searchsorted(self.starts, position, side="right")) - 1
                index = position - int(self.starts[shard])
                try:
                    sample = self.reader.read(shard, index)
                    photo = self._photo(sample, shard, index)
                except ShardError as error:
                    if not self.allow_missing:
                        raise
                    missing.append((self.reader.key(shard, index), str(error)))
                    continue
                samples.append(sample)
                photos.append(photo)
        except PvtcapError as error:
            return error
        if not photos:
            return replace(self.view.collate([pixels.blank(1)], [], [[""]]), missing=tuple(missing))
        batch = self.view.collate(photos, samples, [list(sample.captions) for sample in samples])
        return replace(batch, missing=tuple(missing))

    def _photo(self, sample: Sample, shard: int, index: int) -> Tensor:
        side_px = self.view.data.image_px
        if self.view.data.blank_photos:
            return pixels.blank(side_px)
        return pixels.square(pixels.decode(sample.photo, self.reader.where(shard, index)), side_px)


def _load(batches: Dataset[Batch | PvtcapError], numbers: Iterable[int], view: View, world: World) -> Iterator[Batch]:
    """Make the batches with these numbers in worker processes, a few ahead, and hand them over in order."""
    workers = view.data.workers
    # fork would copy a process full of threads (DeepSpeed's, CUDA's, gloo's) in an unknown state; a server that has
    # imported this module and nothing else starts a worker in milliseconds.
    context = multiprocessing.get_context("forkserver") if workers else None
    if context is not None:
        context.set_forkserver_preload([__name__])
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        multiprocessing_context=context,
        worker_init_fn=_start_worker if workers else None,
        pin_memory=world.device.type == "cuda",
    )
    for item in loader:
        yield _unwrap(item)


def _start_worker(worker: int) -> None:
    """Workers share the cores with the model; each is one thread.

    They end with the process they work for, however it ends: torch's own watch looks at the parent process, which is
    the fork server's and outlives a killed trainer.
    """
    torch.set_num_threads(1)
    start_worker()


def _unwrap(item: Batch | PvtcapError) -> Batch:
    # Errors leave a worker process as values, so that they arrive as they are and not inside a traceback.
    if isinstance(item, PvtcapError):
        raise item
    return item


def _count_from(first: int) -> Iterator[int]:
    while True:
        yield first
        first += 1
