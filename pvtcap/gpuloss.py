"""Cross-entropy on a GPU, one kernel forward and one back, which read 16-bit logits and compute in float32.

torch would make float32 of them first, twice as many bytes as the logits themselves, the largest tensor of a step.

Shapes: M tokens with a label, V pieces, W columns of logits, those behind V being no pieces.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

# Products fuse with the sums behind them; Triton 3.9 warns whoever does not ask for it, and later ones would not fuse.
TILE = {"num_columns": 4096, "num_warps": 8, "enable_fp_fusion": True}
LOG2E = tl.constexpr(1.4426950408889634)


def cross_entropies(logits_MW: Tensor, labels_M: Tensor, pieces: int, smoothing: float) -> Tensor:
    """(M,) float32, in nats; ``smoothing`` as in torch, of Szegedy et al., 2016: so much of a label is all V pieces."""
    losses: Tensor = _CrossEntropies.apply(logits_MW, labels_M, pieces, smoothing)
    return losses


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, pieces: int, smoothing: float) -> Tensor:
        logits, count, columns = logits.contiguous(), logits.shape[0], logits.shape[1]
        losses, sums = (torch.empty(count, dtype=torch.float32, device=logits.device) for _ in range(2))
        _forward[(count,)](logits, labels, losses, sums, columns, pieces, smoothing, **TILE)
        ctx.save_for_backward(logits, labels, sums)
        ctx.how = pieces, smoothing
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        logits, labels, sums = ctx.saved_tensors
        of_logits, (pieces, smoothing) = torch.empty_like(logits), ctx.how
        # A sum's gradient is one number for all.
        gradient, (count, columns) = gradients[0].contiguous(), logits.shape
        _backward[(count,)](logits, labels, sums, gradient, of_logits, columns, pieces, smoothing, **TILE)
        return of_logits, None, None, None


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    logits, labels, losses, sums, columns, pieces: tl.constexpr, smoothing: tl.constexpr, num_columns: tl.constexpr
):
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * columns
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    all_logits = tl.full((), 0.0, tl.float32)
    for first in range(0, pieces, num_columns):
        v = first + tl.arange(0, num_columns)
        x = tl.load(start + v, mask=v < pieces, other=float("-inf")).to(tl.float32) * LOG2E
        highest = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp2(top - highest) + tl.sum(tl.exp2(x - highest), 0)
        top = highest
        if smoothing > 0:
            all_logits += tl.sum(tl.where(v < pieces, x, 0.0), 0)
    log_sum = top + tl.log2(total)
    of_label = tl.load(start + tl.load(labels + row)).to(tl.float32) * LOG2E
    loss = log_sum - (1 - smoothing) * of_label
    if smoothing > 0:
        loss -= all_logits * (smoothing / pieces)
    tl.store(sums + row, log_sum)
    tl.store(losses + row, loss / LOG2E)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    logits, labels, sums, gradient, of_logits, columns, pieces: tl.constexpr, smoothing: tl.constexpr,
    num_columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = row.to(tl.int64) * columns
    label, log_sum = tl.load(labels + row), tl.load(sums + row)
    asked = tl.load(gradient + row)
    for first in range(0, columns, num_columns):
        v = first + tl.arange(0, num_columns)
        x = tl.load(logits + start + v, mask=v < pieces, other=float("-inf")).to(tl.float32) * LOG2E
        share = tl.where(v == label, 1 - smoothing, 0.0) + smoothing / pieces
        found = tl.where(v < pieces, (tl.exp2(x - log_sum) - share) * asked, 0.0)
        tl.store(of_logits + start + v, found.to(of_logits.dtype.element_ty), mask=v < columns)
