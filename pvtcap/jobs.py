"""Commands that may hang, die or eat memory: run side by side, each within limits, each failure with its reason."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """``name``.out and ``name``.log hold what it prints. ``memory_mib`` bounds the data of each of its processes."""

    name: str
    command: Sequence[str]
    memory_mib: int


class Jobs:
    """Jobs of one folder, in process groups of their own. ``reasons`` has a line for each that did not end well.

    with Jobs(folder, environment, timeout_s=600, at_once=2) as jobs:
        jobs.add(Job("METEOR", [...], memory_mib=4096))
        jobs.wait()
    """

    def __init__(self, folder: Path, environment: dict[str, str], *, timeout_s: float, at_once: int) -> None:
        self.folder, self.environment, self.timeout_s, self.at_once = folder, environment, timeout_s, at_once
        self.reasons: dict[str, str] = {}
        self._waiting: list[Job] = []
        self._running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *exc: object) -> None:
        """Whatever still runs is stopped, with all that it started."""
        for process, _ in self._running.values():
            _stop(process)

    def add(self, job: Job) -> None:
        """Start the job, now or when its turn comes. Its time limit counts from its start."""
        self._waiting.append(job)
        self._start_waiting()

    def restart_clocks(self) -> None:
        """Time limits of those that run count from now: what they waited for has come."""
        deadline = time.monotonic() + self.timeout_s
        self._running = {name: (process, deadline) for name, (process, _) in self._running.items()}

    def wait(self) -> None:
        """Return when all have ended."""
        while self._waiting or self._running:
            for name, (process, deadline) in list(self._running.items()):
                if process.poll() is not None or time.monotonic() >= deadline:
                    self._end(name, process)
            self._start_waiting()
            time.sleep(0.02)

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self.at_once:
            job = self._waiting.pop(0)
            try:
                self._running[job.name] = self._start(job), time.monotonic() + self.timeout_s
            except OSError as error:
                self.reasons[job.name] = f"{job.name} could not start: {error}"

    def _start(self, job: Job) -> subprocess.Popen[bytes]:
        # Output goes to files: a pipe that nobody reads fills up and blocks.
        with (self.folder / f"{job.name}.out").open("wb") as out, (self.folder / f"{job.name}.log").open("wb") as log:
            files: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": log}
            process = subprocess.Popen(
                job.command, **files, cwd=self.folder, env=self.environment, start_new_session=True
            )
        # Data, not address space: java reserves many times what it uses. Children inherit it.
        limit = job.memory_mib << 20
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, limit))
        return process

    def _end(self, name: str, process: subprocess.Popen[bytes]) -> None:
        code = process.returncode
        del self._running[name]
        _stop(process)
        if code is None:
            self.reasons[name] = f"{name} was stopped at its time limit of {self.timeout_s:g} s"
        elif code != 0:
            ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            said = b"\n".join((self.folder / f"{name}.{kind}").read_bytes() for kind in ("out", "log"))
            self.reasons[name] = f"{name} {ended}: {last_words(said)}"


def last_words(log: bytes) -> str:
    """The line of a log that says what went wrong: Python ends with it, java follows it with a stack trace."""
    lines = [line.strip() for line in log.decode(errors="replace").splitlines()]
    telling = [line for line in lines if line and not re.match(r"at |\.\.\. \d+ more|Picked up ", line)]
    return telling[-1][:300] if telling else "it printed nothing"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started: asked first, so that a child can reap its own java, then killed."""
    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2.0)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
