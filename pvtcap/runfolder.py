"""A run folder belongs to one run at a time: two that write the same checkpoints would lose both."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pvtcap.dist import World
from pvtcap.errors import ConfigError
from pvtcap.filelock import try_lock

LOCK = "lock"


@contextmanager
def owned(run: Path, world: World, *, patience_s: float = 10.0) -> Iterator[None]:
    """Hold RUN/lock on rank 0, so long as this process lives; collective.

    A run that was killed just now may take seconds to die: that long it is waited for. ConfigError, on all ranks, when
    somebody else goes on in the folder, or nobody may write there.
    """
    descriptor = world.on_first_rank(lambda: _take(run / LOCK, patience_s))
    try:
        yield
    finally:
        if world.is_first:
            os.close(descriptor)


def _take(lock: Path, patience_s: float) -> int:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise ConfigError(
            "cannot write to the run folder", where=lock.parent, got=error.strerror, do="Choose another run.dir."
        ) from None
    deadline = time.monotonic() + patience_s
    while (descriptor := try_lock(lock)) is None:
        if time.monotonic() > deadline:
            raise ConfigError(
                "another run is at work in this run folder",
                where=lock.parent,
                do="Wait for it, stop it, or choose another run.dir.",
            )
        time.sleep(0.2)
    return descriptor
