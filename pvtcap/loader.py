"""Batches made by worker processes, handed over in order; a worker that dies or hangs is named with what it was at.

    for batch in load(work, numbers=range(10), workers=2, timeout_s=45, rank=0, pin_memory=False): ...

``Work`` makes the batch with a number, in whichever process it is asked to. torch's DataLoader does the rest; what it
does not tell is which photo a worker was reading when it was killed or when it fell silent. Workers write that on a
``Board`` in shared memory.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pvtcap.errors import PvtcapError, ShardError
from pvtcap.processes import forking_server, sheltered, start_worker

T = TypeVar("T")

_POLL_S = 5.0  # how often a silent loader is looked into
_START_S = 300.0  # a worker that begins imports torch, from a slow disk perhaps
_NAME_BYTES = 400


class Row(NamedTuple):
    """What a worker is at: its process, for how many seconds, and the sample's name."""

    process: int
    seconds: float
    where: str


class Board:
    """A row for each worker in shared memory: its process, since when (monotonic ns, or one of these), the sample."""

    IDLE, FETCHING = 0, -1

    def __init__(self, workers: int) -> None:
        self._numbers: torch.Tensor = torch.zeros((max(1, workers), 2), dtype=torch.int64)
        self._names: torch.Tensor = torch.zeros((max(1, workers), _NAME_BYTES), dtype=torch.uint8)
        for shared in (self._numbers, self._names):
            shared.share_memory_()  # type: ignore[no-untyped-call]
        self._row: tuple[memoryview[int], memoryview[int]] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_row": None}  # each process has its own

    def begin(self, where: str, *, fetching: bool = False) -> None:
        """This process now works on the sample that a person would call ``where``; or it waits for the sample's shard
        to be fetched, which has time-outs of its own.
        """
        numbers, letters = self._mine()
        letters[:] = where.encode("utf-8", "replace")[-_NAME_BYTES:].ljust(_NAME_BYTES, b"\0")
        numbers[0] = os.getpid()
        numbers[1] = self.FETCHING if fetching else time.monotonic_ns()

    def idle(self) -> None:
        """This process works on no sample: it may take its time."""
        self._mine()[0][1] = self.IDLE

    def processes(self) -> list[int]:
        """All that have begun with a sample."""
        return [process for process in self._numbers[:, 0].tolist() if process]

    def have_all_begun(self) -> bool:
        """Whether each worker has had a sample."""
        return 0 not in self._numbers[:, 0].tolist()

    def is_fetching(self) -> bool:
        """Whether any of them waits for a shard."""
        return self.FETCHING in self._numbers[:, 1].tolist()

    def busy(self) -> list[Row]:
        """The workers at a sample."""
        now = time.monotonic_ns()
        return [
            Row(process, (now - since) / 1e9, bytes(name).rstrip(b"\0").decode("utf-8", "replace"))
            for (process, since), name in zip(self._numbers.tolist(), self._names.tolist(), strict=True)
            if since > 0
        ]

    def _mine(self) -> tuple[memoryview[int], memoryview[int]]:
        """This process's row: its numbers, its name's letters."""
        if self._row is None:
            info = get_worker_info()
            worker = 0 if info is None else int(info.id)
            self._row = self._numbers[worker].numpy().data, self._names[worker].numpy().data
        return self._row


