"""pytest tests/test_slurm.py: jobs on a real Slurm cluster of two nodes, which this machine plays."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, tiny_tree
from slurmcluster import SlurmCluster, missing_programs

from pvtcap import audit

pytestmark = pytest.mark.skipif(
    bool(missing_programs()), reason=f"no Slurm on this machine: {', '.join(missing_programs())}"
)
STEPS = 24
TRAIN = str(ROOT / "slurm" / "train.sbatch")
END = f"checkpoints/step_{STEPS:08d}/trainable.safetensors"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def configured(folder: Path, shapes: Path, steps: int = STEPS, **changed: Any) -> Path:
    """folder/tiny.yaml, whose run folder is folder/run."""
    tree = tiny_tree(shapes, folder / "run")
    tree["model"] |= {"dropout": 0.0}
    tree["data"] |= {"micro_batch": 2, "workers": 1}
    tree["train"] |= {"steps": steps}
    tree["optim"] = {"lr": 1e-4, "warmup_steps": 5, "min_lr_ratio": 1.0}
    for section, values in changed.items():
        tree[section] = tree.get(section, {}) | values
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def losses(run: Path) -> dict[int, float]:
    path = run / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    return {line["step"]: line["train/loss"] for line in lines if line["kind"] == "train"}


def wait_for_step(cluster: SlurmCluster, job: int, run: Path, step: int, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while max(losses(run), default=0) < step:
        assert time.monotonic() < deadline, cluster.log(job)[-6000:]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, shapes: Path, cluster: SlurmCluster) -> Path:
    """The run folder of launch/local.sh with two processes."""
    folder = tmp_path_factory.mktemp("local")
    file = configured(folder, shapes)
    cluster.environment["NPROC"] = "2"
    done = cluster.run(str(ROOT / "launch" / "local.sh"), "train", str(file), timeout=200)
    del cluster.environment["NPROC"]
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "run"


def test_two_nodes_and_two_processes_give_the_losses_of_one_machine_side_by_side(
    cluster: SlurmCluster, shapes: Path, local: Path, tmp_path: Path
) -> None:
    """Two jobs at once, which share a node: they must not meet."""
    jobs = {}
    for name, nodes, processes in (("two-nodes", 2, 1), ("one-node", 1, 2)):
        file = configured(tmp_path / name, shapes)
        words = ("--nodes", str(nodes), f"--export=ALL,NPROC={processes}", "--nodelist", "n1,n2"[: 3 * nodes - 1])
        jobs[name] = cluster.sbatch(*words, TRAIN, str(file), cwd=tmp_path)
    for name, job in jobs.items():
        cluster.wait(job, "COMPLETED", timeout=200)
        assert losses(tmp_path / name / "run") == losses(local)
        assert (tmp_path / name / "run" / END).read_bytes() == (local / END).read_bytes()
    log = cluster.log(jobs["two-nodes"])
    assert "n1: ranks 0-0" in log
    assert "n2: ranks 1-1" in log
    assert "n1: ranks 0-1" in cluster.log(jobs["one-node"])


def test_queued_again_on_fewer_nodes_it_goes_on_to_the_same_end(
    cluster: SlurmCluster, shapes: Path, local: Path, tmp_path: Path
) -> None:
    file, run = configured(tmp_path, shapes), tmp_path / "run"
    job = cluster.sbatch("--nodes", "1-2", TRAIN, str(file), cwd=tmp_path)
    wait_for_step(cluster, job, run, 5)
    cluster.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    assert cluster.run("scontrol", "requeue", str(job)).returncode == 0
    cluster.wait(job, "COMPLETED", timeout=200)
    cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    log = cluster.log(job)
    assert log.count("n2: ranks 1-1") == 1, log[-3000:]
    assert "1 ranks, ZeRO-2 (was 2 ranks, ZeRO-2)" in log
    assert losses(run) == pytest.approx(losses(local), rel=1e-5)
    assert cluster.job(job)["Restarts"] == "1"
    assert audit.audit(run).is_clean
