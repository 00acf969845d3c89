"""pytest tests/test_loader.py"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pvtcap.errors import ShardError
from pvtcap.loader import Board, Rooms, Work, load


class Doing(Work[int]):
    """Makes number 5 in the way that ``fate`` says, and all others by squaring."""

    def __init__(self, fate: str) -> None:
        self.fate = fate

    def make(self, number: int) -> int:
        self.board.begin(f"shard {number}, sample täst")
        if number == 5:
            match self.fate:
                case "error":
                    raise ShardError("damaged", where="shard 5", got=7, do="Mend it.")
                case "bug":
                    raise KeyError("a mistake of ours")
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "stop idle":
                    self.board.idle()
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "slow":
                    for _ in range(8):  # many samples, none of which takes long
                        time.sleep(0.3)
                        self.board.begin("another")
        return number * number


def loaded(fate: str, workers: int, timeout_s: float) -> Iterator[int]:
    return load(Doing(fate), range(9), workers=workers, timeout_s=timeout_s, rank=3, pin_memory=False)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order(workers: int) -> None:
    assert list(loaded("", workers, 60)) == [n * n for n in range(9)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_arrives_as_it_was_raised(workers: int) -> None:
    with pytest.raises(ShardError, match=r"shard 5: damaged; got 7\. Mend it\."):
        list(loaded("error", workers, 60))
    with pytest.raises(KeyError):
        list(loaded("bug", workers, 60))


def test_many_quick_samples_are_no_hang() -> None:
    assert list(loaded("slow", 1, 1.0))[-1] == 64


@pytest.mark.parametrize(("fate", "message"), [
    ("die", "shard 5, sample täst: a decoding process of rank 3 died. Out of memory?"),
    ("stop", r"shard 5, sample täst: a decoding process of rank 3 hangs; got \d+ seconds at one sample; wanted less"),
    ("stop idle", r"a decoding process of rank 3 hangs; got \d+ seconds"),
])  # fmt: skip
def test_a_worker_that_dies_or_hangs_is_named_with_what_it_was_at(fate: str, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        list(loaded(fate, 2, 1.5))


def test_a_board_keeps_the_end_of_a_long_name() -> None:
    board = Board(0)
    board.begin("x" * 1000 + "the key")
    (row,) = board.busy()
    assert row.process == os.getpid()
    assert row.where.endswith("xthe key")
    board.begin("short")
    assert [row.where for row in board.busy()] == ["short"]
    board.idle()
    assert board.busy() == []


class Mask(Work[list[int]]):
    """Which signals a worker does not let in."""

    def make(self, number: int) -> list[int]:
        return sorted(int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ()))


@pytest.mark.parametrize("begun", ["", "from pvtcap.processes import begin_server; begin_server(['pvtcap.stream'])\n"])
def test_what_slurm_sends_to_all_processes_does_not_end_a_worker(begun: str) -> None:
    """In a process of its own, since another test may have started what starts workers."""
    program = (
        f"{begun}from test_loader import Mask, load\n"
        "print(list(load(Mask(), [0], workers=1, timeout_s=60, rank=0, pin_memory=False)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == [[signal.SIGUSR1, signal.SIGTERM]]


def test_a_server_begun_early_has_imported_what_it_was_told() -> None:
    program = (
        "from pvtcap.processes import begin_server, forking_server\n"
        "begin_server(['pvtcap.stream'])\n"
        "look = 'import sys; sys.exit(int(\"pvtcap.stream\" not in sys.modules))'\n"
        "worker = forking_server([]).Process(target=exec, args=(look,))\n"
        "worker.start(); worker.join(); raise SystemExit(worker.exitcode)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    assert subprocess.run([sys.executable, "-c", program.replace("stream'", "pixels'")], check=False).returncode == 1


def test_a_script_that_starts_workers_as_it_is_read_is_told_why_not(tmp_path: Path) -> None:
    program = tmp_path / "unguarded.py"
    program.write_text(
        "import test_loader\nfrom pvtcap.loader import load\n"
        "next(load(test_loader.Doing(''), range(3), workers=1, timeout_s=30, rank=0, pin_memory=False))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, str(program)], env=environment, timeout=60, capture_output=True, text=True)
    assert done.returncode == 1
    assert "is all that it does under 'if __name__ == \"__main__\":'?" in done.stderr.splitlines()[-1]


ABANDONED = """
import test_loader
from pvtcap.loader import load

if __name__ == "__main__":
    batches = load(test_loader.Doing(''), range(100), workers=1, timeout_s=30, rank=0, pin_memory=False)
    print(next(batches))
    if {fails}:
        raise SystemExit(3)
"""


@pytest.mark.parametrize("fails", [True, False])
def test_a_program_that_has_had_enough_ends(tmp_path: Path, fails: bool) -> None:
    """The workers are sheltered from SIGTERM, with which multiprocessing would end them before it waits."""
    program = tmp_path / "abandoned.py"
    program.write_text(ABANDONED.format(fails=fails))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, str(program)], env=environment, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3 if fails else 0, "0\n"), done.stderr


def test_rooms_take_no_memory_before_they_are_used() -> None:
    """A start would wait for it: a hundredth of a second for each 10 MB."""
    me = psutil.Process()
    before = me.memory_info().shared
    rooms = Rooms(workers=1, size_bytes=16 << 20)
    assert me.memory_info().shared - before < 4 << 20
    # Not this process's to take, as there are workers; but to look into.
    rooms.storage()[: 16 << 20] = 7
    assert me.memory_info().shared - before > 12 << 20
