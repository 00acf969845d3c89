"""Evaluations on many ranks, cheaply: imports once, then forks each world's ranks. python tests/forkedranks.py SPECS

SPECS is a JSON list of {checkpoint, data, out, size, die_rank}: caption_all on ``size`` ranks; rank ``die_rank`` (null:
none) kills itself after its first batch, and the others, which then wait for it, are killed too. For each, stdout has a
line: the batches that its ranks captioned anew.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from pvtcap import evaluate as evaluation
from pvtcap.checkpoint import Checkpoint
from pvtcap.dist import World
from pvtcap.evalparts import Part, Parts


def rank_main(spec: dict[str, Any], rank: int, port: int, log: Path) -> int:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(spec["size"]), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    add = Parts.add

    def logged(self: Parts, part: Part) -> None:
        add(self, part)
        with log.open("a") as file:
            file.write(f"{part.number}\n")
        if rank == spec["die_rank"]:
            os.kill(os.getpid(), signal.SIGKILL)

    Parts.add = logged  # type: ignore[method-assign]
    try:
        with World.start() as world:
            checkpoint = Path(spec["checkpoint"])
            how = Checkpoint.open(checkpoint).config.evaluate
            evaluation.caption_all(checkpoint, Path(spec["data"]), Path(spec["out"]), world, how)
    except BaseException:  # noqa: BLE001  # the parent is told by the exit code
        traceback.print_exc()
        return 1
    return 0


def run(spec: dict[str, Any], log: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    log.touch()
    children = []
    for rank in range(spec["size"]):
        child = os.fork()
        if child == 0:
            os._exit(rank_main(spec, rank, port, log))
        children.append(child)
    for _ in range(spec["size"]):
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            assert os.WIFSIGNALED(status), "a rank failed by itself"
            return


def main(specs: str) -> None:
    for spec in json.loads(specs):
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            run(spec, log)
            print(json.dumps(sorted(int(line) for line in log.read_text().split())), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
