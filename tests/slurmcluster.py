"""A real Slurm cluster of several nodes on this machine, for tests: munged, slurmctld and a slurmd a node.

    with SlurmCluster(folder, nodes=2) as cluster:
        job = cluster.sbatch("--nodes", "2", "slurm/train.sbatch", "tiny.yaml")
        cluster.wait(job, "COMPLETED", timeout=120)

Each slurmd has a name, port and spool folder of its own; all else of it is this machine. What a site has in
/etc/slurm lies in ``folder``, and nothing is left running. Needs Debian's slurm-wlm and munge, no root.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Self

import heldport
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue", "sinfo")
_WHERE = os.pathsep.join(["/usr/sbin", "/usr/local/sbin", os.environ.get("PATH", "")])


def missing_programs() -> list[str]:
    """What a test that needs Slurm says it skips for."""
    return [name for name in PROGRAMS if shutil.which(name, path=_WHERE) is None]


class SlurmCluster:
    """Nodes n1, n2, …, each with ``cpus`` CPUs; partitions ``low`` and ``high``, whose jobs preempt those of low."""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 2) -> None:
        self.folder, self.nodes, self.cpus = folder, [f"n{number + 1}" for number in range(nodes)], cpus
        self._held = {name: heldport.hold() for name in (*self.nodes, "ctld")}
        self._ports = {name: held.getsockname()[1] for name, held in self._held.items()}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), _WHERE]),  # jobs call pvtcap
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }

    def __enter__(self) -> Self:
        for name in ("state", "munge", *self.nodes):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        try:
            self._start_munge()
            (self.folder / "slurm.conf").write_text(self._configuration())
            self._start("slurmctld", "-D", "-c")
            self._until(lambda: self.run("scontrol", "ping").returncode == 0, "slurmctld answers")
            for node in self.nodes:
                self.start_node(node)
            self._until(lambda: self._idle() == len(self.nodes), "all nodes are idle")
        except BaseException as error:
            self.__exit__()
            if isinstance(error, AssertionError):
                pytest.skip(f"Slurm is installed and does not start here: {error}")  # its daemons, not a job of ours
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if "slurmctld" in self._daemons:
            self.run("scancel", "--full", "--signal=KILL", "--user", getpass.getuser())
        for name in [*self.nodes, "slurmctld", "munged"]:
            self.stop(name)
        for held in self._held.values():
            held.close()

    def start_node(self, node: str) -> None:
        self._start(node, "-D", "-N", node, program="slurmd")

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """End a daemon, and what a slurmd runs with it."""
        if (daemon := self._daemons.pop(name, None)) is None:
            return
        daemon.send_signal(number)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def run(self, *words: str, timeout: float = 60, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """One of Slurm's commands."""
        return subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False, cwd=cwd
        )

    def sbatch(self, *words: str, cwd: Path) -> int:
        done = self.run("sbatch", "--parsable", *words, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def job(self, job: int | str) -> dict[str, str]:
        """What scontrol says of a job."""
        done = self.run("scontrol", "--oneliner", "show", "job", str(job))
        return dict(part.split("=", 1) for part in done.stdout.split() if "=" in part)

    def state(self, job: int | str) -> str:
        return self.job(job).get("JobState", "GONE")

    def wait(self, job: int, *states: str, timeout: float, hurry: str | None = None) -> str:
        """The state, once it is one of these; AssertionError, with the job's log, when that takes too long.

        ``hurry`` is another job that this one waits for.
        """
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            self.hurry(hurry or job)
            final = state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "GONE")
            never = self.job(job).get("Reason") == "DependencyNeverSatisfied"
            if final or never or time.monotonic() > deadline:
                raise AssertionError(f"job {job} is {state}\n{self.account(job)}")
            time.sleep(0.2)
        return state

    def hurry(self, job: int | str) -> None:
        """Slurm lets a job that is queued again wait for two minutes: not here.

        But for two seconds: what is started in the second in which it was killed, its node refuses as revoked.
        """
        told = self.job(job)
        if told.get("Reason") == "BeginTime" and told["StartTime"] != "Unknown":  # unknown in the last instant
            left = datetime.fromisoformat(told["StartTime"]) - datetime.now()
            if left.total_seconds() > 5:
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")

    def log(self, job: int) -> str:
        path = Path(self.job(job).get("StdOut", "/nowhere"))
        return path.read_text(errors="replace") if path.exists() else f"(no {path})"

    def account(self, job: int) -> str:
        """What can be told of a job that did not do what it should: all jobs' states, and the logs beside its own."""
        told = [self.run("scontrol", "--oneliner", "show", "job").stdout]
        folder = Path(self.job(job).get("WorkDir", "/nowhere"))
        told += [f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(folder.glob("*.log"))]
        return "\n".join(told)

    def _start(self, name: str, *words: str, program: str | None = None) -> None:
        path = shutil.which(program or name, path=_WHERE)
        assert path is not None, f"no {program or name}"
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                [path, *words], env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        key, log = munge / "key", munge / "log"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge.chmod(0o711)
        self.socket = munge / "socket"
        # --force: the temporary folder above is everybody's, which it would take for a danger.
        words = ("--foreground", "--force", f"--socket={self.socket}", f"--key-file={key}", f"--log-file={log}")
        more = (f"--pid-file={munge / 'pid'}", f"--seed-file={munge / 'seed'}")
        self._start("munged", *words, *more)
        self._until(self.socket.exists, "munged listens")

    def _until(self, holds: object, what: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not holds():  # type: ignore[operator]
            if time.monotonic() > deadline:
                logs = "\n".join(f"{path}: {path.read_text(errors='replace')[-800:]}" for path in self._logs())
                raise AssertionError(f"not within {seconds:.0f} s: {what}\n{logs}")
            time.sleep(0.1)

    def _logs(self) -> list[Path]:
        return sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log")])

    def _idle(self) -> int:
        done = self.run("sinfo", "--noheader", "--Node", "--partition", "low", "--format", "%N %T")
        return sum(line.endswith(" idle") for line in done.stdout.splitlines())

    def _configuration(self) -> str:
        here, user, host = self.folder, getpass.getuser(), socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={self._ports[node]} "
            f"CPUs={self.cpus} RealMemory=4000 State=UNKNOWN"
            for node in self.nodes
        )
        listed = ",".join(self.nodes)
        # Where ranks meet follows from the number of their job: two clusters on this machine have other numbers.
        first = 1 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        return f"""
ClusterName=test
FirstJobId={first}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={self._ports["ctld"]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={self.socket}
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SlurmdParameters=config_overrides
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/%n/spool
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/%n/slurmd.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/%n.log
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1,requeue_delay=1
SlurmdTimeout=20
KillWait=20
MinJobAge=600
InactiveLimit=0
MpiDefault=none
{nodes}
PartitionName=low Nodes={listed} Default=YES PriorityTier=1 PreemptMode=REQUEUE MaxTime=INFINITE State=UP
PartitionName=high Nodes={listed} PriorityTier=9 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
