"""Imports of large libraries, while nobody looks for garbage in what they make.

torch, timm, transformers and DeepSpeed make a million objects, and all of them stay. The collector goes through them
again and again as they become more: up to a quarter of the 5 s that importing takes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """For a command's start: all that is alive at its end is never looked at again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()
