"""A folder of fetched shards, with a limit in bytes, shared by all processes of a node.

    CACHE/pvtcap-cache.lock              held while bytes are counted, promised or given up; says how many there are
    CACHE/0123456789abcdef.mirror/       of one ShardSet: named after its URL and its manifest
        manifest.json
        cats-000000.tar                  whole and checked, or not there
        cats-000001.tar.partial          on its way; its whole size is already taken from the disk
        cats-000001.tar.lock             held by the process that fetches it

All locks are flocks on open files: they end with their process, however it ends. Who uses a file has it open with a
shared lock and so keeps it from being evicted; the least recently opened of the others go first. Best on a disk of the
node's own. Nothing outside ``*.mirror`` is ever removed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

from pvtcap.errors import ShardError
from pvtcap.filelock import in_use, is_at, locked, try_lock, unlink_unused
from pvtcap.remote import Retries, fetch, fetch_bytes, file_url, shown
from pvtcap.shardformat import MANIFEST, ShardFile

LEDGER = "pvtcap-cache.lock"
_MIRROR, _PARTIAL, _LOCK = ".mirror", ".partial", ".lock"
_DO = "Give data.cache_gb more, or let fewer shards be in use at once: data.shuffle_window_shards, data.lanes."
_POLL_S = 0.2


class NoRoom(ShardError):
    """Everything in the cache is in use."""


class _File(NamedTuple):
    used_ns: int
    size_bytes: int
    path: Path


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/pvtcap/shards``, which is below ``~/.cache`` where that is not set."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "pvtcap" / "shards"


@dataclass(frozen=True)
class ShardCache:
    """Where to keep what was fetched, and how much of it; ``wait_s`` is how long to wait for room."""

    folder: Path
    max_bytes: int
    wait_s: float = 120.0
    retries: Retries = field(default_factory=Retries)

    @classmethod
    def of(cls, folder: Path | None = None, gigabytes: float = 100.0) -> Self:
        """From ``data.cache_dir`` and ``data.cache_gb``."""
        return cls((folder or default_folder()).absolute(), round(gigabytes * 1e9))

    def hold(self, path: Path, size_bytes: int | None, fill: Callable[[int], None]) -> int:
        """A descriptor of a whole file of the cache; until it is closed, the file stays.

        What is not there is made by ``fill(descriptor)``, by one process while the others wait for it. Raises
        ShardError when the disk is full or not to be written to.
        """
        with _disk_errors(path):
            while True:
                if (descriptor := _held(path, size_bytes)) is not None:
                    return descriptor
                path.parent.mkdir(parents=True, exist_ok=True)
                with locked(Path(f"{path}{_LOCK}")) as lock:
                    if not is_at(lock, Path(f"{path}{_LOCK}")):
                        continue  # whom we waited for has put it away
                    try:
                        if not path.exists():
                            return self._made(path, fill)
                    finally:
                        Path(f"{path}{_LOCK}").unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove what killed downloads left, and count anew."""
        with _disk_errors(self.folder), locked(self.folder / LEDGER) as ledger:
            _note(ledger, sum(file.size_bytes for file in self._files()))

    def admit(self, descriptor: int, size_bytes: int, wait_s: float, watch: Callable[[], object]) -> None:
        """Give a file its size within the limit, evicting others for it. Raises NoRoom after ``wait_s``."""
        if size_bytes > self.max_bytes:
            got = f"{_gb(size_bytes)}, and a limit of {_gb(self.max_bytes)}"
            raise ShardError(
                "a file larger than the whole cache", where=self.folder, got=got, do="Raise data.cache_gb."
            )
        until = time.monotonic() + wait_s
        while size_bytes:
            watch()
            with locked(self.folder / LEDGER) as ledger:
                if self._make_room(ledger, size_bytes):
                    _allocate(descriptor, size_bytes)
                    return
            if time.monotonic() >= until:
                raise self._no_room(size_bytes)
            time.sleep(_POLL_S)

    def _made(self, path: Path, fill: Callable[[int], None]) -> int:
        coming = Path(f"{path}{_PARTIAL}")
        descriptor = os.open(coming, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # in use before it can be found
            fill(descriptor)
            os.fsync(descriptor)  # the checksum is looked at once: after a power cut the bytes must still be these
            with locked(self.folder / LEDGER):  # who counts files sees one of the two names
                coming.rename(path)
        except BaseException:
            coming.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        return descriptor

    def _make_room(self, ledger: int, size_bytes: int) -> bool:
        """Count so many bytes more, if they may be there. What the ledger says is never too little, and may be too much
        after a process was killed; a look at the files puts it right.
        """
        said = os.pread(ledger, 32, 0)
        total = int(said) if said.isdigit() else self.max_bytes
        if total + size_bytes > self.max_bytes:
            total = self._evict(size_bytes)
        fits = total + size_bytes <= self.max_bytes
        _note(ledger, total + size_bytes * fits)
        return fits

    def _evict(self, size_bytes: int) -> int:
        """Remove what nobody uses until there is room; the bytes that are left. Somewhat more than needed goes, so
        that a full cache is not looked through for each small file.
        """
        files = sorted(self._files())
        total = sum(file.size_bytes for file in files)
        if total + size_bytes <= self.max_bytes:
            return total
        for file in files:
            if total + max(size_bytes, self.max_bytes // 64) <= self.max_bytes:
                break
            if file.path.suffix != _PARTIAL and file.path.name != MANIFEST and unlink_unused(file.path):
                total -= file.size_bytes
        return total

    def _files(self) -> list[_File]:
        """All that counts. What killed downloads left goes at this opportunity."""
        # scandir, not glob: a terabyte of shards is tens of thousands of files.
        entries = [entry for mirror in self.folder.glob(f"*{_MIRROR}") for entry in os.scandir(mirror)]
        for entry in entries:
            if entry.name.endswith(_LOCK):
                _clear_up(Path(entry.path))
        files = []
        for entry in entries:
            path = Path(entry.path)
            with suppress(FileNotFoundError):
                status = path.stat()
                files.append(_File(status.st_mtime_ns, status.st_size, path))
        return files

    def _no_room(self, size_bytes: int) -> NoRoom:
        used = [file for file in self._files() if file.size_bytes and in_use(file.path)]
        names = ", ".join(file.path.name for file in used[:3]) + (", …" if len(used) > 3 else "")
        return NoRoom(
            "no room in the cache: all in it is in use",
            where=self.folder,
            got=f"{len(used)} files of {_gb(sum(file.size_bytes for file in used))} in use ({names})",
            wanted=f"{_gb(size_bytes)} more within the limit of {_gb(self.max_bytes)}",
            do=_DO,
        )


@dataclass(frozen=True)
class Mirror:
    """What a cache holds of the ShardSet at ``url``, in the folder ``path``. Opening it fetches its manifest only."""

    cache: ShardCache
    url: str
    path: Path

    @classmethod
    def open(cls, url: str, cache: ShardCache) -> Self:
        url = url if url.endswith("://") else url.rstrip("/")
        raw = fetch_bytes(file_url(url, MANIFEST), retries=cache.retries)
        cache.tidy()
        name = hashlib.sha256(f"{shown(url)}\n{hashlib.sha256(raw).hexdigest()}".encode()).hexdigest()[:16]
        mirror = cls(cache, url, cache.folder / f"{name}{_MIRROR}")

        def fill(descriptor: int) -> None:
            cache.admit(descriptor, len(raw), cache.wait_s, lambda: None)
            _write(descriptor, 0, raw)

        os.close(cache.hold(mirror.path / MANIFEST, len(raw), fill))
        return mirror

    def hold(self, file: ShardFile, wait_s: float | None = None, watch: Callable[[], object] = lambda: None) -> int:
        """A descriptor of one of the ShardSet's files, fetched if it is not there; until it is closed, the file stays.

        ``wait_s`` is how long to wait for room, the cache's by default; ``watch`` is called now and then while it is
        fetched, and may raise to end it. Raises ShardError (see ``remote.fetch``), NoRoom among them.
        """
        url, (name, size_bytes, sha256), retries = file_url(self.url, file.name), file, self.cache.retries
        patience_s = self.cache.wait_s if wait_s is None else wait_s

        def fill(descriptor: int) -> None:
            if size_bytes is None:
                raw = fetch_bytes(url, sha256=sha256, retries=retries)
                self.cache.admit(descriptor, len(raw), patience_s, watch)
                _write(descriptor, 0, raw)
                return
            self.cache.admit(descriptor, size_bytes, patience_s, watch)
            fetch(url, partial(_write, descriptor), size_bytes=size_bytes, sha256=sha256, retries=retries, watch=watch)

        return self.cache.hold(self.path / name, size_bytes, fill)


def _note(ledger: int, total_bytes: int) -> None:
    os.ftruncate(ledger, 0)
    os.pwrite(ledger, b"%d" % total_bytes, 0)


def _held(path: Path, size_bytes: int | None) -> int | None:
    """The file's descriptor with a shared lock; None when it is not there, or not of this size (it goes then)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits no longer than an eviction takes
    if is_at(descriptor, path):
        if size_bytes is None or os.fstat(descriptor).st_size == size_bytes:
            with suppress(PermissionError):  # another user's
                os.utime(descriptor)
            return descriptor
        path.unlink(missing_ok=True)
    os.close(descriptor)
    return None


def _clear_up(lock: Path) -> None:
    """Remove a download's lock, and what it has of the file, unless its process lives."""
    if (descriptor := try_lock(lock)) is None:
        return
    lock.with_suffix(_PARTIAL).unlink(missing_ok=True)
    lock.unlink(missing_ok=True)
    os.close(descriptor)


def _allocate(descriptor: int, size_bytes: int) -> None:
    """Take the bytes from the disk now: that it is full shows before they are fetched."""
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size_bytes)


def _write(descriptor: int, offset: int, block: bytes) -> None:
    view = memoryview(block)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ShardError(
                "no space left on the disk of the cache",
                where=path,
                do="Make room, set data.cache_gb to less than the disk has, or data.cache_dir to another disk.",
            ) from error
        do = "Set data.cache_dir to a folder on a disk of this node."
        raise ShardError(f"cannot use the cache: {error.strerror}", where=path, do=do) from error


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.3g} GB"
