"""pytest tests/test_slurm.py: jobs on a real Slurm cluster of two nodes, which this machine plays."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import ROOT, tiny_tree
from slurmcluster import SlurmCluster, missing_programs

from pvtcap import audit, runlog

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
    return {line["step"]: line["train/loss"] for line in runlog.read(run) if line["kind"] == "train"}


def wait_for_step(cluster: SlurmCluster, job: int, run: Path, step: int, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while max(losses(run), default=0) < step:
        cluster.hurry(job)
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
    """Its port is another program's, too: the next one is taken."""
    file, run = configured(tmp_path, shapes), tmp_path / "run"
    job = cluster.sbatch("--nodes", "2", "--hold", TRAIN, str(file), cwd=tmp_path)
    with socket.socket() as other:
        other.bind(("", 20000 + job * 16 % 20000))
        other.listen()
        cluster.run("scontrol", "release", str(job))
        wait_for_step(cluster, job, run, 5)
    assert cluster.run("scontrol", "requeuehold", str(job)).returncode == 0
    cluster.wait(job, "PENDING", "SPECIAL_EXIT", "REQUEUE_HOLD", timeout=60)
    assert cluster.run("scontrol", "update", f"JobId={job}", "NumTasks=1", "NumNodes=1-1").returncode == 0
    time.sleep(2)  # its processes end
    cluster.run("scontrol", "release", str(job))
    cluster.wait(job, "COMPLETED", timeout=200)
    log = cluster.log(job)
    assert log.count("n2: ranks 1-1") == 1, log[-3000:]
    assert "1 rank, ZeRO-2 (was 2 ranks, ZeRO-2)" in log
    assert losses(run) == pytest.approx(losses(local), rel=1e-5)
    assert int(cluster.job(job)["Restarts"]) >= 1
    assert audit.audit(run).is_clean


def ended_like(run: Path, local: Path) -> None:
    """The weights and losses of the unbroken run, each photo once an epoch."""
    assert (run / END).read_bytes() == (local / END).read_bytes()
    assert losses(run) == losses(local)
    assert audit.audit(run).is_clean


def test_preempted_by_a_job_of_a_higher_partition_it_goes_on_when_that_has_gone(
    cluster: SlurmCluster, shapes: Path, local: Path, tmp_path: Path
) -> None:
    file, run = configured(tmp_path, shapes), tmp_path / "run"
    job = cluster.sbatch("--nodes", "2", TRAIN, str(file), cwd=tmp_path)
    wait_for_step(cluster, job, run, 3)
    words = ("--partition", "high", "--nodes", "2", "--exclusive", "--output", "/dev/null", "--wrap", "sleep 1")
    urgent = cluster.sbatch(*words, cwd=tmp_path)
    cluster.wait(urgent, "COMPLETED", timeout=90)
    cluster.wait(job, "COMPLETED", timeout=200)
    assert int(cluster.job(job)["Restarts"]) >= 1
    assert "checkpoint complete" in cluster.log(job)
    ended_like(run, local)


@pytest.mark.long
def test_before_its_time_limit_it_saves_and_is_queued_again(
    cluster: SlurmCluster, shapes: Path, local: Path, tmp_path: Path
) -> None:
    """Captions of many photos at every step make it last longer than its minute; they change no weight."""
    slow = {"evaluate": {"every_steps": 1, "num_beams": 3}, "data": {"val": str(shapes / "train")}}
    file, run = configured(tmp_path, shapes, **slow), tmp_path / "run"
    job = cluster.sbatch("--nodes", "2", "--time", "1", "--signal", "USR1@38", TRAIN, str(file), cwd=tmp_path)
    cluster.wait(job, "COMPLETED", timeout=400)
    log = cluster.log(job)
    assert "by SIGUSR1: checkpoint complete" in log
    assert "is queued again" in log
    assert int(cluster.job(job)["Restarts"]) == log.count("is queued again")
    ended_like(run, local)
    starts = [json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines()]
    assert [one["code"] for one in starts] == [75] * len(starts)


def processes_on(cluster: SlurmCluster, node: str) -> list[psutil.Process]:
    """What Slurm runs on a node: all nodes are this machine, and so may those of another test's cluster be."""
    ours = {"SLURMD_NODENAME": node, "SLURM_CONF": cluster.environment["SLURM_CONF"]}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if ours.items() <= process.environ().items():
                found.append(process)
    return found


