"""Errors of the libraries beneath, as one line of ours with what to do; the whole trace goes to a file.

    with explaining(run.dir / "errors"):
        …                                  # torch.OutOfMemoryError leaves it as MachineError

Only what a user can act on is explained, and known by what the libraries say in words: any other error is a bug, of
ours or of theirs, and keeps its traceback on the terminal.
"""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pvtcap.errors import MachineError, PvtcapError


@dataclass(frozen=True)
class Known:
    """An error by what is in its text or its type's name, any of ``signs``, lower case; what it is, and what to do."""

    signs: tuple[str, ...]
    what: str
    do: str


KNOWN = (
    Known(
        ("cuda out of memory", "outofmemoryerror"),
        "the GPU's memory is full",
        "Lower data.micro_batch (data.global_batch stays), set precision=bf16, a higher zero.stage or "
        "train.activation_checkpointing=true; 'pvtcap plan CONFIG' says what each takes.",
    ),
    Known(
        ("defaultcpuallocator: can't allocate memory", "defaultcpuallocator: not enough memory", "memoryerror"),
        "this machine's memory is full",
        "Lower data.micro_batch, data.workers or the number of processes; 'pvtcap plan CONFIG' says what a rank takes.",
    ),
    Known(
        ("eaddrinuse", "address already in use"),
        "the port at which ranks meet is in use",
        "Another run on this machine? Set MASTER_PORT to a free one, or start with launch/local.sh, which finds one.",
    ),
    Known(
        (
            "unable to open shared memory object",
            "unable to write to file </torch",
            "unable to allocate shared memory",
            "bus error",
        ),
        "shared memory (/dev/shm) is full",
        "Give the container more (docker run --shm-size 16g), or lower data.workers.",
    ),
    Known(
        (
            "error building extension",
            "ninja is required",
            "you need c++",
            "c++ compiler",
            "no such file or directory: 'c++'",
            "no such file or directory: 'g++'",
            "python.h: no such file",
            "failed to find c compiler",  # Triton's; the others are DeepSpeed's
        ),
        "DeepSpeed or Triton could not compile what it needs",
        "Install g++ and Python's headers (Debian, Ubuntu: apt install g++ python3-dev); 'pvtcap doctor' tries it.",
    ),
    Known(
        (
            "watchdog caught collective operation timeout",
            "collective operation timeout",
            "timed out waiting",
            "nccl timeout",
            "wait timeout after",
            "connecttimeout",
            "client socket has timed out",
        ),
        "another rank did not answer in time",
        "It hangs, or was never started. Look at the other ranks' output and at RUN/stall; between nodes check that "
        "they reach each other (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO tells more).",
    ),
    Known(
        (
            "connection closed by peer",
            "connection reset by peer",
            "broken pipe",
            "ncclremoteerror",
            "socket closed",
            "remote process exited",
            "ncclsystemerror",
            "nccl communicator was aborted",
        ),
        "another rank has gone",
        "The cause is in its output, or its machine's: killed for lack of memory (dmesg), or the machine is away.",
    ),
    Known(
        (
            "cannot send a request, as the client has been closed",
            "localentrynotfounderror",
            "offlinemodeisenabled",
            "name or service not known",
            "temporary failure in name resolution",
            "maxretryerror",
            "network is unreachable",
        ),
        "the network, or the hub of models, cannot be reached",
        "'pvtcap fetch-weights CONFIG --to DIR' fetches on a machine that can; docs/weights.md says what then.",
    ),
    Known(
        (
            "no kernel image is available",
            "cuda driver version is insufficient",
            "found no nvidia driver",
            "cuda error: invalid device ordinal",
            "the nvidia driver on your system is too old",
        ),
        "this GPU, its driver and this build of torch do not fit together",
        "'pvtcap doctor' says what is here; install the torch that fits (pytorch.org), or start a process a GPU.",
    ),
)


def explained(error: BaseException) -> MachineError | None:
    """What to say instead of a traceback; None for an error that is nobody's but a programmer's."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(
            "no space left", where=error.filename, do="Make room there: what was complete before is still complete."
        )
    told = f"{type(error).__name__}: {error}".lower()
    for known in KNOWN:
        if any(sign in told for sign in known.signs):
            return MachineError(known.what, got=_first_line(error), do=known.do)
    return None


@contextmanager
def explaining(folder: Path | None) -> Iterator[None]:
    """Raise MachineError in place of what is known; its trace goes to ``folder``, or else to a temporary file."""
    try:
        yield
    except PvtcapError:
        raise
    except Exception as error:
        if (ours := explained(error)) is None:
            raise
        ours.do = f"{ours.do} The whole trace: {_keep(error, folder)}"
        raise ours from error


def _keep(error: Exception, folder: Path | None) -> Path | str:
    text = "".join(traceback.format_exception(error))
    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{socket.gethostname()}_{os.getpid()}.txt"
    try:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="pvtcap-error-"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    except OSError as full:  # of a full disk it can't be kept on that disk
        return f"not kept ({full.strerror})"
    return folder / name


def _first_line(error: BaseException) -> str:
    """Of its text, and no more of it than a person reads."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 200 else f"{line[:199]}…"
