"""pytest tests/test_preemption.py: real runs that are asked to leave, and go on. What Slurm does is in test_slurm."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, tiny_tree

from pvtcap import audit, runlog
from pvtcap.dist import World
from pvtcap.preemption import RESUME_ME, Notice

STEPS = 30


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    """A test that fails half-way leaves no run behind that would slow, and no pipe that would fail, those after it."""
    yield
    while STARTED:
        with STARTED.pop() as process:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Callable[..., subprocess.Popen[str]]:
    """``start(run, ranks, **train)``: ``pvtcap train`` as launch/local.sh starts it."""

    def begin(run: Path, ranks: int, *words: str) -> subprocess.Popen[str]:
        tree = tiny_tree(shapes, run)
        tree["train"] |= {"steps": STEPS}
        tree["data"] |= {"workers": 1}
        file = tmp_path_factory.mktemp("config") / "tiny.yaml"
        file.write_text(yaml.safe_dump(tree))
        environment = {
            **os.environ, "NPROC": str(ranks), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        command = [str(ROOT / "launch" / "local.sh"), "train", str(file), *words]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        STARTED.append(process)
        return process

    return begin


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., subprocess.Popen[str]]) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    process = start(run, 2)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-4000:]
    return run


def wait_for_step(run: Path, process: subprocess.Popen[str], step: int) -> None:
    while process.poll() is None and not any(line["step"] >= step for line in runlog.read(run)):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1][-4000:]


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = {}
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # torchrun runs short helpers too
            if "LOCAL_RANK" in (environment := child.environ()):
                found[int(environment["RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def to_the_agent(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGUSR1)


def to_one_rank(process: subprocess.Popen[str]) -> None:
    ranks_of(process)[1].send_signal(signal.SIGUSR1)


def to_everybody_twice(process: subprocess.Popen[str]) -> None:
    """As scancel, and a time limit, do to a job: decoding processes and their servers too."""
    for _ in range(2):
        for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            member.terminate()
        time.sleep(0.01)


@pytest.mark.parametrize("ask", [to_the_agent, pytest.param(to_one_rank, marks=pytest.mark.long), to_everybody_twice])
def test_asked_to_leave_it_saves_leaves_and_goes_on_as_if_nothing_had_been(
    ask: Callable[[subprocess.Popen[str]], None],
    start: Callable[..., subprocess.Popen[str]],
    unbroken: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    first = start(run, 2)
    wait_for_step(run, first, 7)
    ask(first)
    out, err = first.communicate(timeout=60)
    assert first.returncode == RESUME_ME, err[-4000:]
    assert "checkpoint complete" in out
    (event,) = (line for line in runlog.read(run) if line["kind"] == "event" and "stopped" in line["text"])
    assert 7 <= event["step"] < STEPS
    second = start(run, 2)
    out, err = second.communicate(timeout=200)
    assert second.returncode == 0, err[-4000:]
    assert f"going on from step {event['step']}" in out
    end = f"checkpoints/step_{STEPS:08d}/trainable.safetensors"
    assert (run / end).read_bytes() == (unbroken / end).read_bytes()
    assert audit.audit(run).is_clean


def blocks_sigusr1(process: subprocess.Popen[str]) -> bool:
    """As launch/torchrun.py does from its first line on."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
    return bool(int(mask, 16) >> signal.SIGUSR1 - 1 & 1)


def has_ranks(process: subprocess.Popen[str]) -> bool:
    return len(ranks_of(process)) == 2


@pytest.mark.parametrize("begun", [blocks_sigusr1, has_ranks])
def test_a_notice_that_comes_before_anybody_listens_is_not_lost(
    begun: Callable[[subprocess.Popen[str]], bool], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start(tmp_path / "run", 2)
    while not begun(process):
        time.sleep(0.001)
    assert begun is has_ranks or not ranks_of(process)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == RESUME_ME, err[-4000:]
    assert max(line["step"] for line in runlog.read(tmp_path / "run")) == 1


def test_a_time_limit_of_ones_own_leaves_too_without_torchrun(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start(tmp_path / "run", 1, "train.stop_after_minutes=0.001")
    out, err = process.communicate(timeout=120)
    assert process.returncode == RESUME_ME, err[-4000:]
    assert "stopped at step 1 of 30 by train.stop_after_minutes: checkpoint complete" in out


def test_a_rank_that_was_killed_is_started_again_from_the_last_checkpoint(
    start: Callable[..., subprocess.Popen[str]], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_RESTARTS", "1")
    run = tmp_path / "run"
    process = start(run, 2, "checkpoint.every_steps=4")
    wait_for_step(run, process, 6)
    ranks_of(process)[1].kill()
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-4000:]
    assert "going on from step 4" in out or "going on from step 8" in out
    end = f"checkpoints/step_{STEPS:08d}/trainable.safetensors"
    assert (run / end).read_bytes() == (unbroken / end).read_bytes()


def test_ranks_do_not_outlive_torchrun(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """Nor does what they started; so that the run can be started again at once."""
    process = start(tmp_path / "run", 2, "train.steps=2000")
    wait_for_step(tmp_path / "run", process, 3)
    members = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks_of(process)) == 2
    process.kill()
    _, alive = psutil.wait_procs(members, timeout=20)
    assert not alive


def test_a_rank_that_does_not_move_is_named_and_the_run_ends(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(run, 2, "train.stall_minutes=0.1", "train.steps=2000")
    wait_for_step(run, process, 3)
    ranks_of(process)[1].suspend()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err[-4000:]
    (line,) = (line for line in err.splitlines() if line.startswith("pvtcap: error"))
    assert "rank 1 does not answer (stopped, or its machine is away)" in line
    assert "all_reduce" in json.loads((run / "stall" / "rank_0.json").read_text())["stack"]


def test_a_second_run_in_the_same_folder_is_refused(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = start(run, 1, "train.steps=2000")
    wait_for_step(run, first, 1)
    second = start(run, 1, "train.steps=2000")
    _, err = second.communicate(timeout=90)
    first.send_signal(signal.SIGTERM)
    assert second.returncode == 2, err[-4000:]
    assert f"{run}: another run is at work in this run folder" in err
    first.communicate(timeout=60)
    assert first.returncode == RESUME_ME


def wait_long(world: World, started: str) -> None:
    Path(started).touch()
    time.sleep(100)


def test_what_does_not_train_is_ended_by_sigterm_to_torchrun(tmp_path: Path) -> None:
    program = [str(ROOT / "tests" / "ranks.py"), "test_preemption:wait_long"]
    words = [*program, json.dumps({"started": str(tmp_path / "started")}), str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "torchrun.py"), "--standalone", "--nproc-per-node", "2", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "CUDA_VISIBLE_DEVICES": ""}, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "was killed by SIGTERM" in err


def test_a_notice_is_given_once_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Notice() as notice:
        assert (notice.given, notice.seconds_ago()) == (False, 0.0)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.given
        assert notice.reason == "SIGUSR1"
        assert notice.seconds_ago() >= 0
    assert signal.getsignal(signal.SIGUSR1) == before
