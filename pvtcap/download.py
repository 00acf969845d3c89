"""Candidates whose photos are URLs: fetched many at a time, prepared in other processes, given back in order.

    Candidate(…, photo=PhotoAtUrl(url)) ─▶ Fetcher (one process, hundreds of connections)
                                        ─▶ prepare() in ``processes`` others ─▶ Prepared | SkippedItem, in order

In order, so that shards, and what resuming takes up again, depend on the input alone and not on who answered first.
"""

from __future__ import annotations

import asyncio
import itertools
import resource
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from pvtcap.candidate import Candidate, Prepared, Result, Work, clean_key, prepare, prepare_each
from pvtcap.errors import ShardError
from pvtcap.fetch import NO_NETWORK, Fetcher, FetchOptions
from pvtcap.photo import BadPhoto
from pvtcap.photosource import PhotoBytes
from pvtcap.processes import AGAIN, worker_died, worker_pool
from pvtcap.shardset import SkippedItem
from pvtcap.storedphoto import Encoding, modules_for

_ROWS_AHEAD = 8192  # a row that times out thrice takes a minute: so many others may pass it by
_BYTES_AHEAD = 256 << 20  # prepared, waiting for their turn
_RAW_BYTES = 256 << 20  # fetched, waiting for a process
_CHUNK = 16  # photos handed to a process at a time
_LONGEST_WAIT_S = 0.05  # of a photo for others to go with it
_OFFLINE_AFTER = 500  # rows in a row that end for want of a network


@dataclass(frozen=True, slots=True)
class PhotoAtUrl:
    """A photo that has to be downloaded first."""

    url: str

    def read(self) -> bytes:
        raise AssertionError("download_in_order fetches it")


def download_in_order(
    work: Iterator[Work], encoding: Encoding, processes: int, options: FetchOptions
) -> Generator[Result, None, None]:
    """Fetch and prepare ``work``, whose candidates have a PhotoAtUrl; results come in its order.

    What cannot be had is a SkippedItem whose detail begins with the URL. Raises ShardError when a worker dies and when
    this machine seems to be offline: its photos are not lost then, as they would be if they were skipped.
    """
    _allow_open_files(4 * options.connections)
    offline = 0
    # Not asyncio.Runner: each of its runs sets a signal handler, whose enum asks for the repr of all results so far.
    loop = asyncio.new_event_loop()
    pipeline = _Pipeline(work, encoding, processes, options)
    try:
        while results := loop.run_until_complete(pipeline.next_results()):
            for result in results:
                offline = offline + 1 if _is_offline(result) else 0
                if offline == _OFFLINE_AFTER:
                    raise ShardError(
                        f"this machine seems to be offline: {offline} URLs one after the other failed",
                        got=result[2].detail if isinstance(result[2], SkippedItem) else None,
                        do="Run the same command again when the network is back: it goes on.",
                    )
                yield result
    except BrokenProcessPool as error:
        raise worker_died(AGAIN) from error
    finally:
        loop.run_until_complete(pipeline.close())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


