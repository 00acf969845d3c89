"""Dropout, the way around it, and LayerNorm, in one kernel forward and one back.

What torch's compiler makes of the backward pass takes eight times what its bytes need (benchmarks/LOG.md), and without
the compiler these are a dozen kernels. Here the sum before the norm is all that is kept: what was dropped is hashed
again (``gpudropout``). Each of so many programs adds up its rows' gradients of weight and bias in one order, and torch
the programs': the same bits each time.

Shapes: N rows of width D.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton import language as tl

from pvtcap import gpudropout
from pvtcap.gpudropout import kept, row_bits

# Products fuse with the sums behind them; Triton 3.9 warns whoever does not ask for it, and later ones would not fuse.
FORWARD = {"num_rows": 2, "num_warps": 4, "enable_fp_fusion": True}
BACKWARD = {"num_rows": 1, "num_warps": 4, "enable_fp_fusion": True}
PROGRAMS = 1056  # back: eight for each of a Hopper's multiprocessors


def add_and_norm(branch: Tensor, residual: Tensor, norm: nn.LayerNorm, dropout: float) -> Tensor:
    """``norm(dropout(branch) + residual)``, over the last dimension."""
    found: Tensor = _AddAndNorm.apply(branch, residual, norm.weight, norm.bias, norm.eps, dropout)
    return found


class _AddAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: float
    ) -> Tensor:
        branch, residual = branch.contiguous(), residual.contiguous()
        width, dropped = branch.shape[-1], gpudropout.dropped(dropout)
        seed = gpudropout.seed(branch.device) if dropped else branch
        count = branch.numel() // width
        total, found = torch.empty_like(branch), torch.empty_like(branch)
        means, scales = (torch.empty(count, dtype=torch.float32, device=branch.device) for _ in range(2))
        _forward[(-(-count // FORWARD["num_rows"]),)](
            branch, residual, weight, bias, total, found, means, scales, seed, count, eps,
            width, triton.next_power_of_2(width), dropped, **FORWARD,
        )  # fmt: skip
        ctx.save_for_backward(total, weight, means, scales, seed if dropped else means)
        ctx.dropped = dropped
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        total, weight, means, scales, seed = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        width = total.shape[-1]
        count = total.numel() // width
        of_residual = torch.empty_like(total)
        of_branch = torch.empty_like(total) if ctx.dropped else of_residual
        of_weight, of_bias = (
            torch.empty((PROGRAMS, width), dtype=torch.float32, device=total.device) for _ in range(2)
        )
        _backward[(PROGRAMS,)](
            gradient, total, weight, means, scales, seed, of_branch, of_residual, of_weight, of_bias, count,
            -(-count // PROGRAMS), width, triton.next_power_of_2(width), ctx.dropped, **BACKWARD,
        )  # fmt: skip
        sums = (one.sum(0).to(weight.dtype) for one in (of_weight, of_bias))
        return of_branch, of_residual, *sums, None, None


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    branch, residual, weight, bias, total, found, means, scales, seed, count, eps,
    width: tl.constexpr, lanes: tl.constexpr, dropped: tl.constexpr, num_rows: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * num_rows + tl.arange(0, num_rows)
    d = tl.arange(0, lanes)
    inside = (n[:, None] < count) & (d[None, :] < width)
    places = n.to(tl.int64)[:, None] * width + d[None, :]
    x = tl.load(branch + places, mask=inside, other=0.0).to(tl.float32)
    if dropped > 0:
        enlarged: tl.constexpr = 1 / (1 - dropped / 4294967296)
        x = tl.where(kept(row_bits(seed, n)[:, None], d[None, :], dropped), x * enlarged, 0.0)
    x += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
    rounded = x.to(total.dtype.element_ty)
    tl.store(total + places, rounded, mask=inside)
    x = rounded.to(tl.float32)
    mean = tl.sum(x, 1) / width
    centred = tl.where(d[None, :] < width, x - mean[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / width + eps)
    tl.store(means + n, mean, mask=n < count)
    tl.store(scales + n, scale, mask=n < count)
    w = tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32)
    b = tl.load(bias + d, mask=d < width, other=0.0).to(tl.float32)
    normed = centred * scale[:, None] * w[None, :] + b[None, :]
    tl.store(found + places, normed.to(found.dtype.element_ty), mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    gradient, total, weight, means, scales, seed, of_branch, of_residual, of_weight, of_bias, count, each,
    width: tl.constexpr, lanes: tl.constexpr, dropped: tl.constexpr, num_rows: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    d = tl.arange(0, lanes)
    w = tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32)
    dw = tl.zeros([num_rows, lanes], tl.float32)
    db = tl.zeros([num_rows, lanes], tl.float32)
    end = tl.minimum((program + 1) * each, count)
    for first in range(program * each, end, num_rows):
        n = first + tl.arange(0, num_rows)
        inside = (n[:, None] < end) & (d[None, :] < width)
        places = n.to(tl.int64)[:, None] * width + d[None, :]
        dy = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(total + places, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(means + n, mask=n < end, other=0.0)
        scale = tl.load(scales + n, mask=n < end, other=0.0)
        normed = tl.where(inside, (x - mean[:, None]) * scale[:, None], 0.0)
        dw += dy * normed
        db += dy
        dn = dy * w[None, :]
        of_mean = tl.sum(dn, 1) / width
        of_scale = tl.sum(dn * normed, 1) / width
        dx = (dn - of_mean[:, None] - normed * of_scale[:, None]) * scale[:, None]
        tl.store(of_residual + places, dx.to(of_residual.dtype.element_ty), mask=inside)
        if dropped > 0:
            enlarged: tl.constexpr = 1 / (1 - dropped / 4294967296)
            dx = tl.where(kept(row_bits(seed, n)[:, None], d[None, :], dropped), dx * enlarged, 0.0)
            tl.store(of_branch + places, dx.to(of_branch.dtype.element_ty), mask=inside)
    tl.store(of_weight + program * width + d, tl.sum(dw, 0), mask=d < width)
    tl.store(of_bias + program * width + d, tl.sum(db, 0), mask=d < width)
