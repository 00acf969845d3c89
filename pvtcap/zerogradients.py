"""ZeRO 1 and 2 go through gradients parameter by parameter: here are fewer operations, and cheaper ones, for the same.

DeepSpeed 0.19 takes the norm of each parameter's gradient, of a copy in float64: on CPUs 0.14 of 3.7 s. In 16 bits it
sums gradients in one flat float32 buffer a group, and adds each to it in two operations: with the norms, on a GPU, four
kernels a parameter, each launched for itself, 11 ms of 130 (benchmarks/LOG.md). What comes out is the same but for the
order in which squares are summed. On CPUs it gathers the new parameters by gloo's ``all_gather``, which takes longer
than to reduce the gradients, twice as many bytes. And a rank that is alone reduces nothing: in float32 two copies of
all gradients less, 5 to 10 % of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BUFFERS = "0.19."  # the releases that keep such buffers under these names
_ROW = 1024


def taken_at_once(optimizer: Any) -> None:
    """Have this ZeRO optimizer do so; one of another stage or release stays as it is."""
    import deepspeed
    from deepspeed.runtime.zero import stage_1_and_2

    if deepspeed.__version__.startswith(_BUFFERS) and hasattr(optimizer, "_get_compact_grad_partition_buffer"):
        if torch.distributed.get_backend() == "gloo":
            stage_1_and_2.all_gather_dp_groups = _gather_parameters
        if torch.distributed.get_world_size() == 1:
            optimizer.buffered_reduce_fallback = _reduce_alone
        at_once = _AtOnce(optimizer)
        optimizer.get_grad_norm_direct = at_once.norm
        optimizer._add_full_reduction_to_compact_grad_partition = at_once.add


def _gather_parameters(
    groups_flat: Any, partitioned_param_groups: list[list[Tensor]], dp_process_group: list[Any], *_: Any, **__: Any
) -> None:
    """Each rank's part of each group, a view of the whole, to all others: ``all_gather_dp_groups``, by broadcasts."""
    from deepspeed import comm

    pending = [
        comm.broadcast(part, torch.distributed.get_global_rank(process_group, rank), group=process_group, async_op=True)
        for parts, process_group in zip(partitioned_param_groups, dp_process_group, strict=True)
        for rank, part in enumerate(parts)
        if len(parts) > 1
    ]
    for one in pending:
        one.wait()


def _reduce_alone(*_: Any, **__: Any) -> None:
    """A lone rank's gradients, where they lie, are the reduced ones."""


class _AtOnce:
    """In place of the two methods of a ``DeepSpeedZeroOptimizer`` that are named in ``taken_at_once``."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def norm(self, gradients: Any, params: Any) -> Tensor:
        """The norm of a group's gradients on all ranks together; its padding is zeros."""
        from deepspeed import comm

        flat = getattr(gradients, "flat_partition", None)
        parts = gradients if flat is None else [flat]
        none = torch.zeros((), dtype=torch.float64, device=self.optimizer.device)
        square = torch.stack([none, *(_square(part) for part in parts)]).sum().float()
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
            if skipped is not None and optimizer._use_compact_grad_partition_buffer(group):
                place = optimizer.grad_partition_insertion_offset[group][rank][name]
                ours = min(length - skipped, optimizer.partition_size[group] - place)
                if ours > 0:
                    flat = optimizer._get_compact_grad_partition_buffer(group).flat_partition
                    sums.append(flat.narrow(0, place, ours))
                    parts.append(reduced.narrow(0, offset + skipped, ours))
            offset += length
        if sums:
            torch._foreach_add_(sums, parts)


def _square(part: Tensor) -> Tensor:
    """Of the norm, float64. Sums in float32 are exact enough for short rows: 10^-9 of 137 million values of both signs,
    where one sum of them all is off by 10^-3.
    """
    if part.is_cuda:
        return torch.square(torch.linalg.vector_norm(part, dtype=torch.float64))
    values = part.reshape(-1)
    in_rows = len(values) // _ROW * _ROW
    rows = torch.linalg.vector_norm(values[:in_rows].view(-1, _ROW), dim=1, dtype=torch.float32)
    square = torch.cat([rows, values[in_rows:]]).double().square().sum()
    # Squares of values above 10^19 have no place in float32.
    return square if torch.isfinite(square) else values.double().square().sum()
