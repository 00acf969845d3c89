"""How the nodes of a Slurm job agree before any rank starts: the first hears what each has, compares, and tells all."""

from __future__ import annotations

import contextlib
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


def lead(node: Node, facts: dict[str, Any], port: int = 0) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """The first node: hear all, compare, tell all. Where the ranks are to meet, and what each node has said.

    ``port`` is for the ranks, on this node; 0 where none are started.
    """
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
            _send(connection, {"token": _token(node)})
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()  # not one of ours, or it has gone again
            continue
        heard[hello["index"]], connections[hello["index"]] = hello["facts"], connection
    problem = _problem(node, heard)
    plan = {"address": _address(node), "port": port}
    for connection in connections.values():
        with contextlib.suppress(OSError):  # that node has died since: its ranks will be missed, and Slurm knows
            _send(connection, {"problem": problem, **plan})
        connection.close()
    server.close()
    if problem:
        raise NodeError(problem)
    return plan, heard


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
            _send(connection, hello)
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
        if heard[index].get("problem"):
            return f"on node {name}: {heard[index]['problem']}"
    for index, name in enumerate(node.names):
        ours, theirs = heard[0].get("places", {}), heard[index].get("places", {})
        if other := [place for place in ours if ours[place] != theirs.get(place)]:
            return f"on node {name}: {other[0]} is not what {node.name} has there. Is it on a shared filesystem?"
        for key, what in (("version", "pvtcap"), ("processes", "processes")):
            if heard[0].get(key) != heard[index].get(key):
                return f"on node {name}: {what} {heard[index].get(key)}; {node.name} has {heard[0].get(key)}"
    return None


def _send(connection: socket.socket, what: dict[str, Any]) -> None:
    connection.sendall(json.dumps(what).encode() + b"\n")


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
