"""Being asked to leave: by SIGUSR1 or SIGTERM, as Slurm does before it takes a node away, or by one's own time limit.

    with Notice(config.train.stop_after_minutes) as notice:
        for step in …:
            if world.sum([notice.given])[0]:     # a rank may be asked alone: all leave together, between two steps
                save(); return leave_to_be_resumed()

A rank that leaves so ends with ``RESUME_ME``; under launch/torchrun.py it says so in a file, and ends with 0: any other
code is a failure to torchrun, after which it would start the ranks again at once.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, Self

RESUME_ME = 75  # EX_TEMPFAIL of sysexits.h: no error; the same command later goes on
MARK = "PVTCAP_RESUME_MARK"  # names the file, set by launch/torchrun.py
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Notice:
    """Whether this process has been asked to leave, why, and when. A second signal changes nothing: it is leaving."""

    def __init__(self, stop_after_minutes: float | None = None) -> None:
        self._deadline = None if stop_after_minutes is None else time.monotonic() + 60 * stop_after_minutes
        self._since: float | None = None
        self._reason = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for one in _SIGNALS:
            self._before[one] = signal.signal(one, self._take)
        # launch/torchrun.py holds SIGUSR1 back until somebody listens: now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        return self

    def __exit__(self, *exc: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    @property
    def given(self) -> bool:
        if self._since is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self._since, self._reason = self._deadline, "train.stop_after_minutes"
        return self._since is not None

    @property
    def reason(self) -> str:
        """Who asked: a signal's name or an option's; nobody: another rank was asked."""
        return self._reason or "a signal to another rank"

    def seconds_ago(self) -> float:
        """Since this process was asked; 0 if it was not."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._since is None:
            self._since, self._reason = time.monotonic(), signal.Signals(number).name


def exit_code_to_resume() -> int:
    """What a rank that leaves to be resumed ends with; tells launch/torchrun.py, if that is what started it."""
    if (mark := os.environ.get(MARK)) is None:
        return RESUME_ME
    Path(mark).touch()
    return 0
