"""pytest tests/test_remote_training.py: the stream and whole runs from ShardSets that lie behind a URL."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from shardserver import ShardServer
from test_stream import rank, steps, view

from pvtcap.config import Config, SourceConfig, batch_plan
from pvtcap.errors import ShardError
from pvtcap.sources import Sources
from pvtcap.stream import View, train_batches


@pytest.fixture
def server(shapes: Path) -> Iterator[ShardServer]:
    with ShardServer(shapes / "train") as server:
        yield server


def remote(server: ShardServer, config: Config, cache: Path, **data: object) -> tuple[Sources, View]:
    """As ``view``, of the server's ShardSet, whose texts are not read for the vocabulary: nothing is fetched yet."""
    _, local = view(server.folder, config, cache_dir=cache, **data)
    chosen = local.data.model_copy(update={"train": (SourceConfig(path=server.url),)})
    return Sources.open(chosen), replace(local, data=chosen)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_url_are_those_from_the_folder_and_each_file_comes_once(
    server: ShardServer, shapes: Path, config: Config, tmp_path: Path, workers: int
) -> None:
    seen = remote(server, config, tmp_path / "cache", workers=workers)
    assert steps(seen, 2, 0, 7) == steps(view(shapes / "train", config), 1, 0, 7)
    # Two ranks with their workers and their read-ahead all want them.
    fetched = {name: len(asked) for name, asked in server.asked.items() if name != "manifest.json"}
    assert fetched == dict.fromkeys(fetched, 1)
    assert len([name for name in fetched if name.endswith(".tar")]) == 3


def test_what_is_needed_is_fetched_before_it_is_asked_for(server: ShardServer, config: Config, tmp_path: Path) -> None:
    seen = remote(server, config, tmp_path / "cache", lanes=1, shuffle_window_shards=1)
    batches = train_batches(*seen, batch_plan(seen[1].data, 1), rank(0, 1), seed=0, first_step=0)
    next(batches)  # of the first shard; the two others are for later steps
    for _ in range(600):
        tars = [name for name in server.asked if name.endswith(".tar")]
        if len(tars) == 3:
            break
        server.go.wait(0.05)
    assert len(tars) == 3
    assert len(list(itertools.islice(batches, 5))) == 5


def test_a_slow_server_is_no_hanging_worker_and_a_lost_one_is_a_line(
    server: ShardServer, config: Config, tmp_path: Path
) -> None:
    seen = remote(server, config, tmp_path / "cache", workers=1, worker_timeout_s=10)
    tars = [entry.file for entry in seen[0].shardsets[0].manifest.shards]
    server.faults = {name: iter(["hold"]) for name in tars}
    batches = train_batches(*seen, batch_plan(seen[1].data, 1), rank(0, 1), seed=0, first_step=0)
    let_go = threading.Timer(12, server.go.set)
    let_go.start()
    next(batches)
    let_go.join()
    other = remote(server, config, tmp_path / "other", workers=1)
    server.faults = {name: itertools.repeat("404") for name in tars}
    with pytest.raises(ShardError, match=r"set/.*\.tar: cannot be fetched: there is no such file"):
        next(train_batches(*other, batch_plan(other[1].data, 1), rank(0, 1), seed=0, first_step=0))


def test_two_trainers_share_one_cache(server: ShardServer, tree: dict[str, Any], tmp_path: Path) -> None:
    def start(name: str, train: str) -> subprocess.Popen[str]:
        chosen = tree | {
            "run": {"dir": str(tmp_path / name)},
            "data": {**tree["data"], "train": train, "cache_dir": str(tmp_path / "cache"), "workers": 1},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(chosen))
        words = [sys.executable, "-m", "pvtcap", "train", str(tmp_path / f"{name}.yaml")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    runs = {name: start(name, server.url) for name in ("one", "two")}
    runs["local"] = start("local", tree["data"]["train"])
    losses = {}
    for name, process in runs.items():
        _, told = process.communicate(timeout=500)
        assert process.returncode == 0, told[-3000:]
        lines = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        losses[name] = [line["train/loss"] for line in lines if line["kind"] == "train"]
    assert losses["one"] == losses["two"] == losses["local"]
    assert {len(asked) for name, asked in server.asked.items() if name.endswith(".tar")} == {1}
