"""torchrun, but quiet about errors that pvtcap has explained, with the failed rank's exit code, and preemptible.

    python launch/torchrun.py --standalone --nproc-per-node 8 -m pvtcap train configs/flickr30k.yaml

torchrun itself ends every failure with exit code 1 and a page of its own, in which the one line that matters is lost.
A rank that was killed, which can say nothing, is named here.

SIGUSR1 or SIGTERM to this process: the ranks are asked to save and leave, and this ends with exit code 75 when they
have. torchrun itself dies of SIGUSR1, and gives its ranks 30 seconds after SIGTERM.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import heldport

RESUME_ME = 75  # as pvtcap.preemption has it
MARK = "PVTCAP_RESUME_MARK"


def run() -> int:
    # Ranks begin with SIGUSR1 held back, so that one which has just started is not killed by it but told as soon as it
    # listens. This process takes both in a thread of its own, and must block them before a library starts threads:
    # one that does not would take them, and torchrun's own handler would end the ranks.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    # Ranks that are started again would meet in the store of the first, and find the addresses of the dead.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    import torch.distributed.elastic.rendezvous.api as rendezvous
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # torchrun's own lets go of the port that it finds. Whoever asks the kernel for one while rank 0 still imports may
    # be given that, and the ranks would call a stranger.
    held: list[socket.socket] = []
    rendezvous.get_free_port = lambda: _next_held(held)
    _pass_signals_on()
    with tempfile.TemporaryDirectory(prefix="pvtcap-") as folder:
        mark = Path(folder) / "resume-me"
        os.environ[MARK] = str(mark)
        try:
            main()
        except ChildFailedError as error:
            return _explained(error)
        return RESUME_ME if mark.exists() else 0


def _next_held(held: list[socket.socket]) -> int:
    """A port for the ranks that start now; those before them have ended, and theirs is given back."""
    while held:
        held.pop().close()
    held.append(heldport.hold())
    return int(held[0].getsockname()[1])


def _pass_signals_on() -> None:
    """SIGUSR1 and SIGTERM go to the ranks; the agent waits for what they do about it. Only a training saves first."""
    import threading
    import time

    import psutil

    me = psutil.Process()

    def ranks() -> list[Any]:
        found = []
        for child in me.children():
            with contextlib.suppress(psutil.Error):
                if "LOCAL_RANK" in child.environ():
                    found.append(child)
        return found

    def listen() -> None:
        while True:
            asked = signal.sigwait({signal.SIGUSR1, signal.SIGTERM})
            passed_on = signal.SIGUSR1 if "train" in sys.argv else asked
            while not (told := ranks()):  # torchrun has yet to start them
                time.sleep(0.05)
            for rank in told:
                with contextlib.suppress(psutil.Error):
                    rank.send_signal(passed_on)

    threading.Thread(target=listen, daemon=True).start()


def _explained(error: Any) -> int:
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        print(f"pvtcap: rank {rank} was killed by {name}{hint}", file=sys.stderr)
        return 128 - failure.exitcode
    return failure.exitcode


if __name__ == "__main__":
    sys.exit(run())
