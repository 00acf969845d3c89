"""The C library's allocator, as training on CPUs wants it."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees for its next allocation; says whether the library can.

    glibc gives large blocks back to the kernel at once. A training step frees gigabytes and asks for them again, and
    the kernel zeroes every page anew: a quarter of a step's time with ZeRO-2 (benchmarks/LOG.md). The price is a higher
    resident size where blocks of many sizes take turns.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, -1) and mallopt(_M_MMAP_MAX, 0))
