"""torchrun, but quiet about errors that pvtcap has explained: same words, and the exit code of the rank that failed.

    python launch/torchrun.py --standalone --nproc-per-node 8 -m pvtcap train configs/flickr30k.yaml

torchrun itself ends every failure with exit code 1 and a page of its own, in which the one line that matters is lost.
A rank that was killed, which can say nothing, is named here.
"""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run() -> int:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            print(f"pvtcap: rank {rank} was killed by {name}{hint}", file=sys.stderr)
            return 128 - failure.exitcode
        return failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(run())
