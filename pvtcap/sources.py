"""What a run trains on: one ShardSet, or several, and the Order in which their samples are seen.

    sources = Sources.open(config.data)
    order = sources.order(config.data, seed=0)
    with SourceReader(sources) as reader:
        sample = reader.read(order.place(position=1234))

Without weights all ShardSets together are one source, so that an epoch holds every photo of all of them once. With
weights each is a source with epochs of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, PositiveInt

from pvtcap.config import DataConfig
from pvtcap.errors import ConfigError
from pvtcap.order import Order, Place
from pvtcap.shardcache import ShardCache
from pvtcap.shardformat import FeatureFormat
from pvtcap.shardset import MANIFEST, Sample, ShardReader, ShardSet, sha256_file


class TrainedOn(BaseModel):
    """A ShardSet that a run trains on; the sha256 is that of its manifest, which holds those of its shards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    num_samples: PositiveInt
    manifest_sha256: str


@dataclass(frozen=True)
class Sources:
    """Open ShardSets; ``weights``, one each, are None where all of them are one source."""

    shardsets: tuple[ShardSet, ...]
    weights: tuple[float, ...] | None

    @classmethod
    def open(cls, data: DataConfig) -> Self:
        """What ``data.train`` names. Raises ConfigError where it names nothing, ShardError where it is no ShardSet."""
        if not data.train:
            raise ConfigError("no training data", where="data.train", do="Give a shard folder: data.train=DIR.")
        shardsets = tuple(open_shardset(source.path, data) for source in data.train)
        weights = [source.weight for source in data.train if source.weight is not None]
        return cls(shardsets, tuple(weights) or None)

    @property
    def num_samples(self) -> int:
        return sum(shardset.num_samples for shardset in self.shardsets)

    @property
    def sizes(self) -> list[list[int]]:
        """Samples in each shard of each source."""
        each = [shardset.sizes for shardset in self.shardsets]
        return each if self.weights else [[size for sizes in each for size in sizes]]

    def order(self, data: DataConfig, seed: int) -> Order:
        return Order(
            self.sizes,
            self.weights or (1.0,),
            seed=seed,
            global_batch=data.global_batch,
            max_lanes=data.lanes,
            window_shards=data.shuffle_window_shards,
        )

    def locate(self, source: int, shard: int) -> tuple[int, int]:
        """Which ShardSet a shard of a source belongs to, and its number there."""
        if self.weights:
            return source, shard
        number = bisect_right(self._firsts, shard) - 1
        return number, shard - self._firsts[number]

    @cached_property
    def _firsts(self) -> list[int]:
        """The number of each ShardSet's first shard, counted over all of them."""
        return [0, *accumulate(len(shardset.sizes) for shardset in self.shardsets)][:-1]

    def file(self, source: int, shard: int) -> str:
        """The tar of a shard, for messages."""
        number, of_set = self.locate(source, shard)
        shardset = self.shardsets[number]
        return f"{shardset.location}/{shardset.manifest.shards[of_set].file}"

    def captions(self) -> Iterator[tuple[str, ...]]:
        """All samples' captions, without reading a photo."""
        for shardset in self.shardsets:
            yield from shardset.captions()

    @property
    def names(self) -> list[str]:
        """Of the ShardSets; those that have the same one are told apart by their place in the list."""
        names = [shardset.manifest.name for shardset in self.shardsets]
        return [f"{name}_{place}" if names.count(name) > 1 else name for place, name in enumerate(names)]

    def describe(self) -> list[TrainedOn]:
        """What tells whether a later run has the same data, wherever it lies."""
        return [
            TrainedOn(
                name=shardset.manifest.name,
                num_samples=shardset.num_samples,
                manifest_sha256=sha256_file(shardset.path / MANIFEST),
            )
            for shardset in self.shardsets
        ]


def open_shardset(location: str | Path, data: DataConfig) -> ShardSet:
    """The ShardSet in a folder or at a URL, fetched to the cache that ``data`` names. Raises ShardError."""
    return ShardSet.open(location, ShardCache.of(data.cache_dir, data.cache_gb))


class SourceReader:
    """Reads the samples of some Sources; one a process. Of each ShardSet, ``max_open`` shards stay open."""

    def __init__(self, sources: Sources, max_open: int) -> None:
        self.sources = sources
        self._readers = [ShardReader(shardset, max_open) for shardset in sources.shardsets]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for reader in self._readers:
            reader.close()

    def read(self, place: Place) -> Sample:
        number, shard = self.sources.locate(place.source, place.shard)
        return self._readers[number].read(shard, place.sample)

    def features(self, place: Place) -> FeatureFormat | None:
        """What is stored in place of the photo, if anything is."""
        return self.sources.shardsets[self.sources.locate(place.source, place.shard)[0]].manifest.features

    def is_remote(self, place: Place) -> bool:
        return self.sources.shardsets[self.sources.locate(place.source, place.shard)[0]].mirror is not None

    def where(self, place: Place) -> str:
        """The shard and the key, for messages."""
        number, shard = self.sources.locate(place.source, place.shard)
        return self._readers[number].where(shard, place.sample)

    def number(self, place: Place) -> str:
        """The same, known before anything of the shard has been read."""
        number, shard = self.sources.locate(place.source, place.shard)
        return self._readers[number].number(shard, place.sample)