class Rooms:
    """Memory shared with the worker processes, for the large part of their batches; used again and again.

    torch would give each batch fresh memory, whose pages cost a worker more time than decoding small photos (0.47 of
    0.55 ms a photo at 384 px). Workers take turns, and the loader asks each for at most ``PREFETCH`` batches beyond
    those that it has handed out: so the last ``kept`` batches stay as they are. Without workers it is this process's
    own, and with ``kept`` 0 as well there is none: each batch gets fresh memory.
    """

    PREFETCH = 2

    def __init__(self, workers: int, size_bytes: int, kept: int = 1) -> None:
        self._workers = workers
        self._each = self.PREFETCH + -(-kept // workers) if workers else kept
        shape = max(1, workers), self._each, size_bytes
        self._memory: torch.Tensor = torch.empty(shape if not workers else 0, dtype=torch.uint8)
        if workers:
            # share_memory_() would copy, page by page, what nobody has written yet.
            shared = torch.UntypedStorage._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]
            self._memory = self._memory.set_(shared).view(shape)
        self._turn = 0  # each worker process counts its own
        self._number = next(_numbers)
        _known[self._number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a worker process, which knows them by the same number."""
        self.__dict__.update(state)
        _known[self._number] = self

    def next(self, size_bytes: int) -> torch.Tensor:
        """(size_bytes,) uint8: the next room of this worker, or of this process where there are no workers."""
        info = get_worker_info()
        if not self._each or (info is None) != (self._workers == 0):
            return torch.empty(size_bytes, dtype=torch.uint8)
        self._turn += 1
        room: torch.Tensor = self._memory[0 if info is None else info.id, self._turn % self._each, :size_bytes]
        return room

    def storage(self) -> torch.UntypedStorage:
        """All of it."""
        return self._memory.untyped_storage()


_numbers = itertools.count()
_known: WeakValueDictionary[int, Rooms] = WeakValueDictionary()


class Placed(NamedTuple):
    """A tensor that lies in ``Rooms`` which sender and receiver share, so that only this has to be sent.

    torch would send a file and a connection with each tensor, and the receiver would map it anew, page by page.
    """

    rooms: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Placed | torch.Tensor:
        """To be sent by a worker process; the tensor itself if it lies elsewhere, or this is no such process."""
        if get_worker_info() is not None:
            for number, rooms in _known.items():
                if tensor.untyped_storage().data_ptr() == rooms.storage().data_ptr():
                    return cls(number, tensor.dtype, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())
        return tensor

    def tensor(self) -> torch.Tensor:
        """In the process that made the rooms."""
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(_known[self.rooms].storage(), self.offset, self.shape, self.strides)


class Work(Dataset["T | PvtcapError"], Generic[T]):
    """Makes the batch with a number; ``make`` tells the board what it is at."""

    board: Board

    def make(self, number: int) -> T:
        raise AssertionError("to be overridden")

    def __getitem__(self, number: int) -> T | PvtcapError:
        # Errors leave a worker process as values, so that they arrive as they are and not inside a traceback.
        try:
            return self.make(number)
        except PvtcapError as error:
            return error
        finally:
            self.board.idle()


def load(
    work: Work[T], numbers: Iterable[int], *, workers: int, timeout_s: float, rank: int, pin_memory: bool
) -> Iterator[T]:
    """The batches with these numbers, in order, made a few ahead by ``workers`` processes (0: by this one).

    Raises what a worker raised, and ShardError, naming rank, shard and key, for a worker that died or that has been
    ``timeout_s`` seconds at one sample.
    """
    work.board = Board(workers)
    if not workers:
        for number in numbers:
            yield _unwrap(work[number])
        return
    with warnings.catch_warnings():
        # More workers than cores: torch thinks that is a mistake; where reading waits for a network it is none.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader: DataLoader[T | PvtcapError] = DataLoader(
            work,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            multiprocessing_context=forking_server([__name__, type(work).__module__]),
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
            prefetch_factor=Rooms.PREFETCH,
            timeout=min(_POLL_S, timeout_s),
        )
        with sheltered():
            batches = iter(loader)
    waiting_since = time.monotonic()
    while True:
        try:
            item = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            _look_into(error, work.board, time.monotonic() - waiting_since, timeout_s, rank)
            if work.board.busy() or work.board.is_fetching():
                waiting_since = time.monotonic()  # idleness counts from when somebody was last seen at work
        else:
            yield _unwrap(item)
            waiting_since = time.monotonic()


def _look_into(error: RuntimeError, board: Board, waited_s: float, timeout_s: float, rank: int) -> None:
    """torch says that a worker died, or that none answered in time: go on waiting, or raise."""
    busy = board.busy()
    if "timed out" in str(error):
        hanging = [row for row in busy if row.seconds > timeout_s]
        patience_s = timeout_s if board.have_all_begun() else _START_S
        if not hanging and (busy or waited_s < patience_s or board.is_fetching()):
            return
        for process in board.processes():
            # Whatever they wait for, this process must be able to leave, which joins them.
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        raise ShardError(
            f"a decoding process of rank {rank} hangs",
            where=hanging[0].where if hanging else None,
            got=f"{hanging[0].seconds if hanging else waited_s:.0f} seconds at one sample",
            wanted=f"less than data.worker_timeout_s = {timeout_s:g}",
            do="Is its disk or network away? Where reading is that slow, raise the limit.",
        ) from None
    if "exited unexpectedly" not in str(error):
        raise error
    gone = [row for row in busy if not _alive(row.process)]
    raise ShardError(
        f"a decoding process of rank {rank} died",
        where=gone[0].where if gone else None,
        do="Out of memory? Lower data.workers. If it is always this sample, leave it out."
        if board.processes()
        else "It never began; what it said stands above. In a script of your own: is all that it does under "
        "'if __name__ == \"__main__\":'? A new process reads the script again.",
    ) from None


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _start_worker(worker: int) -> None:
    """Workers share the cores with the model; each is one thread.

    They end with the process they work for, however it ends: torch's own watch looks at the parent process, which is
    the fork server's and outlives a killed trainer.
    """
    torch.set_num_threads(1)
    start_worker()


def _unwrap(item: T | PvtcapError) -> T:
    if isinstance(item, PvtcapError):
        raise item
    return item
