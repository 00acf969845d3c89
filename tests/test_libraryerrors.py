"""pytest tests/test_libraryerrors.py: real errors of the libraries, each as one line; a bug keeps its traceback."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import torchrun

from pvtcap.dist import World
from pvtcap.errors import MachineError
from pvtcap.libraryerrors import explained, explaining


def one_line(stderr: str) -> str:
    (line,) = [line for line in stderr.splitlines() if "pvtcap: error" in line]
    assert "Traceback" not in stderr
    return line


def kept_trace(line: str) -> str:
    found = re.search(r"The whole trace: (\S+)", line)
    assert found is not None, line
    return Path(found[1]).read_text()


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program as a command of ours would run it."""
    words = f"import sys\nfrom pvtcap import cli\ncli.app = lambda: exec({program!r})\ncli.main()"
    return subprocess.run(
        [sys.executable, "-c", words], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_memory_that_is_not_there() -> None:
    done = run("import torch; torch.empty(1 << 50)")
    assert done.returncode == 1
    line = one_line(done.stderr)
    assert "this machine's memory is full; got" in line
    assert "Lower data.micro_batch" in line
    assert "Traceback" in kept_trace(line)


def test_a_port_that_another_has() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        done = run("from pvtcap.dist import World; World.start()", **where, RANK="0", WORLD_SIZE="2")
    assert done.returncode == 1
    assert "the port at which ranks meet is in use" in one_line(done.stderr)


def test_no_compiler(tmp_path: Path, tree: dict[str, Any]) -> None:
    """Found by training itself; its trace is in the run folder."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("ninja",):
        (tools / name).symlink_to(Path(sys.executable).parent / name)
    done = subprocess.run(
        [sys.executable, "-m", "pvtcap", "train", str(tmp_path / "tiny.yaml")],
        env={"PATH": str(tools), "HOME": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-3000:]
    line = one_line(done.stderr)
    assert "DeepSpeed or Triton could not compile what it needs" in line
    assert f"{tree['run']['dir']}/errors/" in line
    assert "load_cpu_communication" in kept_trace(line)


def leave_or_wait(world: World) -> None:
    if world.rank == 1:
        os._exit(0)  # without a word, as a machine that is switched off
    with explaining(None):
        world.barrier()


def test_a_rank_that_has_gone(tmp_path: Path) -> None:
    program = str(Path(__file__).with_name("ranks.py"))
    done = torchrun(2, program, "test_libraryerrors:leave_or_wait", json.dumps({}), str(tmp_path / "out.json"))
    assert done.returncode != 0
    assert "MachineError: another rank has gone" in done.stderr


def wait_alone(world: World) -> None:
    group = torch.distributed.new_group(timeout=timedelta(seconds=1))
    if world.is_first:
        with pytest.raises(MachineError, match="did not answer in time"), explaining(None):
            torch.distributed.all_reduce(torch.zeros(1), group=group)
    else:
        time.sleep(4)  # there, but at something else
    os._exit(0)


def test_a_rank_that_does_not_answer(tmp_path: Path) -> None:
    program = str(Path(__file__).with_name("ranks.py"))
    done = torchrun(2, program, "test_libraryerrors:wait_alone", json.dumps({}), str(tmp_path / "out.json"))
    assert "did not answer" not in done.stderr
    assert "Traceback" not in done.stderr, done.stderr[-3000:]


def test_a_full_disk_is_named() -> None:
    said = explained(OSError(errno.ENOSPC, "No space left on device", "/data/shard-000001.tar"))
    assert str(said).startswith("/data/shard-000001.tar: no space left. Make room")


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"),
            "the GPU's memory is full",
        ),
        (RuntimeError("unable to write to file </torch_44_1>: No space left on device (28)"), "shared memory"),
        (
            torch.distributed.DistBackendError(
                "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)"
            ),
            "another rank did not answer",
        ),
        (ConnectionError("[Errno -3] Temporary failure in name resolution"), "cannot be reached"),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "do not fit together"),
    ],
)
def test_what_needs_a_gpu_or_a_network_to_happen_is_known_by_its_words(error: Exception, what: str) -> None:
    """As torch and the hub print them; they cannot be made to happen here."""
    said = explained(error)
    assert said is not None and what in said.what and said.do


def test_a_bug_keeps_its_traceback() -> None:
    assert explained(KeyError("image_px")) is None
    done = run("{}['image_px']")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "KeyError" in done.stderr
