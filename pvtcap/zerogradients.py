"""ZeRO 1 and 2 go through gradients parameter by parameter: here are fewer operations, and cheaper ones, for the same.

DeepSpeed 0.19 takes the norm of each parameter's gradient, of a copy in float64: on CPUs 0.14 of 3.7 s. In 16 bits it
sums gradients in one flat float32 buffer a group, and adds each to it in two operations: with the norms, on a GPU, four
kernels a parameter, each launched for itself, 11 ms of 130 (benchmarks/LOG.md). What comes out is the same but for the
order in which squares are summed. On CPUs it gathers the new parameters by gloo's ``all_gather``, which takes longer
than to reduce the gradients, twice as many bytes. In float32 its master weights are a copy of the parameters. And a
rank that is alone has nobody to reduce with, and no part of the gradients to put together: in float32 two copies of
them less in the backward pass, one in the step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.adamw import adamw

_BUFFERS = "0.19."  # the releases that keep such buffers under these names
_ROW = 1024


def taken_at_once(optimizer: Any) -> None:
    """Have this ZeRO optimizer do so; one of another stage or release stays as it is."""
    import deepspeed
    from deepspeed.runtime.zero import stage_1_and_2

    if deepspeed.__version__.startswith(_BUFFERS) and hasattr(optimizer, "_get_compact_grad_partition_buffer"):
        if torch.distributed.get_backend() == "gloo":
            stage_1_and_2.all_gather_dp_groups = _gather_parameters
        alone = torch.distributed.get_world_size() == 1
        if alone:
            optimizer.buffered_reduce_fallback = _reduce_alone
        if optimizer.dtype == torch.float32 and not optimizer.cpu_offload:
            _share_master_weights(optimizer)
            if alone and type(optimizer.optimizer) is AdamW:
                optimizer.step = _StepAlone(optimizer)
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


def _share_master_weights(optimizer: Any) -> None:
    """Have the parameters' own memory as the master weights; DeepSpeed's copies from one to the other do nothing."""
    rank = torch.distributed.get_rank()
    masters = optimizer.single_partition_of_fp32_groups
    for parts, master in zip(optimizer.parallel_partitioned_bit16_groups, masters, strict=True):
        master.data = parts[rank].data
    optimizer._link_all_hp_params()


class _StepAlone:
    """``step`` of a ``DeepSpeedZeroOptimizer`` in float32 with one rank: gradients are clipped and used where they lie.

    DeepSpeed makes each group's gradients flat, multiplies, and updates: 0.09 of 2.9 s on two CPUs. The state is as it
    leaves it, flat, for its checkpoints.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.usual = optimizer, optimizer.step

    def __call__(self) -> None:
        zero = self.optimizer
        norm = zero._global_grad_norm = zero.scaled_global_norm()
        if not torch.isfinite(norm):  # of finite gradients, beyond float32: DeepSpeed leaves out that step
            self.usual()
            return
        divisor = torch.clamp((norm + 1e-6) / zero.clip_grad, min=1.0)
        for index, group in enumerate(zero.optimizer.param_groups):
            self._update(group, zero.averaged_gradients[index], divisor)
            zero.averaged_gradients[index] = zero.all_grad_tensors[index] = None
            zero.free_grad_in_param_list(zero.params_in_partition[index])
        zero._lazy_init_hp_params_optimizer_state()

    def _update(self, group: dict[str, Any], gradients: list[Tensor], divisor: Tensor) -> None:
        (weights,) = group["params"]
        state = self.optimizer.optimizer.state[weights]
        if not state:  # as AdamW itself does at its first step
            state["step"] = torch.zeros((), device=weights.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weights), torch.zeros_like(weights)
        sizes = [gradient.numel() for gradient in gradients]

        def pieces(flat: Tensor) -> list[Tensor]:  # which may be longer than the gradients: padding
            return list(torch.split(flat.detach()[: sum(sizes)], sizes))

        beta1, beta2 = group["betas"]
        with torch.no_grad():
            adamw(
                pieces(weights),
                [gradient.reshape(-1) for gradient in gradients],
                pieces(state["exp_avg"]),
                pieces(state["exp_avg_sq"]),
                max_exp_avg_sqs=[],
                state_steps=[state["step"].clone() for _ in sizes],
                fused=True,
                grad_scale=divisor,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            state["step"] += 1


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
