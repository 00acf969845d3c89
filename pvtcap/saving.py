"""Writing checkpoints, and which of them to keep. ``checkpoint`` says what is in one.

A save may be killed at any moment: until it is whole it has another name, and nothing that was whole goes before.
Training waits for it. DeepSpeed 0.19's writer that goes on beside it (its decoupled checkpoint engine) opens files with
O_DIRECT through the libaio op: neither holds on a tmpfs, on many network filesystems, or without libaio's headers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from pvtcap import __version__
from pvtcap.checkpoint import (
    CONFIG,
    ENGINE,
    FORMAT,
    TRAINABLE,
    VOCAB,
    CheckpointManifest,
    FileEntry,
)
from pvtcap.config import BatchPlan, Config
from pvtcap.dist import World
from pvtcap.engine import Engine
from pvtcap.errors import CheckpointError
from pvtcap.scoretable import SCORES
from pvtcap.shardset import MANIFEST, sha256_file, write_json
from pvtcap.sources import TrainedOn
from pvtcap.stepfolders import complete, step_folder
from pvtcap.text import CaptionTokenizer
from pvtcap.weightreport import SourceFile

BEST = "best"  # in checkpoints/: a link to the one whose captions scored best
_PARTIAL, _OLD = ".partial", ".old"
_BEST_BY = ("CIDEr", "Bleu_4")  # their sum; BLIP and its successors choose by it


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
    """Write a checkpoint (collective); returns its folder. CheckpointError when it cannot be: the last one stands."""
    final = step_folder(config.run.dir, step)
    partial = final.with_name(final.name + _PARTIAL)
    world.on_first_rank(lambda: _make_room(partial, engine.checkpoint_bytes()))
    with _writing(partial):
        engine.save(str(partial), ENGINE)
    state = engine.trainable_state()

    def write_whole_parts() -> None:
        assert state is not None, "rank 0 has the consolidated parameters"
        with _writing(partial):
            save_file(state, partial / TRAINABLE)
            tokenizer.save(partial / VOCAB)
            (partial / CONFIG).write_text(config.to_yaml(), encoding="utf-8")

    world.on_first_rank(write_whole_parts)
    world.barrier()  # every rank's part is on disk
    entries = world.gather(_entries(partial, world.rank, world.size))

    def finish() -> None:
        assert entries is not None, "rank 0 gathers"
        files = {name: entry for part in entries for name, entry in part.items()}
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
            files=dict(sorted(files.items())),
            weight_files=weight_files,
        )
        with _writing(partial):
            write_json(partial / MANIFEST, manifest.model_dump())
            _put_in_place(partial, final)
        prune(config)

    world.on_first_rank(finish)
    return final


def prune(config: Config) -> None:
    """Remove the checkpoints that are neither among the last nor the best, and what killed saves left; rank 0 only."""
    folder = config.run.dir / "checkpoints"
    present = complete(folder)
    scores = _scores(config.run.dir)
    ranked = sorted((path for path in present if path.name in scores), key=lambda path: scores[path.name])
    best = ranked[-config.checkpoint.keep_best :] if config.checkpoint.keep_best else []
    keep = {*present[-config.checkpoint.keep_last :], *best, *_being_scored(config.run.dir, present)}
    for path in [
        *present,
        *folder.glob(f"step_*{_PARTIAL}"),
        *folder.glob(f"step_*{_OLD}"),
        *folder.glob("*.universal"),
    ]:
        if path not in keep:
            shutil.rmtree(path)
    if ranked:
        link = folder / f"{BEST}{_PARTIAL}"
        link.unlink(missing_ok=True)
        link.symlink_to(ranked[-1].name)
        if (folder / BEST).is_dir() and not (folder / BEST).is_symlink():
            shutil.rmtree(folder / BEST)  # a run folder that was copied, links and all
        link.replace(folder / BEST)


def _scores(run: Path) -> dict[str, float]:
    """CIDEr + Bleu_4 by the checkpoint's name, of those that have both."""
    found = {}
    for path in (run / "eval").glob(f"step_*/{SCORES}"):
        values = [json.loads(path.read_bytes())["scores"].get(name) for name in _BEST_BY]
        if None not in values:
            found[path.parent.name] = sum(values)
    return found


def _being_scored(run: Path, present: list[Path]) -> list[Path]:
    """The newest two whose captions wait for scores: one is being scored, one waits, others were given up."""
    waiting = [path for path in present if not (run / "eval" / path.name / SCORES).exists()]
    return [path for path in waiting if (run / "eval" / path.name).is_dir()][-2:]


def _make_room(partial: Path, size_bytes: int) -> None:
    """An empty folder on a disk that has room for the checkpoint: better no save than half of one."""
    with _writing(partial):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
    if free < size_bytes:
        shutil.rmtree(partial)
        raise CheckpointError(
            "no room for a checkpoint; the last complete one is as it was",
            where=partial.parent,
            got=f"{free / 1e6:,.0f} MB free",
            wanted=f"{size_bytes / 1e6:,.0f} MB",
            do="Free some, and start the same command again: it goes on from the last checkpoint.",
        )


@contextlib.contextmanager
def _writing(partial: Path) -> Iterator[None]:
    """What the disk refuses is said in one line, and the half that was written makes room again."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise  # torch says nothing more exact when a disk is full
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"cannot write a checkpoint ({' '.join(str(error).split())[:160]})",
            where=partial.parent,
            do="The last complete one is as it was: mend the disk, and start the same command again.",
        ) from None


def _entries(partial: Path, rank: int, num_ranks: int) -> dict[str, FileEntry]:
    """Size and sha256 of this rank's share of the files: hashing takes as long as reading."""
    files = sorted(file for file in partial.rglob("*") if file.is_file())[rank::num_ranks]
    return {
        str(file.relative_to(partial)): FileEntry(size_bytes=file.stat().st_size, sha256=sha256_file(file))
        for file in files
    }


def _put_in_place(partial: Path, final: Path) -> None:
    # A damaged checkpoint of this step may be there, from which the run did not go on.
    old = final.with_name(final.name + _OLD)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
