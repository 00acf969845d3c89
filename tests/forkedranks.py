"""Real ranks, cheaply: a process that imports all that ranks import, once, and forks each world of them.

    with ForkedRanks(log) as forked:
        failed = forked.call("test_engine:losses", 2, {"tree": tree}, out)

torchrun's ranks import torch, DeepSpeed and transformers each time anew, for longer than most tests train. What
torchrun itself does, tests that start it show (``conftest.torchrun``).
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, Self


class ForkedRanks:
    """Starts worlds one after the other. What they print goes to ``log``, which each call begins anew."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.communicate()
            self._server = None

    def call(self, function: str, size: int, arguments: dict[str, Any], out: Path, timeout_s: float = 300) -> str:
        """Run MODULE:FUNCTION(world, **arguments) on ``size`` ranks, of one thread each and without a GPU; every rank's
        result is in ``out``, as JSON. Returns "" or, when one of them failed or was killed (and the others therefore
        were), what they said.
        """
        self.log.write_bytes(b"")
        spec = {"function": function, "size": size, "arguments": arguments, "out": str(out), "log": str(self.log)}
        server = self._running()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(spec).encode() + b"\n")
        server.stdin.flush()
        with selectors.DefaultSelector() as answers:
            answers.register(server.stdout, selectors.EVENT_READ)
            answered = answers.select(timeout_s)
        line = server.stdout.readline() if answered else b""
        if line == b"whole\n":
            return ""
        if not line:
            self.__exit__()  # with its ranks; the next call starts another
        how = line.decode().strip() or ("the server has ended" if answered else f"no end after {timeout_s:.0f} seconds")
        return f"{how}\n{self.log.read_text(errors='replace')[-12_000:]}"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._server is None:
            here = Path(__file__).parent
            path = os.pathsep.join([str(here), str(here.parent / "launch")])
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
            self._server = subprocess.Popen(
                [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        return self._server


def serve() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever is printed goes elsewhere
    import deepspeed  # noqa: F401
    import pytest  # noqa: F401

    import pvtcap.evaluate
    import pvtcap.monitor
    import pvtcap.train  # noqa: F401

    for line in sys.stdin:
        os.write(answers, f"{_world(**json.loads(line))}\n".encode())


def _world(function: str, size: int, arguments: dict[str, Any], out: str, log: str) -> str:
    """Fork its ranks and wait for them: how it ended."""
    import heldport  # of launch/, which processes that only import conftest do not know

    ranks = {}
    with heldport.hold() as held:
        for rank in range(size):
            child = os.fork()
            if child == 0:
                _rank(function, rank, size, held.getsockname()[1], arguments, out, log)
            ranks[child] = rank
        ended = "whole"
        while ranks:
            child, status = os.wait()
            rank = ranks.pop(child)
            if status and ended == "whole":
                ended = f"rank {rank} ended with {os.waitstatus_to_exitcode(status)}"
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
    return ended


def _rank(function: str, rank: int, size: int, port: int, arguments: dict[str, Any], out: str, log: str) -> None:
    """In a process of its own, which does not come back."""
    import ranks

    from pvtcap.processes import leave

    code = 1
    try:
        with Path(log).open("ab") as said, Path(os.devnull).open("rb") as nothing:
            for number, file in ((0, nothing), (1, said), (2, said)):
                os.dup2(file.fileno(), number)
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in about.items()} | {"MASTER_ADDR": "127.0.0.1"}
        ranks.main(function, json.dumps(arguments), out)
        code = 0
    except BaseException:  # noqa: BLE001  # whatever it is, the log has it and the test is told
        traceback.print_exc()
    leave(code)


if __name__ == "__main__":
    serve()
