"""Checkpoints, for reading: complete if and only if their manifest exists. ``saving`` writes them.

    checkpoints/step_00001000/
        deepspeed/                sharded optimizer and parameter state, one part a rank; frozen parameters left out
        trainable.safetensors     what training changed, whole, float32: all that evaluation needs
        vocab.txt, config.yaml    the vocabulary and the resolved configuration
        manifest.json             step, world, model identity, files with size and sha256; written last

Dropout is seeded from (seed, step, rank) and the stream's position is step × global_batch, so there is no random state
to keep: an unbroken run and a resumed one are the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from pvtcap import frozenencoder, jsonfile, weights
from pvtcap.captioner import Captioner
from pvtcap.config import Config
from pvtcap.configfile import parse
from pvtcap.errors import CheckpointError, PvtcapError
from pvtcap.shardset import MANIFEST, ShardSet, parse_json, sha256_file
from pvtcap.sources import TrainedOn
from pvtcap.stepfolders import latest
from pvtcap.text import CaptionTokenizer
from pvtcap.weightreport import SourceFile
from pvtcap.zerostate import consolidated

FORMAT = "pvtcap-checkpoint/2"
TRAINABLE, VOCAB, CONFIG, ENGINE = "trainable.safetensors", "vocab.txt", "config.yaml", "deepspeed"


class FileEntry(BaseModel):
    """A file of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size_bytes: NonNegativeInt
    sha256: str


class CheckpointManifest(BaseModel):
    """What a checkpoint says of itself. ``encoder_sha256`` is of a frozen encoder; ``weight_files`` are those whose
    weights the run began with.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str
    pvtcap: str
    step: NonNegativeInt
    num_samples_seen: NonNegativeInt
    world_size: PositiveInt
    global_batch: PositiveInt
    train_data: list[TrainedOn]
    config: dict[str, Any]
    encoder: str
    encoder_sha256: str | None
    files: dict[str, FileEntry]
    weight_files: tuple[SourceFile, ...] = ()

    @property
    def trainable_sha256(self) -> str:
        """Of the weights that training changed."""
        return self.files[TRAINABLE].sha256


class Checkpoint:
    """A complete checkpoint folder, opened for reading."""

    def __init__(self, path: Path, manifest: CheckpointManifest) -> None:
        self.path, self.manifest = path, manifest
        self.config: Config = parse(manifest.config, where=path / MANIFEST)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a checkpoint, or a run folder's latest; CheckpointError when there is none, or files are missing."""
        if not path.is_dir():
            raise CheckpointError("no such checkpoint folder", where=path)
        path = path.resolve() if path.is_symlink() else path  # checkpoints/best: which step is that?
        if not (path / MANIFEST).is_file():
            newest = latest(path / "checkpoints") or latest(path)
            if newest is None:
                raise CheckpointError(
                    f"no complete checkpoint here (no {MANIFEST})",
                    where=path,
                    do="Give a run folder, or one of its checkpoints/step_… folders.",
                )
            path = newest
        manifest = _read_manifest(path / MANIFEST)
        for name, entry in manifest.files.items():
            file, size = path / name, entry.size_bytes
            if name == TRAINABLE and not file.exists() and (path / ENGINE).is_dir():
                continue  # it can be made again from DeepSpeed's files, which are checked here too
            if not file.is_file() or file.stat().st_size != size:
                got = f"{file.stat().st_size:,} bytes" if file.is_file() else "nothing"
                raise CheckpointError(
                    "a checkpoint's file is damaged",
                    where=file,
                    got=got,
                    wanted=f"{size:,} bytes",
                    do="Use an older checkpoint of the run.",
                )
        return cls(path, manifest)

    def tokenizer(self) -> CaptionTokenizer:
        return CaptionTokenizer.from_file(self.path / VOCAB, self.config.text.prompt)

    def captioner(self, device: torch.device, shown: Sequence[ShardSet] = (), **model: str | None) -> Captioner:
        """The trained model, whole, in eval mode; fetches nothing that the checkpoint itself holds.

        Of ``shown``, what it is to caption, ShardSets of features need no encoder. ``model`` are keys of the
        configuration's model section that are not as they were, None: unchanged. The place of frozen weights may change
        (``encoder_weights="/elsewhere/pvt.pth"``): that they are the same is checked.
        """
        raw = not (self.path / TRAINABLE).exists()
        if not raw and sha256_file(self.path / TRAINABLE) != self.manifest.trainable_sha256:
            raise CheckpointError(
                "damaged weights (sha256 differs)",
                where=self.path / TRAINABLE,
                do="Use an older checkpoint of the run.",
            )
        given = {name: value for name, value in model.items() if value is not None}
        config = self.config.model_copy(update={"model": self.config.model.model_copy(update=given)})
        learned = config.train.what.split("+")
        # A frozen decoder may have weights that no file gave it, and the seed did.
        with weights.Undrawn() if "decoder" in learned else nullcontext():
            captioner = Captioner(config, self.tokenizer().size)
        if "encoder" not in learned:
            frozenencoder.ready(captioner, config, shown, self.manifest.encoder_sha256)
            check_encoder(captioner, self.manifest, self.path)
        if "decoder" not in learned:
            weights.load_decoder(captioner, config)
        if raw:
            names = captioner.trainable().keys()
            state = consolidated(self.path / ENGINE, config.zero.stage, config.precision, names)
            weights.copy_trained(captioner, state, self.path / ENGINE)
        else:
            weights.load_trained(captioner, self.path / TRAINABLE)
        return captioner.to(device).eval()

    def damage(self, rank: int = 0, num_ranks: int = 1) -> str | None:
        """What is wrong with the bytes of this rank's share of the files: each is read whole. None: nothing."""
        for name, entry in sorted(self.manifest.files.items())[rank::num_ranks]:
            file = self.path / name
            if file.exists() and sha256_file(file) != entry.sha256:  # open() has looked which may be missing
                return f"{file}: damaged (sha256 differs)"
        return None


def _read_manifest(path: Path) -> CheckpointManifest:
    """The manifest, if it is one of this version's format; CheckpointError says what else it is."""
    encoded, what, do = path.read_bytes(), "not a checkpoint's manifest", "It may be damaged."
    try:
        found = jsonfile.parse(encoded, path, CheckpointError, what, do)["format"]
    except (TypeError, KeyError):
        raise CheckpointError(what, where=path, do=do) from None
    if found != FORMAT:
        raise CheckpointError(
            "a checkpoint of another version of pvtcap",
            where=path,
            got=found,
            wanted=FORMAT,
            do="Use the pvtcap that wrote it, or a newer one.",
        )
    try:
        return parse_json(CheckpointManifest, encoded, path)
    except PvtcapError as error:
        raise CheckpointError(error.what, where=error.where) from None


def check_encoder(model: Captioner, manifest: CheckpointManifest, where: Path) -> None:
    """CheckpointError unless the frozen encoder is the one the checkpoint was trained on."""
    if manifest.encoder_sha256 is not None and (now := model.encoder.fingerprint()) != manifest.encoder_sha256:
        raise CheckpointError(
            "trained on other encoder weights",
            where=where,
            got=f"{model.encoder.name} {now[:12]}…",
            wanted=f"{manifest.encoder} {manifest.encoder_sha256[:12]}…",
            do="Point model.encoder_weights to the weights the run began with.",
        )
