"""Going on: which checkpoint of a run folder to go on from, and whether that is the same run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from pvtcap.checkpoint import Checkpoint
from pvtcap.config import Config
from pvtcap.dist import World
from pvtcap.errors import CheckpointError
from pvtcap.sources import TrainedOn
from pvtcap.stepfolders import complete


@dataclass(frozen=True)
class Found:
    """What to go on from (None: start anew), and a line for each newer checkpoint that cannot be used."""

    checkpoint: Checkpoint | None
    refused: tuple[str, ...] = ()


def find(config: Config, resume: str, world: World) -> Found:
    """What ``--resume auto|none|PATH`` means for this run folder; collective, every byte read, each rank a share.

    ``auto`` takes the newest that is whole, and raises CheckpointError when there are some and none is: to start anew
    in silence would throw the run away.
    """
    candidates = world.on_first_rank(lambda: _candidates(config, resume))
    refused: list[str] = []
    for path in candidates:
        found = world.on_first_rank(lambda path=path: _open(path))  # type: ignore[misc]  # mypy cannot type defaults
        if isinstance(found, Checkpoint):
            damaged = _damage(found, world)
            if damaged is None:
                return Found(found, tuple(refused))
            refused.append(damaged)
        else:
            refused.append(found)
    if refused:
        raise _told_once(
            CheckpointError(
                "no checkpoint to go on from is whole",
                where=config.run.dir if resume == "auto" else resume,
                got="; ".join(refused),
                do="Restore one, or choose another run.dir.",
            ),
            world,
        )
    return Found(None)


def _candidates(config: Config, resume: str) -> list[Path]:
    """Newest first; of a PATH that one alone."""
    present = complete(config.run.dir / "checkpoints")
    if resume == "none":
        if present:
            raise CheckpointError(
                "the run folder already holds a run",
                where=config.run.dir,
                got=present[-1].name,
                do="Choose another run.dir, or go on with --resume auto.",
            )
        return []
    if resume != "auto":
        return [Checkpoint.open(Path(resume)).path]
    return present[::-1]


def _open(path: Path) -> Checkpoint | str:
    try:
        return Checkpoint.open(path)
    except CheckpointError as error:
        return str(error)


def _damage(found: Checkpoint, world: World) -> str | None:
    reasons = world.broadcast(world.gather(found.damage(world.rank, world.size)))
    assert reasons is not None, "rank 0 gathers"
    return next((reason for reason in reasons if reason is not None), None)


def _told_once(error: CheckpointError, world: World) -> CheckpointError:
    error.told = not world.is_first
    return error


def check_resumable(checkpoint: Checkpoint, config: Config, train_data: list[TrainedOn]) -> None:
    """CheckpointError where going on would silently be another run: another model, data or batch.

    Another number of ranks, ZeRO stage or micro-batch is the same run on other machines.
    """
    manifest, was = checkpoint.manifest, checkpoint.config
    pairs = {
        "model": (was.model, config.model),
        "text": (was.text, config.text),
        "train.what": (was.train.what, config.train.what),
        "run.seed": (was.run.seed, config.run.seed),
        "precision": (was.precision, config.precision),
        "data.global_batch": (was.data.global_batch, config.data.global_batch),
        "the training data": (_named(manifest.train_data), _named(train_data)),
        "the sources' weights": ([s.weight for s in was.data.train], [s.weight for s in config.data.train]),
        "data.lanes": (was.data.lanes, config.data.lanes),
        "data.shuffle_window_shards": (was.data.shuffle_window_shards, config.data.shuffle_window_shards),
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


def _named(train_data: list[TrainedOn]) -> str:
    return ", ".join(f"{of.name} ({of.num_samples:,} photos, manifest {of.manifest_sha256[:12]}…)" for of in train_data)


def _changed_fields(before: object, now: object) -> tuple[object, object]:
    if not isinstance(before, BaseModel) or not isinstance(now, BaseModel):
        return before, now
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    names = [name for name in old if old[name] != new[name]]
    return tuple(", ".join(f"{name}={tree[name]}" for name in names) for tree in (old, new))  # type: ignore[return-value]
