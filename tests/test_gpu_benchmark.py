"""benchmarks/gpu.py at a toy size on the CPU: every row is there, or named with its reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PARTS = {
    "data": 3,  # device, photos, features
    "a row each": 4,  # two inputs, two sizes
    "packed": 4,
    "engine": 4,
    "whole loop from photos": 1,
    "whole loop from features": 1,
    "engine from features, compiled": 1,
    "engine from photos, compiled": 1,
    "ZeRO-0": 2,
    "ZeRO-3": 2,
    "ZeRO-1": 2,
    "whole loop from features, compiled": 1,
    "a row each, compiled": 2,
}
TRAINING = ("step_s", "captions_per_s", "photos_per_s", "model_tflops")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    yield gpu
    del sys.modules["gpu"]


def run_toy(out: Path, *words: str) -> tuple[dict[str, Any], str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--toy", "--out", str(out), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(out.read_text()), done.stdout


def check_whole(content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows by part; each has what its kind has, or a reason."""
    assert content["complete"] and content["options"]["toy"]
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        rows.setdefault(row["part"], []).append(row)
    assert len(rows.pop("loader")) in (2, 4)  # one worker or two, as there are CPUs
    assert {part: len(of_part) for part, of_part in rows.items()} == PARTS
    for row in content["rows"]:
        wanted = {"shards": ("bytes_per_photo",), "device": ("device", "product_tflops")}.get(
            row["loop"], ("photos_per_s",)
        )
        if row["loop"] in ("engine", "packed", "a row each", "whole loop"):
            wanted = TRAINING
        assert ("reason" in row) != all(row.get(key) for key in wanted), row
    return rows


def test_what_is_measured_and_what_is_left_out(tmp_path: Path) -> None:
    measured = ("data", "a row each", "packed", "engine", "whole loop from features")
    content, printed = run_toy(tmp_path / "gpu.json", "--parts", *measured)
    for part, rows in check_whole(content).items():
        for row in rows:
            assert row.get("reason") == (None if part in measured else "left out: not among --parts"), row
    summary = {line["what"]: line for line in content["summary"]}
    assert summary["engine, photos, beside a row each, photos"]["measured"] > 0
    epochs = summary["five of them from features, s"]
    (loop,) = [row for row in content["rows"] if row["part"] == "whole loop from features"]
    assert epochs["measured"] == pytest.approx(5 * 145_000 / loop["captions_per_s"])
    assert summary["Flickr30k-sized epoch from photos, s"]["measured"] is None
    assert "engine, ZeRO-2" in printed and "left out: not among --parts: engine, ZeRO-1, photos 4" in printed


@pytest.mark.long
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    content, _ = run_toy(tmp_path / "gpu.json")
    check_whole(content)
    assert [row for row in content["rows"] if "reason" in row] == []


def test_a_budget_that_is_over_leaves_out_by_name(tmp_path: Path) -> None:
    content, _ = run_toy(tmp_path / "gpu.json", "--budget-s", "0")
    check_whole(content)
    assert {row["reason"] for row in content["rows"]} == {"left out: the budget is over", "left out: no photos"}


def test_whoever_fails_is_a_row_and_the_rest_go_on(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU here whose memory could run out: the processes are played."""
    sizes = [gpu.Contestant("engine", of, photos) for of in ("photos", "features") for photos in (32, 64, 128)]
    plays = [
        ([{"ready": True}, {"photos_per_s": 1.0}], "OutOfMemoryError: CUDA out of memory."),
        ([{"ready": True}] * 4, ""),
    ]

    monkeypatch.setattr(gpu, "run_child", lambda *_: plays.pop(0))
    rows = gpu.run_part(gpu.Part("engine", "steps", 60, sizes), tmp_path, gpu.Size(), monotonic() + 60)
    told = {(row.contestant.input, row.contestant.photos): row.reason for row in rows}
    assert told == {
        ("photos", 32): None,
        ("photos", 64): "OutOfMemoryError: CUDA out of memory.",
        ("photos", 128): "64 photos did not fit in memory",
        **{("features", photos): None for photos in (32, 64, 128)},
    }


def test_a_part_that_cannot_begin_says_why(gpu: ModuleType, tmp_path: Path) -> None:
    """A real process; what it should train on is not there."""
    part = gpu.Part("engine", "steps", 60, [gpu.Contestant("engine", of, 4, 2) for of in ("photos", "features")])
    rows = gpu.run_part(part, tmp_path, gpu.TOY, monotonic() + 60)
    assert len(rows) == 2 and all(row.reason.startswith("ShardError: ") for row in rows), rows


def test_a_process_out_of_time_is_stopped_and_named(gpu: ModuleType, tmp_path: Path) -> None:
    part = gpu.Part("data", "data", 2, [gpu.Contestant("device"), gpu.Contestant("shards")])
    rows = gpu.run_part(part, tmp_path, gpu.TOY, monotonic() + 60)
    assert [row.reason for row in rows] == ["stopped: not done after 2 s"] * 2
