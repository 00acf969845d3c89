"""A watch over ranks that no longer move: which one, where in the program, for how long. Then the run ends.

    with StallWatch(run.dir, rank, size, minutes=10) as watch:
        for step in …: watch.beat(step)

A rank that stalls, reading from a disk that is away, say, leaves the others in a collective until the process group's
time-out, half an hour later, and that names none. Here a thread of each rank looks at its main thread's stack when that
has not moved for so long, and leaves what it saw in RUN/stall/rank_N.json; the first rank that could do so waits for
what the others left, says in one line who is to blame, and ends with exit code 2. To blame are those who do not wait
for others, and those who cannot answer: stopped, or on a machine that is away.

The same thread ends a rank whose torchrun was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Self

_WAITING_IN = ("torch/distributed/", "deepspeed/comm/", "pvtcap/dist.py")
_ANSWER_S = 10.0  # how long the others have to leave what they saw: a shared folder may be slow


@dataclass(frozen=True)
class Stall:
    """What a rank saw of itself."""

    rank: int
    step: int
    seconds: float
    where: str
    waits_for_others: bool
    stack: str


class StallWatch:
    """``beat`` is cheap: a step that ends, a batch that is captioned. Nothing is watched before the first."""

    def __init__(self, run: Path, rank: int, num_ranks: int, *, minutes: float, answer_s: float = _ANSWER_S) -> None:
        self.folder, self.rank, self.num_ranks = run / "stall", rank, num_ranks
        self._limit_s, self._answer_s = 60 * minutes, answer_s
        self._step = 0
        self._last: float | None = None  # when it last moved; None: not watched
        self._over = threading.Event()
        self._parent = os.getppid()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)

    def __enter__(self) -> Self:
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)  # of an earlier start
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def beat(self, step: int | None = None) -> None:
        """The main thread moves."""
        self._step = self._step if step is None else step
        self._last = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what may take long, and keeps nobody waiting."""
        self._last = None
        yield
        self.beat()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._limit_s / 4)):
            if os.getppid() != self._parent:
                os._exit(1)  # torchrun was killed: a run that nobody can stop or follow must not go on
            last = self._last
            if last is not None and time.monotonic() - last > self._limit_s:
                self._leave_word(time.monotonic() - last)
                self._over.wait(self._answer_s + 0.1 * self.rank)
                if last != self._last:
                    continue  # it was slow, no more
                found = self._found()
                if min(found) == self.rank:
                    print(f"pvtcap: error: {self._verdict(found)}", file=sys.stderr, flush=True)
                    os._exit(2)  # the main thread will not do it; torchrun ends the other ranks

    def _leave_word(self, seconds: float) -> None:
        frame = sys._current_frames().get(self._main or 0)
        stall = Stall(self.rank, self._step, seconds, _where(frame), _waits(frame), _stack(frame))
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"rank_{self.rank}.partial"
        partial.write_text(json.dumps(asdict(stall), indent=1), encoding="utf-8")
        partial.replace(partial.with_suffix(".json"))

    def _found(self) -> dict[int, Stall]:
        read = [Stall(**json.loads(path.read_text(encoding="utf-8"))) for path in self.folder.glob("rank_*.json")]
        return {stall.rank: stall for stall in read}

    def _verdict(self, found: dict[int, Stall]) -> str:
        silent = [rank for rank in range(self.num_ranks) if rank not in found]
        at_work = [stall for stall in found.values() if not stall.waits_for_others]
        if silent:
            names = ", ".join(map(str, silent[:16]))
            blame = f"rank {names} does not answer (stopped, or its machine is away)"
        elif at_work:
            first = min(at_work, key=lambda stall: (stall.step, stall.rank))
            blame = f"rank {first.rank} is at {first.where}"
        else:
            last = min(found.values(), key=lambda stall: (stall.step, stall.rank))
            blame = f"all ranks wait for each other; rank {last.rank} came least far, to step {last.step}"
        mine = found[self.rank]
        return (
            f"{self.folder}: no step for {mine.seconds:.0f} s after step {mine.step} (train.stall_minutes); {blame}. "
            "The stacks are in that folder; start the same command again to go on from the last checkpoint."
        )


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _where(frame: FrameType | None) -> str:
    """The innermost place that is ours, which says more than the library's beneath."""
    for one in _frames(frame):
        if f"{os.sep}pvtcap{os.sep}" in one.f_code.co_filename and __file__ != one.f_code.co_filename:
            return f"pvtcap/{Path(one.f_code.co_filename).name}:{one.f_lineno} ({one.f_code.co_name})"
    return "an unknown place" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _waits(frame: FrameType | None) -> bool:
    return any(part in one.f_code.co_filename for one in _frames(frame) for part in _WAITING_IN)


def _stack(frame: FrameType | None) -> str:
    return "" if frame is None else "".join(traceback.format_stack(frame))
