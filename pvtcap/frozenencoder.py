"""The encoder of a run that may be shown features in place of photos: are they its own, and is it needed at all?

    check(config, shown, trained)      before anything is built: ConfigError where features and configuration differ
    ready(model, config, shown)        the encoder's weights; or none, where all that is shown are features

The weights' fingerprint is in the features' manifest, so training and evaluation from features with pretrained timm
weights need no model hub. Where ``model.encoder_weights`` is a file, it is read and compared with the features.
"""

from __future__ import annotations

from collections.abc import Sequence

from pvtcap import weights
from pvtcap.captioner import Captioner
from pvtcap.config import Config
from pvtcap.errors import ConfigError
from pvtcap.featureformat import TRANSFORM
from pvtcap.shardset import ShardSet
from pvtcap.weightreport import Loaded

TIMM = "timm"


def check(config: Config, shown: Sequence[ShardSet], trained: Sequence[ShardSet] = ()) -> None:
    """ConfigError unless the features among ``shown`` are such as ``config`` would make of the photos.

    ``trained`` are those of ``shown`` that are trained on: their crops and mirrorings count too.
    """
    for shardset in shown:
        _check_one(config, shardset, shardset in trained)
    kinds = {shardset.manifest.features is None for shardset in trained}
    if len(kinds) > 1:
        raise ConfigError(
            "photos and features cannot be in one batch",
            where="data.train",
            got=", ".join(
                f"{each.location} ({'photos' if each.manifest.features is None else 'features'})" for each in trained
            ),
            do="Make features of all of them with 'pvtcap features', or train on photos only.",
        )


def ready(
    model: Captioner, config: Config, shown: Sequence[ShardSet], known_sha256: str | None = None
) -> Loaded | None:
    """Fill the encoder; or let it stand aside where all of ``shown`` are features, and nothing (None) was loaded.

    ``known_sha256`` is the fingerprint that it must have, where a checkpoint says it. ConfigError when features are of
    other weights.
    """
    formats = [shardset.manifest.features for shardset in shown]
    found = [features for features in formats if features is not None]
    all_features = bool(formats) and len(found) == len(formats)
    # Two files of one name may differ; what timm publishes under a name does not.
    from_timm = {features.encoder_weights for features in found} | {config.model.encoder_weights} == {TIMM}
    if all_features and (known_sha256 is not None or from_timm):
        sha256, loaded = known_sha256 or found[0].encoder_sha256, None
    else:
        loaded = weights.load_encoder(model.encoder, config)
        sha256 = model.encoder.fingerprint() if found else ""
    for shardset, features in zip(shown, formats, strict=True):
        if features is not None and features.encoder_sha256 != sha256:
            raise ConfigError(
                "features of other encoder weights",
                where=shardset.location,
                got=f"{features.encoder} {features.encoder_sha256}",
                wanted=f"{config.model.encoder} {sha256}",
                do="Point model.encoder_weights to the weights they were made with, or make them again.",
            )
    if all_features:
        model.encoder.stand_aside(sha256)
    return loaded


def _check_one(config: Config, shardset: ShardSet, is_trained: bool) -> None:
    features = shardset.manifest.features
    if features is None:
        return
    if "encoder" in config.train.what.split("+"):
        raise ConfigError(
            "features are of a frozen encoder, and this one learns",
            where=shardset.location,
            got=f"train.what={config.train.what}",
            do="Use photos, or leave '+encoder' away.",
        )
    if config.data.blank_photos:
        raise ConfigError("features cannot be blanked: only photos can", where=shardset.location, do="Use the photos.")
    pairs: dict[str, tuple[object, object]] = {
        "model.encoder": (features.encoder, config.model.encoder),
        "model.encoder_stages": (features.encoder_stages, config.model.encoder_stages),
        "data.image_px": (features.image_px, config.data.image_px),
        "transform": (features.transform, TRANSFORM),
    }
    if is_trained and len(features.views) > 1:
        pairs["data.crop_min_area"] = features.crop_min_area, config.data.crop_min_area
        pairs["data.flip_probability"] = features.flip_probability, config.data.flip_probability
    for key, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ConfigError(
                f"features made with another {key}",
                where=shardset.location,
                got=theirs,
                wanted=ours,
                do="Set it to what they were made with, or make them again with 'pvtcap features'.",
            )
