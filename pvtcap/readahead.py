"""Fetching shards before they are needed, so that training does not wait for a network.

    needs = ((step, shard) for …)        # in the order in which this rank will need them; may be endless
    with ReadAhead(shardset, needs, max_bytes=20_000_000_000) as ahead:
        for step, batch in enumerate(batches):
            ahead.reached(step)          # also where an error of the fetching is raised

A thread of the training process fetches into the cache what the readers, in whatever processes they are, then find
there. What it has fetched it keeps from being evicted until its step is reached.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, Self

from pvtcap.errors import PvtcapError
from pvtcap.shardcache import NoRoom
from pvtcap.shardset import ShardSet

_NO_ROOM_WAIT_S = 1.0


class _Fetched(NamedTuple):
    at: int
    size_bytes: int
    descriptors: list[int]


class _Closed(Exception):
    pass


class ReadAhead:
    """Fetches the shards of ``needs``, pairs (at, shard), in their order; ``at`` is a step, a batch number, anything
    that counts upwards, from which on the shard is read.

    At most ``max_shards`` and ``max_bytes`` (of tars) are on their way or waiting for their step; one always may be.
    For a ShardSet in a folder it does nothing.
    """

    def __init__(
        self, shardset: ShardSet, needs: Iterable[tuple[int, int]], *, max_bytes: int, max_shards: int = 1024
    ) -> None:
        self.shardset, self.max_bytes, self.max_shards = shardset, max_bytes, max_shards
        self._needs = needs
        self._changed = threading.Condition()
        self._ahead: deque[_Fetched] = deque()
        self._reached = -1
        self._closed = False
        self._error: PvtcapError | None = None
        # A daemon: a process that ends does not wait for a download.
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        if shardset.mirror is not None:
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def reached(self, at: int) -> None:
        """Everything needed up to ``at`` is in use or done with. Raises the error that ended the fetching, if any."""
        with self._changed:
            self._reached = max(self._reached, at)
            while self._ahead and self._ahead[0].at <= self._reached:
                _let_go(self._ahead.popleft())
            self._changed.notify()
            if self._error is not None:
                raise self._error

    def close(self) -> None:
        """Stop fetching, and let go of what is there: it stays in the cache until something else needs its room."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self.shardset.mirror is not None:
            self._thread.join(timeout=5)  # longer only if the network does not answer; then it ends with the process
        with self._changed:
            while self._ahead:
                _let_go(self._ahead.popleft())

    def _run(self) -> None:
        try:
            for at, shard in self._needs:
                size_bytes = self.shardset.manifest.shards[shard].size_bytes
                if not self._may_fetch(at, size_bytes):
                    continue
                fetched = _Fetched(at, size_bytes, self._fetch(at, shard))
                with self._changed:
                    if self._closed or at <= self._reached:
                        _let_go(fetched)
                    else:
                        self._ahead.append(fetched)
        except _Closed:
            pass
        except PvtcapError as error:
            with self._changed:
                self._error = error

    def _may_fetch(self, at: int, size_bytes: int) -> bool:
        """Wait until it is within the bounds; false when its readers were faster and have it."""
        with self._changed:
            while self._ahead and (
                len(self._ahead) >= self.max_shards
                or sum(fetched.size_bytes for fetched in self._ahead) + size_bytes > self.max_bytes
            ):
                self._check_open()
                self._changed.wait()
            self._check_open()
            return at > self._reached

    def _fetch(self, at: int, shard: int) -> list[int]:
        entry = self.shardset.manifest.shards[shard]
        descriptors: list[int] = []
        try:
            for file in dict.fromkeys((entry.index, entry.texts, entry.tar)):
                while at > self._reached:
                    try:
                        # Not waiting for room inside: a reader that wants this very shard would wait for us.
                        descriptors.append(self.shardset.open_file(file, 0.0, self._check_open))
                        break
                    except NoRoom:
                        with self._changed:
                            self._changed.wait(_NO_ROOM_WAIT_S)
        except BaseException:
            _let_go(_Fetched(at, 0, descriptors))
            raise
        return descriptors

    def _check_open(self) -> None:
        if self._closed:
            raise _Closed


def _let_go(fetched: _Fetched) -> None:
    for descriptor in fetched.descriptors:
        os.close(descriptor)
