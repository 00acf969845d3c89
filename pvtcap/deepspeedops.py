"""DeepSpeed's communication op for CPUs, which is compiled at first use: once, wherever a run is started from.

The compiler is called through ninja, and another ninja compiles all anew: runs with and without the environment active
(by launch/local.sh, say, and under Slurm) took turns at that, a minute each time. Here it is always the one that was
installed with pvtcap.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def load_cpu_communication() -> None:
    """Compile the op if need be, and load it; DeepSpeed then finds it loaded. Half a minute at first, then a second."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and __compatible_ops__.get(builder.NAME, False):
        with _own_programs_first():
            builder.load(verbose=False)


@contextmanager
def _own_programs_first() -> Iterator[None]:
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