class _Pipeline:
    def __init__(self, work: Iterator[Work], encoding: Encoding, processes: int, options: FetchOptions) -> None:
        self._work, self._encoding = work, encoding
        self._fetcher = Fetcher(options)
        self._fetcher_is_open = False
        self._pool: Executor
        if processes > 1:
            self._pool = worker_pool(processes, modules_for(encoding))
        else:
            self._pool = ThreadPoolExecutor(1)  # a thread, so that decoding does not hold up the connections
        self._pending: deque[asyncio.Task[Result]] = deque()
        self._fetched: list[tuple[Candidate, asyncio.Future[Prepared | SkippedItem]]] = []
        self._bytes_ahead = 0
        self._raw_bytes = 0

    async def next_results(self) -> list[Result]:
        """The next results in order, as many as are there, one at least; none when the work is done."""
        if not self._fetcher_is_open:
            await self._fetcher.__aenter__()
            self._fetcher_is_open = True
        self._start_rows()
        if not self._pending:
            return []
        await asyncio.wait((self._pending[0],))
        ready = []
        while self._pending and self._pending[0].done():
            ready.append(self._pending.popleft().result())
            self._bytes_ahead -= _size(ready[-1])
        return ready

    async def close(self) -> None:
        for task in self._pending:
            task.cancel()
        await asyncio.gather(*self._pending, return_exceptions=True)
        if self._fetcher_is_open:
            await self._fetcher.__aexit__()
        self._pool.shutdown(cancel_futures=True)

    def _start_rows(self) -> None:
        if self._bytes_ahead < _BYTES_AHEAD:
            for number, key, item in itertools.islice(self._work, _ROWS_AHEAD - len(self._pending)):
                self._pending.append(asyncio.create_task(self._row(number, key, item)))

    async def _row(self, number: int, key: str, item: Candidate | SkippedItem) -> Result:
        result = await self._result(item)
        self._bytes_ahead += _size((number, key, result))
        return number, key, result

    async def _result(self, item: Candidate | SkippedItem) -> Prepared | SkippedItem:
        if isinstance(item, SkippedItem):
            return item
        assert isinstance(item.photo, PhotoAtUrl)
        result = await self._download(item, item.photo.url)
        if isinstance(result, SkippedItem):
            return result.model_copy(update={"detail": f"{item.photo.url} {result.detail}".strip()})
        return result

    async def _download(self, item: Candidate, url: str) -> Prepared | SkippedItem:
        if not any(caption.strip() for caption in item.captions):
            return prepare(item, self._encoding)  # says so without asking for the photo
        try:
            raw = await self._fetcher.fetch(url)
        except BadPhoto as error:
            return SkippedItem(key=clean_key(item.key), reason=error.reason, detail=error.detail)
        return await self._prepare(replace(item, photo=PhotoBytes(raw)), len(raw))

    async def _prepare(self, candidate: Candidate, num_bytes: int) -> Prepared | SkippedItem:
        """Hand a photo to a process together with others: the handing over costs a tenth of the work on one."""
        loop = asyncio.get_running_loop()
        self._raw_bytes += num_bytes
        if self._raw_bytes > _RAW_BYTES:
            self._fetcher.may_start.clear()
        prepared: asyncio.Future[Prepared | SkippedItem] = loop.create_future()
        self._fetched.append((candidate, prepared))
        if len(self._fetched) == 1:
            loop.call_later(_LONGEST_WAIT_S, self._hand_over)
        elif len(self._fetched) == _CHUNK:
            self._hand_over()
        try:
            return await prepared
        finally:
            self._raw_bytes -= num_bytes
            if self._raw_bytes <= _RAW_BYTES:
                self._fetcher.may_start.set()

    def _hand_over(self) -> None:
        if self._fetched:
            chunk, self._fetched = self._fetched, []
            candidates = [candidate for candidate, _ in chunk]
            working = asyncio.get_running_loop().run_in_executor(self._pool, prepare_each, candidates, self._encoding)
            working.add_done_callback(partial(_hand_back, [prepared for _, prepared in chunk]))


def _hand_back(
    waiting: list[asyncio.Future[Prepared | SkippedItem]], done: asyncio.Future[list[Prepared | SkippedItem]]
) -> None:
    """Give each row that waits what became of its photo, or the error of them all."""
    error = None if done.cancelled() else done.exception()
    for number, prepared in enumerate(waiting):
        if prepared.done():
            continue  # cancelled, because the build stops
        if done.cancelled():
            prepared.cancel()
        elif error is not None:
            prepared.set_exception(error)
        else:
            prepared.set_result(done.result()[number])


def _size(result: Result) -> int:
    return len(result[2].photo) if isinstance(result[2], Prepared) else 0


def _is_offline(result: Result) -> bool:
    return isinstance(result[2], SkippedItem) and result[2].reason in NO_NETWORK


def _allow_open_files(wanted: int) -> None:
    """Raise this process's own limit on open files as far as the system lets it: 1,024 are soon used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # what is left then fails with a line of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))
