"""The photos of a ShardSet as ``pvtcap features`` shows them to the encoder: batches of views, decoded in processes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pvtcap import pixels
from pvtcap.config import DataConfig
from pvtcap.dist import World
from pvtcap.errors import ShardError
from pvtcap.loader import Work, load
from pvtcap.shardformat import FeatureFormat
from pvtcap.shardset import Sample, ShardReader, ShardSet

_AT_ONCE = 32  # views that go through the encoder together
_VIEWS = 100  # keeps these random numbers apart from those of ``order``
_LONGEST_KEY = 95  # a plain tar header has 100 bytes for KEY.json


def view_batches(
    source: ShardSet, features: FeatureFormat, shards: Sequence[int], data: DataConfig, world: World
) -> Iterator[ViewBatch]:
    """All samples of these shards, in order; decoded in worker processes, a few batches ahead.

    A batch never has samples of two shards, so it is the same whoever makes it. Raises ShardError, with its name, for
    a photo that cannot be read.
    """
    photos = _Photos(source, features, shards)
    return load(
        photos,
        range(len(photos.places)),
        workers=data.workers,
        timeout_s=data.worker_timeout_s,
        rank=world.rank,
        pin_memory=world.device.type == "cuda",
    )


def views_of(encoded: bytes, where: str, features: FeatureFormat, number: int) -> list[Tensor]:
    """The views of a photo, sample ``number`` of its ShardSet: uint8 (3, side, side) each."""
    side_px = features.image_px
    return [
        pixels.whole(encoded, where, side_px)
        if kind == "square"
        else pixels.augmented(
            encoded,
            where,
            side_px,
            features.crop_min_area,
            features.flip_probability,
            pixels.CropDraw.of(np.random.default_rng([features.seed, _VIEWS, view, number])),
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


class _Photos(Work[ViewBatch]):
    """Batch n is the samples from the n-th of ``places`` (shard, first) on, decoded."""

    def __init__(self, source: ShardSet, features: FeatureFormat, shards: Sequence[int]) -> None:
        self.source, self.features = source, features
        self.at_once = max(1, _AT_ONCE // len(features.views))
        self.places = [(shard, first) for shard in shards for first in range(0, source.sizes[shard], self.at_once)]
        self.starts = [0, *itertools.accumulate(source.sizes)]
        self.reader = ShardReader(source, max_open=2)  # it goes through them in order

    def make(self, number: int) -> ViewBatch:
        shard, first = self.places[number]
        samples, texts, photos = [], [], []
        for index in range(first, min(first + self.at_once, self.source.sizes[shard])):
            self.board.begin(self.reader.number(shard, index), fetching=self.source.mirror is not None)
            where = self.reader.where(shard, index)
            self.board.begin(where)
            sample = self.reader.read(shard, index)
            texts.append(self._text(sample, shard, index))
            photos += views_of(sample.photo, where, self.features, self.starts[shard] + index)
            samples.append(Sample(sample.key, sample.image_id, sample.captions, b"", 0, 0))
        return ViewBatch(samples, texts, pixels.stacked(photos))

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
