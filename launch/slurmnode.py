"""One node of a Slurm job: agree with the other nodes, start the ranks here, and see to it that the job comes back.

    python launch/slurmnode.py train configs/coco.yaml       started by node.sh, once a node

First each node tells the first one what it has: version, data, run folder, number of processes. Within a minute all
know the ranks, or one line says which node is why not. Then launch/torchrun.py runs. When the ranks were preempted or
died, the first node queues the job again, unless three starts have come no further than one step.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchrun

PATIENCE_S = 60.0  # for all nodes to say what they have
_PORTS, _STARTS = 16, 3


class NodeError(Exception):
    """One line for the person, by one node."""


@dataclass(frozen=True)
class Node:
    """This node in its job."""

    job: int
    restart: int
    index: int
    names: list[str]
    processes: int

    @property
    def name(self) -> str:
        return self.names[self.index]

    @property
    def port(self) -> int:
        """Of the first node, where all meet: jobs that share it have others."""
        return 20000 + self.job * _PORTS % 20000

    @classmethod
    def here(cls) -> Node:
        if "SLURM_STEP_ID" not in os.environ:
            raise NodeError("not started by srun: 'sbatch slurm/train.sbatch …' does it")
        names = _slurm("scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]).split()
        return cls(
            job=int(os.environ["SLURM_JOB_ID"]),
            restart=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            index=int(os.environ["SLURM_NODEID"]),
            names=names,
            processes=_processes(),
        )


def main(words: list[str]) -> int:
    try:
        node = Node.here()
        if words[:1] == ["shards"]:
            return subprocess.run(_pvtcap(*_part(words)), check=False).returncode
        facts = _facts(words)
        plan = _first(node, facts) if node.index == 0 else _other(node, facts)
    except NodeError as error:
        print(f"pvtcap: error: {error}", file=sys.stderr, flush=True)
        return 2
    _set_threads(node)
    sys.argv[1:] = [
        f"--nnodes={len(node.names)}", f"--node-rank={node.index}", f"--nproc-per-node={node.processes}",
        f"--master-addr={plan['address']}", f"--master-port={plan['port']}", "-m", "pvtcap", *words,
    ]  # fmt: skip
    code = torchrun.run()
    if node.index == 0 and words[:1] == ["train"] and code not in (0, 2):
        return _queue_again(node, words, code)
    return code


def _first(node: Node, facts: dict[str, Any]) -> dict[str, Any]:
    """The first node: hear all, compare, tell all."""
    server = _listen(node)
    heard, connections = {0: facts}, dict[int, socket.socket]()
    server.settimeout(1.0)
    deadline = time.monotonic() + PATIENCE_S
    while len(heard) < len(node.names) and time.monotonic() < deadline:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        connection.settimeout(10.0)
        try:
            hello = json.loads(connection.makefile().readline())
            if hello["token"] != _token(node):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()  # not one of ours
            continue
        connection.sendall(json.dumps({"token": _token(node)}).encode() + b"\n")
        heard[hello["index"]], connections[hello["index"]] = hello["facts"], connection
    problem = _problem(node, heard)
    plan = {"address": _address(node), "port": _free_port()}
    for connection in connections.values():
        connection.sendall(json.dumps({"token": _token(node), "problem": problem, **plan}).encode() + b"\n")
        connection.close()
    server.close()
    if problem:
        raise NodeError(problem)
    first = 0
    for index, name in enumerate(node.names):
        last = first + heard[index]["processes"] - 1
        print(f"{name}: ranks {first}-{last}, {heard[index]['threads']} threads each, pvtcap {heard[index]['version']}")
        first = last + 1
    print(f"job {node.job}, start {node.restart + 1}, meeting at {plan['address']}:{plan['port']}", flush=True)
    return plan


def _other(node: Node, facts: dict[str, Any]) -> dict[str, Any]:
    """Another node: tell the first, hear what it decides. What is wrong anywhere, the first says."""
    address, deadline = _address(node), time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for port in _candidates(node):
            answer = _ask(node, address, port, facts)
            if answer is not None:
                if answer["problem"]:
                    raise SystemExit(2)
                return answer
        time.sleep(0.5)
    raise NodeError(
        f"{node.name}: cannot reach {node.names[0]} ({address}, ports {node.port}-{node.port + _PORTS - 1}) within "
        f"{PATIENCE_S:.0f} s. Is it up, and may nodes of your site open ports to each other?"
    )


def _ask(node: Node, address: str, port: int, facts: dict[str, Any]) -> dict[str, Any] | None:
    hello = {"token": _token(node), "index": node.index, "facts": facts}
    try:
        with socket.create_connection((address, port), timeout=3.0) as connection:
            connection.sendall(json.dumps(hello).encode() + b"\n")
            answers = connection.makefile()
            if json.loads(answers.readline())["token"] != _token(node):
                return None  # another program has the port, or another job
            connection.settimeout(PATIENCE_S + 10)  # the second line comes when all have come
            plan: dict[str, Any] = json.loads(answers.readline())
            return plan
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _problem(node: Node, heard: dict[int, dict[str, Any]]) -> str | None:
    """Why these nodes cannot run together; each sentence names a node."""
    silent = [name for index, name in enumerate(node.names) if index not in heard]
    if silent:
        return f"{', '.join(silent)}: not heard of within {PATIENCE_S:.0f} s by {node.name}; is it up, can it reach us?"
    for index, name in enumerate(node.names):
        if heard[index]["problem"]:
            return f"on node {name}: {heard[index]['problem']}"
    for index, name in enumerate(node.names):
        for key, what in (("version", "pvtcap"), ("places", "the same files"), ("processes", "processes")):
            ours, theirs = heard[0][key], heard[index][key]
            if key == "places":
                other = [place for place in ours if ours[place] != theirs.get(place)]
                if other:
                    return (
                        f"on node {name}: {other[0]} is not what {node.name} has there. Is it on a shared filesystem?"
                    )
            elif ours != theirs:
                return f"on node {name}: {what} {theirs}; {node.name} has {ours}"
    return None


def _facts(words: list[str]) -> dict[str, Any]:
    """What ``pvtcap nodecheck`` finds here: this node's side of the comparison."""
    done = subprocess.run(_pvtcap("nodecheck", *words), capture_output=True, text=True, check=False)
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines() or [f"'pvtcap nodecheck' ended with {done.returncode}"]
        found = {"version": "?", "places": {}, "problem": lines[-1].removeprefix("pvtcap: error: "), "last_step": None}
    processes = _processes()
    return {**found, "processes": processes, "threads": max(1, _cores() // processes)}


def _queue_again(node: Node, words: list[str], code: int) -> int:
    """After a preemption or a death: again, if that leads anywhere. The reason is said either way."""
    facts = _facts(words)
    step, run = facts.get("last_step"), facts.get("run")
    why = "preempted" if code == torchrun.RESUME_ME else f"ended with {code}"
    if run is None:
        print(f"pvtcap: {why}; not queued again: {facts['problem']}", file=sys.stderr)
        return code
    record = Path(run) / "restarts.jsonl"
    with record.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"job": node.job, "start": node.restart + 1, "code": code, "step": step}) + "\n")
    last = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()][-_STARTS:]
    if len(last) == _STARTS and all(one["step"] == step for one in last):
        print(
            f"pvtcap: error: {why} at step {step}, as {_STARTS} times in a row: not queued again. The reason is above; "
            f"the starts are in {record}.",
            file=sys.stderr,
            flush=True,
        )
        return code
    print(f"pvtcap: {why}, last checkpoint at step {step}: job {node.job} is queued again", flush=True)
    done = subprocess.run(["scontrol", "requeue", str(node.job)], capture_output=True, text=True, check=False)
    if done.returncode != 0 and not _is_queued(node.job):
        print(f"pvtcap: scontrol requeue: {done.stderr.strip()}", file=sys.stderr, flush=True)
    return code


