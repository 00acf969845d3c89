"""Dropout within Triton kernels: what is dropped is a hash of where it stands, so that nobody has to keep it.

The hash is Wellons' "lowbias32" (2018) of a row's number and a seed, and two of its products over that and the column's
number, for there are many of those; neither rows nor columns nor any two of each show by what stays. A call of a kernel
has a seed of its own, drawn by torch. Modules that begin with ``gpu`` are imported only where there is
a GPU; ``TRITON_INTERPRET=1`` runs them, slowly, without one.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl


def seed(device: torch.device) -> Tensor:
    """int32 (1), of torch's random state."""
    return torch.randint(2**31 - 1, (1,), dtype=torch.int32, device=device)


def dropped(dropout: float) -> int:
    """Hashes below it, of 2^32, are those of what is dropped."""
    return round(dropout * 2**32)


@triton.jit
def mixed(x):  # type: ignore[no-untyped-def]
    """Each bit of uint32 changes each bit of what comes out in half of all cases."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def row_bits(seed, rows):  # type: ignore[no-untyped-def]
    return mixed(mixed(tl.load(seed).to(tl.uint32)) + rows.to(tl.uint32))


@triton.jit
def kept(row_bits, columns, dropped: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether it stays: ``row_bits`` and the numbers of columns broadcast together."""
    bits = (row_bits ^ (columns.to(tl.uint32) * 0xC2B2AE35)) * 0x7FEB352D
    return (bits ^ (bits >> 15)) * 0x846CA68B >= dropped
