"""What a command and all that it starts take, those too that outlive it: python benchmarks/descendants.py COMMAND …

pvtcap's worker processes are started by a fork server, which ends a moment after the command that it served: Linux
counts neither for whoever has waited for the command alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from multiprocessing import resource_tracker

import psutil


def adopt() -> None:
    """Become the parent of what is left behind by a command that this process starts and that ends."""
    subreaper = 36  # of prctl(2)
    if ctypes.CDLL(None, use_errno=True).prctl(subreaper, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    resource_tracker.ensure_running()  # this process's own, which stays


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def wait_for_all_but(before: set[psutil.Process]) -> resource.struct_rusage:
    """Wait for the children that came since; what all those that have been waited for took."""
    for left in children() - before:
        os.waitpid(left.pid, 0)
    return resource.getrusage(resource.RUSAGE_CHILDREN)


def main() -> None:
    """Print the command's exit status and the peak memory of the largest process, in MiB."""
    adopt()
    before = children()
    done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=False)
    print(json.dumps([done.returncode, wait_for_all_but(before).ru_maxrss / 1024]))


if __name__ == "__main__":
    main()
