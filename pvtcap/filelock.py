"""Locks on files that end with their process, however it ends: flock, which belongs to an open file."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold the file's only lock, waiting for it; the descriptor. The file is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def try_lock(path: Path) -> int | None:
    """A descriptor with the file's only lock; None when somebody has one, or the file is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(descriptor, path):
            return descriptor
    os.close(descriptor)
    return None


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of that name: it may have been removed while we waited for its lock."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def unlink_unused(path: Path) -> bool:
    """Remove a file on which nobody has a lock; whether that was so."""
    if (descriptor := try_lock(path)) is None:
        return False
    path.unlink(missing_ok=True)
    os.close(descriptor)
    return True


def in_use(path: Path) -> bool:
    """Whether there is such a file, and somebody has a lock on it."""
    if (descriptor := try_lock(path)) is None:
        return path.exists()
    os.close(descriptor)
    return False
