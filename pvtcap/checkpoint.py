"""Checkpoints: complete if and only if their manifest exists.

    checkpoints/step_00001000/
        deepspeed/                sharded optimizer and parameter state, one part a rank; frozen parameters left out
        trainable.safetensors     what training changed, whole, float32: all that evaluation needs
        vocab.txt, config.yaml    the vocabulary and the resolved configuration
        manifest.json             step, world, model identity, files; written last

Dropout is seeded from (seed, step, rank) and the stream's position is step × global_batch, so there is no random state
to keep: an unbroken run and a resumed one are the same run.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from safetensors.torch import save_file

from pvtcap import __version__, frozenencoder, weights
from pvtcap.captioner import Captioner
from pvtcap.config import BatchPlan, Config
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.engine import Engine
from pvtcap.errors import CheckpointError, PvtcapError
from pvtcap.shardset import MANIFEST, ShardSet, parse_json, sha256_file, write_json
from pvtcap.sources import TrainedOn
from pvtcap.text import CaptionTokenizer
from pvtcap.weightreport import SourceFile
from pvtcap.zerostate import consolidated

FORMAT = "pvtcap-checkpoint/1"
TRAINABLE, VOCAB, CONFIG, ENGINE = "trainable.safetensors", "vocab.txt", "config.yaml", "deepspeed"


class CheckpointManifest(BaseModel):
    """What a checkpoint says of itself. ``files`` are sizes in bytes; ``encoder_sha256`` is of a frozen encoder;
    ``weight_files`` are those whose weights the run began with.
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
    trainable_sha256: str
    files: dict[str, NonNegativeInt]
    weight_files: tuple[SourceFile, ...] = ()


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
        if not (path / MANIFEST).is_file():
            newest = latest(path / "checkpoints") or latest(path)
            if newest is None:
                raise CheckpointError(
                    f"no complete checkpoint here (no {MANIFEST})",
                    where=path,
                    do="Give a run folder, or one of its checkpoints/step_… folders.",
                )
            path = newest
        try:
            manifest = parse_json(CheckpointManifest, (path / MANIFEST).read_bytes(), path / MANIFEST)
        except PvtcapError as error:
            raise CheckpointError(error.what, where=error.where) from None
        if manifest.format != FORMAT:
            raise CheckpointError("unknown format", where=path / MANIFEST, got=manifest.format, wanted=FORMAT)
        for name, size in manifest.files.items():
            file = path / name
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


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint below ``folder``, or None."""
    return max(_complete(folder), default=None)


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def save(
    engine: Engine,
    tokenizer: CaptionTokenizer,
    config: Config,
    plan: BatchPlan,
    world: World,
    *,
    step: int,
    train_data: list[TrainedOn],
    encoder_sha256: str | None,
    weight_files: tuple[SourceFile, ...] = (),
) -> Path:
    """Write a checkpoint (collective); returns its folder. Until it is whole it has another name."""
    final = step_folder(config.run.dir, step)
    partial = final.with_name(final.name + ".partial")
    world.on_first_rank(lambda: _empty(partial))
    engine.save(str(partial), ENGINE, {})
    state = engine.trainable_state()
    world.barrier()  # every rank's part is on disk

    def finish() -> None:
        assert state is not None, "rank 0 has the consolidated parameters"
        save_file(state, partial / TRAINABLE)
        tokenizer.save(partial / VOCAB)
        (partial / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        files = {
            str(file.relative_to(partial)): file.stat().st_size for file in sorted(partial.rglob("*")) if file.is_file()
        }
        manifest = CheckpointManifest(
            format=FORMAT,
            pvtcap=__version__,
            step=step,
            num_samples_seen=step * plan.global_batch,
            world_size=world.size,
            global_batch=plan.global_batch,
            train_data=train_data,
            config=config.model_dump(mode="json"),
            encoder=config.model.encoder,
            encoder_sha256=encoder_sha256,
            trainable_sha256=sha256_file(partial / TRAINABLE),
            files=files,
            weight_files=weight_files,
        )
        write_json(partial / MANIFEST, manifest.model_dump())
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        prune(final.parent, config.checkpoint.keep_last)

    world.on_first_rank(finish)
    return final


def find_resume(config: Config, resume: str) -> Checkpoint | None:
    """What ``--resume auto|none|PATH`` means for this run folder; called on rank 0. None: start anew."""
    newest = latest(config.run.dir / "checkpoints")
    if resume == "none":
        if newest is not None:
            raise CheckpointError(
                "the run folder already holds a run",
                where=config.run.dir,
                got=newest.name,
                do="Choose another run.dir, or go on with --resume auto.",
            )
        return None
    if resume != "auto":
        return Checkpoint.open(Path(resume))
    return None if newest is None else Checkpoint.open(newest)


def check_resumable(checkpoint: Checkpoint, config: Config, world: World, train_data: list[TrainedOn]) -> None:
    """CheckpointError where going on would silently be another run: another model, data, batch, world or ZeRO stage."""
    manifest, was = checkpoint.manifest, checkpoint.config
    pairs = {
        "model": (was.model, config.model),
        "text": (was.text, config.text),
        "train.what": (was.train.what, config.train.what),
        "run.seed": (was.run.seed, config.run.seed),
        "precision": (was.precision, config.precision),
        "zero.stage": (was.zero.stage, config.zero.stage),
        "data.global_batch": (was.data.global_batch, config.data.global_batch),
        "the training data": (_named(manifest.train_data), _named(train_data)),
        "the sources' weights": ([s.weight for s in was.data.train], [s.weight for s in config.data.train]),
        "data.lanes": (was.data.lanes, config.data.lanes),
        "data.shuffle_window_shards": (was.data.shuffle_window_shards, config.data.shuffle_window_shards),
        "number of ranks": (manifest.world_size, world.size),
    }
    for key, (before, now) in pairs.items():
        if before != now:
            changed = _changed_fields(before, now)
            raise CheckpointError(
                f"cannot resume: {key} is not what the checkpoint was made with",
                where=checkpoint.path,
                got=changed[1],
                wanted=changed[0],
                do="Set it back, or start another run.dir.",
            )


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest complete checkpoints, and what a killed save left behind."""
    for path in [*sorted(_complete(folder))[:-keep_last], *folder.glob("step_*.partial")]:
        shutil.rmtree(path)


def _complete(folder: Path) -> list[Path]:
    # A save may be killed between writing the manifest and renaming the folder; resuming repeats those steps.
    return [path.parent for path in folder.glob(f"step_*/{MANIFEST}") if path.parent.suffix != ".partial"]


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _named(train_data: list[TrainedOn]) -> str:
    return ", ".join(f"{of.name} ({of.num_samples:,} photos, manifest {of.manifest_sha256[:12]}…)" for of in train_data)


def _changed_fields(before: object, now: object) -> tuple[object, object]:
    if not isinstance(before, BaseModel) or not isinstance(now, BaseModel):
        return before, now
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    names = [name for name in old if old[name] != new[name]]
    return tuple(", ".join(f"{name}={tree[name]}" for name in names) for tree in (old, new))  # type: ignore[return-value]