def _is_queued(job: int) -> bool:
    """Slurm queues a job again by itself when it preempts it or loses a node."""
    return "JobState=RUNNING" not in _slurm("scontrol", "show", "job", str(job))


def _part(words: list[str]) -> list[str]:
    """Of an array, task I of N builds part I/N in a folder of its own."""
    if "SLURM_ARRAY_TASK_ID" not in os.environ or words[1:2] == ["join"]:
        return words
    task, tasks = os.environ["SLURM_ARRAY_TASK_ID"], os.environ["SLURM_ARRAY_TASK_COUNT"]
    if "--out" not in words[:-1]:
        raise NodeError("an array of shards needs --out DIR: task I builds in DIR/part-I")
    place = words.index("--out") + 1
    return [*words[:place], f"{words[place]}/part-{task}", *words[place + 1 :], "--part", f"{task}/{tasks}"]


def _listen(node: Node) -> socket.socket:
    for port in _candidates(node):
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError:
            server.close()
            continue
        server.listen(len(node.names))
        return server
    raise NodeError(f"{node.name}: ports {node.port}-{node.port + _PORTS - 1} are all taken by other programs")


def _candidates(node: Node) -> range:
    return range(node.port, node.port + _PORTS)


def _token(node: Node) -> str:
    return f"pvtcap-{node.job}-{node.restart}"


def _address(node: Node) -> str:
    """Of the first node, as Slurm knows it: names need not resolve."""
    fields = _slurm("scontrol", "--oneliner", "show", "node", node.names[0]).split()
    found = [field.split("=", 1)[1] for field in fields if field.startswith("NodeAddr=")]
    return found[0] if found else node.names[0]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        return int(server.getsockname()[1])


def _processes() -> int:
    """NPROC, or one for each GPU that the job has here, or one."""
    if "NPROC" in os.environ:
        return int(os.environ["NPROC"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return len([gpu for gpu in visible.split(",") if gpu]) or 1


def _cores() -> int:
    return int(os.environ.get("SLURM_CPUS_PER_TASK") or len(os.sched_getaffinity(0)))


def _set_threads(node: Node) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // node.processes)))


def _pvtcap(*words: str) -> list[str]:
    return [sys.executable, "-m", "pvtcap", *words]


def _slurm(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NodeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})  # until torchrun.run() listens
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # node.sh ignored it, and what is ignored is not kept waiting
    sys.exit(main(sys.argv[1:]))
