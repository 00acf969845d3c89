"""The frozen encoder's output for every photo of a ShardSet, stored once: a ShardSet of features to train from.

    OUT/OUT-000000.tar           KEY.npy (see ``featureformat``) and KEY.json, for each sample of the source's shard 0
    OUT/OUT-000000.index.json    written when the tar is whole
    OUT/manifest.json            last; its ``features`` says of which encoder they are, and how it was shown the photos

Shard numbers, the samples' order and their keys are the source's. Each rank takes whole shards, and photos are put
together to batches within a shard, so any number of ranks writes the same bytes; run again after it was stopped or
killed, it makes the shards that are not finished.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pvtcap import featureformat, pixels, weights
from pvtcap.buildreport import photos_progress
from pvtcap.candidate import Prepared
from pvtcap.config import Config
from pvtcap.dist import World
from pvtcap.encoder import Encoder
from pvtcap.errors import ConfigError, PvtcapError, ShardError
from pvtcap.featurefolder import FeatureFolder
from pvtcap.frozenencoder import TIMM
from pvtcap.processes import start_worker
from pvtcap.shardformat import FeatureFormat
from pvtcap.shardset import Manifest, Sample, ShardReader, ShardSet

BUILDER = "features"
_AT_ONCE = 32  # views that go through the encoder together
_VIEWS = 100  # keeps these random numbers apart from those of ``order``
_LONGEST_KEY = 95  # a plain tar header has 100 bytes for KEY.json


@dataclass(frozen=True)
class FeatureOptions:
    """``num_views`` counts the first one too, which is the whole photo."""

    num_views: int = 1
    dtype: Literal["fp16", "int8"] = "fp16"


def run(config: Config, data: Path, out: Path, world: World, options: FeatureOptions) -> Manifest:
    """Make the ShardSet ``out`` of features of the photos in ``data``; collective.

    Raises ConfigError where the encoder is not a frozen one, ShardError when a photo cannot be read (with its name),
    and when ``out`` holds something else.
    """
    source = world.on_first_rank(lambda: _open_source(config, data))
    encoder = Encoder(config.model.encoder, config.model.encoder_stages)
    weights.load_encoder(encoder, config)
    encoder.to(world.device).eval()
    features = describe(encoder, config, options)
    build = {
        "builder": BUILDER,
        "source": source.manifest.name,
        "source_sha256": hashlib.sha256(source.manifest.model_dump_json().encode()).hexdigest(),
    }
    folder = FeatureFolder(out, source, features, build)
    todo = world.on_first_rank(folder.start)
    mine = todo[world.rank :: world.size]
    num_photos = sum(source.sizes[shard] for shard in mine)
    with photos_progress(out.name, num_photos) if world.is_first else nullcontext(lambda done: None) as progress:
        made = encoded_samples(encoder, source, features, mine, config.data.workers, world)
        for shard in mine:
            progress(folder.write(shard, itertools.islice(made, source.sizes[shard])))
    world.barrier()  # every rank's shards are on disk
    return world.on_first_rank(folder.complete)


def describe(encoder: Encoder, config: Config, options: FeatureOptions) -> FeatureFormat:
    """What the manifest will say of the features of ``encoder``."""
    device = encoder.mean.device
    grid = _features_of(encoder, pixels.blank(config.data.image_px)[None].to(device)).shape
    source = config.model.encoder_weights
    return FeatureFormat(
        dtype=options.dtype,
        views=["square", *["augmented"] * (options.num_views - 1)],  # type: ignore[list-item]
        shape=(grid[1], grid[2], grid[3]),
        encoder=config.model.encoder,
        encoder_weights=source if source == TIMM else Path(source).name,
        encoder_sha256=encoder.fingerprint(),
        encoder_stages=config.model.encoder_stages,
        image_px=config.data.image_px,
        transform=featureformat.TRANSFORM,
        crop_min_area=config.data.crop_min_area,
        flip_probability=config.data.flip_probability,
        seed=config.run.seed,
    )


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


def encoded_samples(
    encoder: Encoder, source: ShardSet, features: FeatureFormat, shards: Sequence[int], workers: int, world: World
) -> Iterator[Prepared]:
    """The samples of these shards, in order, ready to store."""
    photos = _Photos(source, features)
    for batch in _load(photos, photos.places(shards), workers, world):
        found = _features_of(encoder, batch.photos.to(world.device, non_blocking=True)).numpy()
        views = found.reshape(len(batch.samples), len(features.views), *features.shape)
        for sample, text, each in zip(batch.samples, batch.texts, views, strict=True):
            where = f"{source.path}, sample {sample.key}"
            yield Prepared(sample.key, featureformat.encode(each, features, where), text, len(sample.captions))


@torch.inference_mode()
def _features_of(encoder: Encoder, photos: Tensor) -> Tensor:
    return encoder(photos).float().cpu()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Batch:
    """Some samples of a shard: ``photos`` (samples × views, 3, side, side) uint8, ``texts`` their KEY.json."""

    samples: list[Sample]
    texts: list[bytes]
    photos: Tensor

    def pin_memory(self) -> _Batch:
        """Called by torch's DataLoader where the device is a GPU."""
        return _Batch(self.samples, self.texts, self.photos.pin_memory())


class _Photos(Dataset["_Batch | PvtcapError"]):
    """Item (shard, first) is a batch of samples of that shard, decoded."""

    def __init__(self, source: ShardSet, features: FeatureFormat) -> None:
        self.source, self.features = source, features
        self.at_once = max(1, _AT_ONCE // len(features.views))
        self.starts = [0, *itertools.accumulate(source.sizes)]
        self.reader = ShardReader(source)

    def places(self, shards: Sequence[int]) -> list[tuple[int, int]]:
        return [(shard, first) for shard in shards for first in range(0, self.source.sizes[shard], self.at_once)]

    def __getitem__(self, place: tuple[int, int]) -> _Batch | PvtcapError:
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
        return _Batch(samples, texts, torch.stack(photos))

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


def _open_source(config: Config, data: Path) -> ShardSet:
    if "encoder" in config.train.what.split("+"):
        raise ConfigError(
            "features are of a frozen encoder, and this one learns",
            where="train.what",
            got=config.train.what,
            do="Leave '+encoder' away.",
        )
    if config.data.blank_photos:
        raise ConfigError("no features are made of grey pictures", where="data.blank_photos", got=True, wanted=False)
    source = ShardSet.open(data)
    if source.manifest.features is not None:
        raise ShardError("these are features already", where=data, do="Give --data a ShardSet of photos.")
    return source


def _load(photos: _Photos, places: Sequence[tuple[int, int]], workers: int, world: World) -> Iterator[_Batch]:
    """Decode these batches in worker processes, a few ahead, and hand them over in order."""
    # As in ``stream``: a fork would copy a process full of threads.
    context = multiprocessing.get_context("forkserver") if workers else None
    if context is not None:
        context.set_forkserver_preload([__name__])
    loader = DataLoader(
        photos,
        batch_size=None,
        sampler=places,
        num_workers=workers,
        multiprocessing_context=context,
        worker_init_fn=_start_worker if workers else None,
        pin_memory=world.device.type == "cuda",
    )
    for item in loader:
        if isinstance(item, PvtcapError):
            raise item
        yield item


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    start_worker()
