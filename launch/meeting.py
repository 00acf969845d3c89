"""How the nodes of a Slurm job agree before any rank starts: the first hears what each has, compares, and tells all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import Any

PATIENCE_S = 60.0  # for all nodes to say what they have
_PORTS = 16


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
        names = slurm("scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]).split()
        return cls(
            job=int(os.environ["SLURM_JOB_ID"]),
            restart=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            index=int(os.environ["SLURM_NODEID"]),
            names=names,
            processes=processes(),
        )


def lead(
    node: Node, facts: dict[str, Any], *, heard: dict[int, dict[str, Any]] | None = None, say: bool = True
) -> dict[str, Any]:
    """The first node: hear all, compare, tell all. ``heard`` is filled with what each has said."""
    server = _listen(node)
    heard, connections = {0: facts} if heard is None else heard, dict[int, socket.socket]()
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
    for index, name in enumerate(node.names if say else []):
        last = first + heard[index]["processes"] - 1
        print(f"{name}: ranks {first}-{last}, {heard[index]['threads']} threads each, pvtcap {heard[index]['version']}")
        first = last + 1
    if say:
        print(f"job {node.job}, start {node.restart + 1}, meeting at {plan['address']}:{plan['port']}", flush=True)
    return plan


def follow(node: Node, facts: dict[str, Any]) -> dict[str, Any]:
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
    fields = slurm("scontrol", "--oneliner", "show", "node", node.names[0]).split()
    found = [field.split("=", 1)[1] for field in fields if field.startswith("NodeAddr=")]
    return found[0] if found else node.names[0]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        return int(server.getsockname()[1])


def processes() -> int:
    """NPROC, or one for each GPU that the job has here, or one."""
    if "NPROC" in os.environ:
        return int(os.environ["NPROC"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return len([gpu for gpu in visible.split(",") if gpu]) or 1


def slurm(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NodeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
