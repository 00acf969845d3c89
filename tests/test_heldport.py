"""pytest tests/test_heldport.py"""

from __future__ import annotations

import errno
import socket
import struct
from pathlib import Path

import heldport
import pytest
import torch.distributed as torch_dist
from conftest import ROOT, torchrun

# Linux's IP_LOCAL_PORT_RANGE (since 6.3), which Python does not name: the ports that this one socket may be given.
_PORT_RANGE = 51


def given(port: int, family: socket.AddressFamily, address: str) -> int:
    """The port that the kernel gives to who asks for any and has the choice of one. Errors: OSError, if it has none."""
    with socket.socket(family) as asker:
        asker.setsockopt(socket.IPPROTO_IP, _PORT_RANGE, struct.pack("HH", port, port))
        asker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        asker.bind((address, 0))
        return int(asker.getsockname()[1])


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_the_kernel_gives_a_held_port_to_nobody(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with heldport.hold() as held:
        port = held.getsockname()[1]
        try:
            with pytest.raises(OSError, match="in use") as refused:
                given(port, family, address)
        except OSError as error:
            if error.errno in (errno.ENOPROTOOPT, errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                pytest.skip(f"this kernel cannot be asked so: {error}")
            raise
        assert refused.value.errno == errno.EADDRINUSE
    assert given(port, family, address) == port


def test_a_store_listens_at_a_held_port() -> None:
    with heldport.hold() as held:
        port = held.getsockname()[1]
        store = torch_dist.TCPStore("localhost", port, 1, is_master=True)  # type: ignore[attr-defined]
        store.set("here", "it is")
        asker = torch_dist.TCPStore("localhost", port, 1, is_master=False)  # type: ignore[attr-defined]
        assert asker.get("here") == b"it is"


def test_ranks_meet_at_a_port_that_nobody_could_take_before(tmp_path: Path) -> None:
    """Each start of them: the first ends with an error, and torchrun starts them again."""
    program = tmp_path / "rank.py"
    program.write_text(f"""
import os, pathlib, socket, sys, time
sys.path.insert(0, {str(ROOT)!r})
out = pathlib.Path({str(tmp_path)!r}) / (os.environ["RANK"] + "-" + os.environ["TORCHELASTIC_RESTART_COUNT"])
with socket.socket() as stranger:
    try:
        stranger.bind(("", int(os.environ["MASTER_PORT"])))
    except OSError as error:
        out.write_text(f"{{os.environ['MASTER_PORT']}} {{error.errno}}")
from pvtcap.dist import World
with World.start() as world:
    assert world.sum([1]) == [2]
sys.exit(1 if out.name.endswith("0") else 0)
""")
    done = torchrun(2, "--max-restarts", "1", str(program))
    assert done.returncode == 0, done.stderr[-3000:]
    said = {path.name: path.read_text().split() for path in tmp_path.glob("*-*")}
    assert set(said) == {"0-0", "1-0", "0-1", "1-1"}
    assert {number for _, number in said.values()} == {str(errno.EADDRINUSE)}
    assert said["0-0"] == said["1-0"] != said["0-1"] == said["1-1"]
