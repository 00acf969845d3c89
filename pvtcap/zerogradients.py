"""ZeRO 1 and 2 in 16 bits, where they go through the parameters one by one: a few operations for all of them at once.

DeepSpeed 0.19 sums gradients in one flat float32 buffer a group, and yet takes a norm of each parameter's part of it,
converts it to float64 first, and adds each gradient to it in two operations. On a GPU that is four kernels a parameter,
each launched for itself: 11 ms of a step of 130 (benchmarks/LOG.md). What comes out is the same but for the order in
which squares are summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BUFFERS = "0.19."  # the releases that keep such buffers under these names


def taken_at_once(optimizer: Any) -> None:
    """Have this ZeRO optimizer do so; one of another stage or release stays as it is."""
    import deepspeed

    if deepspeed.__version__.startswith(_BUFFERS) and hasattr(optimizer, "_get_compact_grad_partition_buffer"):
        at_once = _AtOnce(optimizer)
        optimizer.get_grad_norm_direct = at_once.norm
        optimizer._add_full_reduction_to_compact_grad_partition = at_once.add


class _AtOnce:
    """In place of the two methods of a ``DeepSpeedZeroOptimizer`` that are named in ``taken_at_once``."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.norm_of_each = optimizer, optimizer.get_grad_norm_direct

    def norm(self, gradients: Any, params: Any, norm_type: float = 2) -> Tensor:
        """The norm of a group's gradients on all ranks together; its padding is zeros."""
        from deepspeed import comm

        flat = getattr(gradients, "flat_partition", None)
        if flat is None or norm_type != 2:
            norm: Tensor = self.norm_of_each(gradients, params, norm_type)
            return norm
        square = torch.linalg.vector_norm(flat, dtype=torch.float64).square().float()
        comm.all_reduce(square, group=self.optimizer.dp_process_group)
        return torch.sqrt(square)  # not finite, DeepSpeed sees it by itself

    def add(self, reduced: Tensor, dtype: torch.dtype) -> None:
        """Add this rank's parts of the reduced bucket, in which parameters lie one behind the other."""
        from deepspeed import comm

        optimizer, offset = self.optimizer, 0
        sums, parts = list[Tensor](), list[Tensor]()
        for group, index, name in optimizer.ipg_buckets[dtype].params:
            length = optimizer.bit16_groups[group][index].numel()
            rank = comm.get_rank(group=optimizer.real_dp_process_group[group])
            skipped = optimizer.grad_start_offset[group][rank].get(name)
            if skipped is not None:
                place = optimizer.grad_partition_insertion_offset[group][rank][name]
                ours = min(length - skipped, optimizer.partition_size[group] - place)
                if ours > 0:
                    flat = optimizer._get_compact_grad_partition_buffer(group).flat_partition
                    sums.append(flat.narrow(0, place, ours))
                    parts.append(reduced.narrow(0, offset + skipped, ours))
            offset += length
        if sums:
            torch._foreach_add_(sums, parts)
