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
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import heldport
import torchrun
from meeting import Node, NodeError, follow, lead, processes, slurm

_STARTS = 3


def main(words: list[str]) -> int:
    try:
        node = Node.here()
        if words[:1] == ["shards"]:
            words = _part(words)
            if (built := _built_before(words)) is not None:
                print(f"pvtcap: {built} was built before this job was queued again", flush=True)
                return 0
            command = _pvtcap(*words)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGTERM})
            os.execv(command[0], command)
        if words[:1] == ["doctor"]:
            return _doctor(node, words)
        facts = _facts(words)
        if node.index == 0:
            held = heldport.hold()  # until this process ends, and with it the last rank
            plan, heard = lead(node, facts, held.getsockname()[1])
            _introduce(node, plan, heard)
        else:
            plan = follow(node, facts)
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


def _introduce(node: Node, plan: dict[str, Any], heard: dict[int, dict[str, Any]]) -> None:
    """Who has which ranks."""
    first = 0
    for index, name in enumerate(node.names):
        last = first + heard[index]["processes"] - 1
        print(f"{name}: ranks {first}-{last}, {heard[index]['threads']} threads each, pvtcap {heard[index]['version']}")
        first = last + 1
    print(f"job {node.job}, start {node.restart + 1}, meeting at {plan['address']}:{plan['port']}", flush=True)


def _doctor(node: Node, words: list[str]) -> int:
    """Every node examines itself; the first prints a table of what is not the same everywhere, or not well."""
    done = subprocess.run(_pvtcap(*words, "--json"), capture_output=True, text=True, check=False)
    try:
        findings = json.loads(done.stdout)["findings"]
    except (ValueError, KeyError):
        findings = [{"what": "pvtcap doctor", "level": "bad", "found": done.stderr.strip()[-200:], "do": ""}]
    if node.index:
        follow(node, {"findings": findings})
        return 0
    _, heard = lead(node, {"findings": findings})
    width = max(map(len, node.names))
    worst = 0
    for index, name in enumerate(node.names):
        for one in heard[index]["findings"]:
            worst = max(worst, one["level"] == "bad")
            mark = {"ok": "    ok", "warning": " warn ", "bad": "  BAD "}[one["level"]]
            print(f"{name:{width}} {mark}  {one['what']}: {one['found']}" + (f"  → {one['do']}" if one["do"] else ""))
    return worst


def _facts(words: list[str]) -> dict[str, Any]:
    """What ``pvtcap nodecheck`` finds here: this node's side of the comparison."""
    done = subprocess.run(_pvtcap("nodecheck", *words), capture_output=True, text=True, check=False)
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines() or [f"'pvtcap nodecheck' ended with {done.returncode}"]
        found = {"version": "?", "places": {}, "problem": lines[-1].removeprefix("pvtcap: error: "), "last_step": None}
    number = processes()
    return {**found, "processes": number, "threads": max(1, _cores() // number)}


def _queue_again(node: Node, words: list[str], code: int) -> int:
    """After a preemption or a death: again, if that leads anywhere. The reason is said either way."""
    facts = _facts(words)
    step, run = facts.get("last_step"), facts.get("run")
    why = "preempted" if code == torchrun.RESUME_ME else f"ended with {code}"
    if run is None:
        print(f"pvtcap: {why}; not queued again: {facts['problem']}", file=sys.stderr)
        return code
    record = Path(run) / "restarts.jsonl"
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    with record.open("a", encoding="utf-8") as file:
        line = {"job": node.job, "start": node.restart + 1, "ended": now, "code": code, "step": step}
        file.write(json.dumps(line) + "\n")
    try:
        decided = not _may_come_back(node.job)
    except NodeError as error:
        print(f"pvtcap: {why} at step {step}; not queued again: {error}", file=sys.stderr, flush=True)
        return code
    if decided:
        print(f"pvtcap: {why} at step {step}; what Slurm does with the job is decided", flush=True)
        return code
    starts = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    # Of this job: a run that was mended and submitted anew begins anew.
    last = [one for one in starts if one["job"] == node.job][-_STARTS:]
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
    if done.returncode != 0:
        print(f"pvtcap: scontrol requeue: {done.stderr.strip()}", file=sys.stderr, flush=True)
    return code


def _may_come_back(job: int) -> bool:
    """Not after scancel, which would be undone; nor where Slurm has preempted it and queues it again by itself."""
    about = slurm("scontrol", "show", "job", str(job)).split()
    return "JobState=RUNNING" in about or "Reason=TimeLimit" in about


def _part(words: list[str]) -> list[str]:
    """Of an array, task I of N builds part I/N in a folder of its own."""
    if "SLURM_ARRAY_TASK_ID" not in os.environ or words[1:2] == ["join"]:
        return words
    task, tasks = os.environ["SLURM_ARRAY_TASK_ID"], os.environ["SLURM_ARRAY_TASK_COUNT"]
    if "--out" not in words[:-1]:
        raise NodeError("an array of shards needs --out DIR: task I builds in DIR/part-I")
    place = words.index("--out") + 1
    return [*words[:place], f"{words[place]}/part-{task}", *words[place + 1 :], "--part", f"{task}/{tasks}"]


def _built_before(words: list[str]) -> str | None:
    """The folder that a task had finished when it was stopped in its last moment: whoever waits for it may go on."""
    if not int(os.environ.get("SLURM_RESTART_COUNT", "0")) or "--out" not in words[:-1] or "--overwrite" in words:
        return None
    out = Path(words[words.index("--out") + 1])
    return str(out) if (out / "manifest.json").exists() else None


def _cores() -> int:
    given = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE")
    return int(given or len(os.sched_getaffinity(0)))


def _set_threads(node: Node) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // node.processes)))


def _pvtcap(*words: str) -> list[str]:
    return [sys.executable, "-m", "pvtcap", *words]


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})  # until torchrun.run() listens
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # node.sh ignored it, and what is ignored is not kept waiting
    sys.exit(main(sys.argv[1:]))
