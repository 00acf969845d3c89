"""Where a run's checkpoints lie: checkpoints/step_00001000, complete if and only if it has its manifest."""

from __future__ import annotations

from pathlib import Path

from pvtcap.shardset import MANIFEST


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder, or of its evaluation's."""
    return int(folder.name.removeprefix("step_"))


def complete(folder: Path) -> list[Path]:
    """Checkpoints below ``folder`` that have their manifest, oldest first."""
    # A save may be killed between writing the manifest and renaming the folder; resuming repeats those steps.
    return sorted(path.parent for path in folder.glob(f"step_*/{MANIFEST}") if path.parent.suffix == "")


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint below ``folder``, or None."""
    return max(complete(folder), default=None)