def test_a_rank_and_then_a_whole_node_die_and_it_comes_back_without_a_person(
    cluster: SlurmCluster, shapes: Path, local: Path, tmp_path: Path
) -> None:
    file, run = configured(tmp_path, shapes, checkpoint={"every_steps": 2}), tmp_path / "run"
    job = cluster.sbatch("--nodes", "2", TRAIN, str(file), cwd=tmp_path)
    wait_for_step(cluster, job, run, 5)
    (rank,) = (one for one in processes_on(cluster, "n2") if "LOCAL_RANK" in one.environ() and "-u" in one.cmdline())
    rank.kill()
    deadline = time.monotonic() + 120
    while int(cluster.job(job)["Restarts"]) < 1:
        assert time.monotonic() < deadline, cluster.log(job)[-6000:]
        time.sleep(0.2)
    wait_for_step(cluster, job, run, max(losses(run)) + 3)
    cluster.stop("n2", signal.SIGKILL)
    for process in processes_on(cluster, "n2"):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + 120
    while int(cluster.job(job)["Restarts"]) < 2:
        assert time.monotonic() < deadline, cluster.log(job)[-6000:]
        time.sleep(0.2)
    cluster.start_node("n2")
    cluster.wait(job, "COMPLETED", timeout=200)
    assert "was killed by SIGKILL" in cluster.log(job)
    ended_like(run, local)


def test_a_job_that_is_cancelled_does_not_come_back(cluster: SlurmCluster, shapes: Path, tmp_path: Path) -> None:
    file, run = configured(tmp_path, shapes, steps=2000), tmp_path / "run"
    job = cluster.sbatch("--nodes", "2", TRAIN, str(file), cwd=tmp_path)
    wait_for_step(cluster, job, run, 3)
    cluster.run("scancel", str(job))
    cluster.wait(job, "CANCELLED", timeout=60)
    time.sleep(3)
    assert cluster.state(job) == "CANCELLED"
    assert "checkpoint complete" in cluster.log(job)
    assert cluster.job(job)["Restarts"] == "0"


def test_every_node_is_examined(cluster: SlurmCluster, tmp_path: Path) -> None:
    words = ("srun", "--nodes", "2", "--ntasks-per-node", "1", str(ROOT / "launch" / "node.sh"), "doctor")
    done = cluster.run(*words, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for node in ("n1", "n2"):
        assert f"{node}     ok  pvtcap: " in done.stdout
        assert f"{node}  warn   GPU: none that torch can use" in done.stdout
        assert f"{node}     ok  Slurm: low* 2, high 2" in done.stdout


def may_mount() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="this user may not mount: no node can be given a view of its own")
def test_a_node_that_does_not_see_the_shards_is_named_and_so_is_a_full_disk(
    cluster: SlurmCluster, shapes: Path, tmp_path: Path
) -> None:
    blind = tmp_path / "blind.sh"
    blind.write_text(
        f"#!/bin/bash\nif [ $SLURMD_NODENAME = n2 ]; then exec unshare --mount bash -c "
        f'\'mount -t tmpfs none {shapes}; exec "$@"\' - "$@"; fi; exec "$@"\n'
    )
    full = tmp_path / "full.sh"
    mount = f"mount -t tmpfs -o size=3m none {tmp_path}/run"
    full.write_text(f'#!/bin/bash\nexec unshare --mount bash -c \'{mount}; exec "$@"\' - "$@"\n')
    for script in (blind, full):
        script.chmod(0o755)
    file = configured(tmp_path, shapes)
    (tmp_path / "run").mkdir()
    jobs = {
        name: cluster.sbatch(
            "--nodes", nodes, f"--export=ALL,PVTCAP_RUN={tmp_path}/{name}.sh", TRAIN, str(file), cwd=tmp_path
        )
        for name, nodes in (("blind", "2"), ("full", "1"))
    }
    for job in jobs.values():
        cluster.wait(job, "FAILED", timeout=120)
        assert cluster.job(job)["ExitCode"] == "2:0"
        assert cluster.job(job)["Restarts"] == "0"
    (line,) = (line for line in cluster.log(jobs["blind"]).splitlines() if line.startswith("pvtcap: error"))
    assert f"on node n2: {shapes}/train: no ShardSet here" in line
    (line,) = (line for line in cluster.log(jobs["full"]).splitlines() if line.startswith("pvtcap: error"))
    assert "no room for a checkpoint" in line
    assert "MB free" in line
