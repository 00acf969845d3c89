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
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pvtcap import featureformat, pixels, weights
from pvtcap.buildreport import photos_progress
from pvtcap.candidate import Prepared
from pvtcap.config import Config, DataConfig
from pvtcap.dist import World
from pvtcap.encoder import Encoder
from pvtcap.errors import ConfigError, ShardError
from pvtcap.featurefolder import FeatureFolder
from pvtcap.frozenencoder import TIMM
from pvtcap.photoviews import view_batches
from pvtcap.shardformat import FeatureFormat
from pvtcap.shardset import Manifest, ShardSet
from pvtcap.sources import open_shardset

BUILDER = "features"


@dataclass(frozen=True)
class FeatureOptions:
    """``num_views`` counts the first one too, which is the whole photo."""

    num_views: int = 1
    dtype: Literal["fp16", "int8"] = "fp16"


def run(config: Config, data: str | Path, out: Path, world: World, options: FeatureOptions) -> Manifest:
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
    unfinished = world.on_first_rank(folder.start)
    mine = unfinished[world.rank :: world.size]
    num_photos = sum(source.sizes[shard] for shard in mine)
    with photos_progress(out.name, num_photos) if world.is_first else nullcontext(lambda done: None) as progress:
        made = encoded_samples(encoder, source, features, mine, config.data, world)
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


def encoded_samples(
    encoder: Encoder, source: ShardSet, features: FeatureFormat, shards: Sequence[int], data: DataConfig, world: World
) -> Iterator[Prepared]:
    """The samples of these shards, in order, ready to store."""
    for batch in view_batches(source, features, shards, data, world):
        found = _features_of(encoder, batch.photos.to(world.device, non_blocking=True)).numpy()
        views = found.reshape(len(batch.samples), len(features.views), *features.shape)
        for sample, text, each in zip(batch.samples, batch.texts, views, strict=True):
            where = f"{source.location}, sample {sample.key}"
            yield Prepared(sample.key, featureformat.encode(each, features, where), text, len(sample.captions))


@torch.inference_mode()
def _features_of(encoder: Encoder, photos: Tensor) -> Tensor:
    return encoder(photos).float().cpu()  # type: ignore[no-any-return]


def _open_source(config: Config, data: str | Path) -> ShardSet:
    if "encoder" in config.train.what.split("+"):
        raise ConfigError(
            "features are of a frozen encoder, and this one learns",
            where="train.what",
            got=config.train.what,
            do="Leave '+encoder' away.",
        )
    if config.data.blank_photos:
        raise ConfigError("no features are made of grey pictures", where="data.blank_photos", got=True, wanted=False)
    source = open_shardset(data, config.data)
    if source.manifest.features is not None:
        raise ShardError("these are features already", where=data, do="Give --data a ShardSet of photos.")
    return source
