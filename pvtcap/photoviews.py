"""The photos of a ShardSet as ``pvtcap features`` shows them to the encoder: batches of views, decoded in processes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pvtcap import pixels
from pvtcap.dist import World
from pvtcap.errors import PvtcapError, ShardError
from pvtcap.processes import start_worker
from pvtcap.shardformat import FeatureFormat
from pvtcap.shardset import Sample, ShardReader, ShardSet

_AT_ONCE = 32  # views that go through the encoder together
_VIEWS = 100  # keeps these random numbers apart from those of ``order``
_LONGEST_KEY = 95  # a plain tar header has 100 bytes for KEY.json


def view_batches(
    source: ShardSet, features: FeatureFormat, shards: Sequence[int], workers: int, world: World
) -> Iterator[ViewBatch]:
    """All samples of these shards, in order; decoded in worker processes, a few batches ahead.

    A batch never has samples of two shards, so it is the same whoever makes it. Raises ShardError, with its name, for
    a photo that cannot be read.
    """
    photos = _Photos(source, features)
    # As in ``stream``: a fork would copy a process full of threads.
    context = multiprocessing.get_context("forkserver") if workers else None
    if context is not None:
        context.set_forkserver_preload([__name__])
    loader = DataLoader(
        photos,
        batch_size=None,
        sampler=photos.places(shards),
        num_workers=workers,
        multiprocessing_context=context,
        worker_init_fn=_start_worker if workers else None,
        pin_memory=world.device.type == "cuda",
    )
    for item in loader:
        if isinstance(item, PvtcapError):
            raise item
        yield item


def views_of(photo: Tensor, features: FeatureFormat, number: int) -> list[Tensor]:
    """The views of a photo (3, H, W), sample ``number`` of its ShardSet: uint8 (3, side, side) each."""
    side_px = features.image_px
    return [
        pixels.square(photo, side_px)
        if kind == "square"
        else pixels.augmented(
            photo,
            side_px,
            features.crop_min_area,
            features.flip_probability,
            np.random.default_rng([features.seed, _VIEWS, view, number]),
        )
        for view, kind in enumerate(features.views)
    ]


@dataclass(frozen=True)
class ViewBatch:
    """Some samples of a shard: ``photos`` (samples × views, 3, side, side) uint8, ``texts`` their KEY.json."""

    samples: list[Sample]
    texts: list[bytes]
    photos: Tensor

    def pin_memory(self) -> ViewBatch:
        """Called by torch's DataLoader where the device is a GPU."""
        return ViewBatch(self.samples, self.texts, self.photos.pin_memory())


class _Photos(Dataset["ViewBatch | PvtcapError"]):
    """Item (shard, first) is a batch of samples of that shard, decoded."""

    def __init__(self, source: ShardSet, features: FeatureFormat) -> None:
        self.source, self.features = source, features
        self.at_once = max(1, _AT_ONCE // len(features.views))
        self.starts = [0, *itertools.accumulate(source.sizes)]
        self.reader = ShardReader(source)

    def places(self, shards: Sequence[int]) -> list[tuple[int, int]]:
        return [(shard, first) for shard in shards for first in range(0, self.source.sizes[shard], self.at_once)]

    def __getitem__(self, place: tuple[int, int]) -> ViewBatch | PvtcapError:
        shard, first = place
        samples, texts, photos = [], [], []
        try:
            for index in range(first, min(first + self.at_once, self.source.sizes[shard])):
                sample = self.reader.read(shard, index)
                texts.append(self._text(sample, shard, index))
                photo = pixels.decode(sample.photo, self.reader.where(shard, index))
                photos += views_of(photo, self.features, self.starts[shard] + index)
                samples.append(Sample(sample.key, sample.image_id, sample.captions, b"", 0, 0))
        except PvtcapError as error:  # as a value: it leaves a worker process as it is, not inside a traceback
            return error
        return ViewBatch(samples, texts, torch.stack(photos))

    def _text(self, sample: Sample, shard: int, index: int) -> bytes:
        """KEY.json: the source's own bytes; of a foreign tar, what stands beside it."""
        if len(sample.key.encode()) > _LONGEST_KEY:
            raise ShardError(
                "a key that is too long for a plain tar",
                where=self.reader.where(shard, index),
                got=f"{len(sample.key.encode())} bytes",
                wanted=_LONGEST_KEY,
            )
        if self.source.manifest.shards[shard].foreign is None:
            return self.reader.read_json(shard, index)
        text = {name: getattr(sample, name) for name in ("image_id", "captions", "width", "height", "source")}
        return json.dumps(text, ensure_ascii=False).encode()


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    start_worker()
