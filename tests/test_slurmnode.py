"""pytest tests/test_slurmnode.py: what nodes agree on and when a job comes back, with a scontrol that answers as told.

Whole jobs on a real Slurm are in test_slurm.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

FACTS = {"version": "0.1.0", "places": {"data": "abc"}, "problem": None, "processes": 1, "threads": 1}


@pytest.fixture
def slurmnode() -> ModuleType:
    import slurmnode

    return slurmnode


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """``scontrol("JobState=RUNNING")`` is what it says of a job; a file that has its calls of requeue."""
    calls = tmp_path / "requeued"

    def answer(job: str) -> Path:
        program = tmp_path / "bin" / "scontrol"
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            f'#!/bin/sh\ncase "$*" in requeue*) echo $2 >> {calls};; *node*) echo NodeAddr=127.0.0.1;; '
            f"*) echo JobId=7 {job};; esac\n"
        )
        program.chmod(0o755)
        return calls

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return answer


@pytest.fixture
def words(tree: dict[str, Any], tmp_path: Path) -> list[str]:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    return ["train", str(file)]


def node(slurmnode: ModuleType, index: int = 0, job: int = 7, restart: int = 0) -> Any:
    return slurmnode.Node(job, restart, index, ["n1", "n2"], 1)


def test_three_starts_that_come_no_further_are_the_last(
    slurmnode: ModuleType,
    scontrol: Callable[[str], Path],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = scontrol("JobState=RUNNING Reason=None")
    for restart in range(3):
        assert slurmnode._queue_again(node(slurmnode, restart=restart), words, 137) == 137
    assert calls.read_text() == "7\n7\n"
    assert "ended with 137 at step 0, as 3 times in a row: not queued again" in capsys.readouterr().err
    record = [json.loads(line) for line in (tmp_path / "run" / "restarts.jsonl").read_text().splitlines()]
    assert [(one["job"], one["start"], one["code"], one["step"]) for one in record] == [
        (7, start, 137, 0) for start in (1, 2, 3)
    ]
    slurmnode._queue_again(node(slurmnode, job=8), words, 137)  # mended and submitted anew
    assert calls.read_text() == "7\n7\n8\n"


def test_progress_begins_the_count_anew(
    slurmnode: ModuleType, scontrol: Callable[[str], Path], words: list[str], tmp_path: Path
) -> None:
    calls = scontrol("JobState=RUNNING Reason=None")
    for step in (0, 0, 4, 4, 8):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").touch()
        slurmnode._queue_again(node(slurmnode), words, 75)
    assert calls.read_text() == "7\n" * 5


@pytest.mark.parametrize(
    ("said", "comes_back"),
    [
        ("JobState=COMPLETING Reason=None", False),  # scancel
        ("JobState=PENDING Reason=BeginTime", False),  # preempted: Slurm has queued it again itself
        ("JobState=COMPLETING Reason=TimeLimit", True),
    ],
)
def test_what_slurm_has_decided_stands(
    slurmnode: ModuleType, scontrol: Callable[[str], Path], words: list[str], said: str, comes_back: bool
) -> None:
    calls = scontrol(said)
    slurmnode._queue_again(node(slurmnode), words, 75)
    assert calls.exists() == comes_back


def agree(slurmnode: ModuleType, ours: dict[str, Any], theirs: dict[str, Any]) -> Any:
    """What the first node says when the second has other facts; both at once."""
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(slurmnode.follow, node(slurmnode, 1), theirs)
        try:
            plan, heard = slurmnode.lead(node(slurmnode), ours)
        except slurmnode.NodeError as error:
            with pytest.raises(SystemExit):
                other.result()
            return str(error)
        assert {key: other.result()[key] for key in plan} == plan
        return heard


def test_nodes_that_are_alike_meet_and_others_are_named(slurmnode: ModuleType, scontrol: Callable[[str], Path]) -> None:
    scontrol("")
    assert agree(slurmnode, FACTS, FACTS) == {0: FACTS, 1: FACTS}
    assert agree(slurmnode, FACTS, {**FACTS, "version": "0.2.0"}) == "on node n2: pvtcap 0.2.0; n1 has 0.1.0"
    assert "on node n2: no disk" in agree(slurmnode, FACTS, {**FACTS, "problem": "no disk"})
    assert "on node n2: data is not what n1 has there" in agree(slurmnode, FACTS, {**FACTS, "places": {}})


def test_a_node_that_does_not_come_is_named_on_both_sides(
    slurmnode: ModuleType, scontrol: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol("")
    monkeypatch.setattr(sys.modules["meeting"], "PATIENCE_S", 0.5)
    with pytest.raises(slurmnode.NodeError, match="n2: not heard of within"):
        slurmnode.lead(node(slurmnode), FACTS)
    with pytest.raises(slurmnode.NodeError, match="n2: cannot reach n1"):
        slurmnode.follow(node(slurmnode, 1), FACTS)


def test_an_array_task_builds_its_part_in_a_folder_of_its_own(
    slurmnode: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["shards", "conceptual-captions", "--out", "data/cc3m", "--tsv", "a.tsv"]
    assert slurmnode._part(words) == words
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "16")
    assert slurmnode._part(words) == [*words[:3], "data/cc3m/part-3", "--tsv", "a.tsv", "--part", "3/16"]
    assert slurmnode._part(["shards", "join", "a", "b"]) == ["shards", "join", "a", "b"]
    with pytest.raises(slurmnode.NodeError, match="needs --out DIR"):
        slurmnode._part(["shards", "conceptual-captions"])


def test_a_task_stopped_behind_its_last_shard_and_queued_again_has_done_its_work(
    slurmnode: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Started(Exception):
        pass

    def start(program: str, words: list[str]) -> None:
        raise Started

    monkeypatch.setattr(slurmnode.os, "execv", start)
    monkeypatch.setattr(slurmnode.Node, "here", lambda: None)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    words = ["shards", "conceptual-captions", "--out", str(tmp_path)]

    def runs(*more: str) -> bool:
        try:
            assert slurmnode.main([*words, *more]) == 0
        except Started:
            return True
        return False

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert runs()  # nothing is there yet
    (tmp_path / "part-2").mkdir()
    (tmp_path / "part-2" / "manifest.json").write_text("{}")
    assert not runs()
    assert capsys.readouterr().out == f"pvtcap: {tmp_path}/part-2 was built before this job was queued again\n"
    assert runs("--overwrite")
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert runs()  # and is told that it is already built
