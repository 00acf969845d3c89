"""DeepSpeed behind one seam: its configuration as a pure function, the optimizer's groups, the learning rate.

engine = Engine(model, config, plan, world)
loss_sum = engine.forward_backward(batch, scale)     # once a micro-batch
grad_norm = engine.step(lr_scale)                    # once a global batch
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from pvtcap.captioner import Captioner
from pvtcap.config import BatchPlan, Config, OptimConfig
from pvtcap.dist import World
from pvtcap.stream import Batch


def deepspeed_dict(config: Config, plan: BatchPlan) -> dict[str, Any]:
    """DeepSpeed's own configuration; written to the run folder as ``deepspeed.json``."""
    bf16 = config.precision == "bf16"
    return {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": {"stage": config.zero.stage},
        "bf16": {"enabled": bf16},
        # Sums of many small gradients: in bf16 the later ones would be rounded away. ZeRO-0 offers nothing else.
        "data_types": {"grad_accum_dtype": "bf16" if bf16 and config.zero.stage == 0 else "fp32"},
        "steps_per_print": 10**9,  # the monitor prints
    }


def lr_scale(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Share of the peak learning rate at ``step`` (from 1): linear warm-up, then a cosine to ``min_lr_ratio``."""
    if step <= optim.warmup_steps:
        return step / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine


def parameter_groups(model: Captioner, optim: OptimConfig) -> list[dict[str, Any]]:
    """AdamW's groups: encoder or not, decayed (matrices) or not (biases, norms). lr_scale scales their ``peak_lr``."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.trainable().items():
        groups.setdefault((name.startswith("encoder."), parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": optim.weight_decay if decayed else 0.0,
            "peak_lr": (optim.encoder_lr or optim.lr) if in_encoder else optim.lr,
        }
        for (in_encoder, decayed), parameters in groups.items()
    ]


class Engine:
    """A Captioner under DeepSpeed. All methods are collective: every rank calls them in the same order."""

    def __init__(self, model: Captioner, config: Config, plan: BatchPlan, world: World) -> None:
        # DeepSpeed picks its accelerator at import; on a machine without a GPU it must not look for CUDA's compiler.
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if world.device.type == "cuda" else "cpu")
        import deepspeed

        deepspeed.utils.logger.setLevel("WARNING")
        groups = parameter_groups(model, config.optim)
        adamw = torch.optim.AdamW(
            groups, lr=config.optim.lr, betas=config.optim.betas, fused=world.device.type == "cuda"
        )
        self.world, self.config, self.model = world, config, model
        self.deepspeed, self._optimizer, _, _ = deepspeed.initialize(
            model=model.to(world.device), optimizer=adamw, config=deepspeed_dict(config, plan), dist_init_required=False
        )
        # The names, since ZeRO-3 hides sizes and DeepSpeed may not be asked which parameters it holds.
        self._trainable = model.trainable()

    def forward_backward(self, batch: Batch, scale: float) -> float:
        """Back-propagate the batch's loss sum times ``scale``; returns the sum itself (nats)."""
        loss_sum: Tensor = self.deepspeed(batch.to(self.world.device))
        # DeepSpeed averages gradients over ranks, and would divide by accumulation: ours are sums over a global count.
        self.deepspeed.backward(loss_sum * (scale * self.world.size), scale_wrt_gas=False)
        return float(loss_sum.detach())

    def accumulate(self) -> None:
        """Tell DeepSpeed that a micro-batch which is not the step's last has been back-propagated."""
        assert not self.deepspeed.is_gradient_accumulation_boundary()
        self.deepspeed.step()

    def step(self, scale: float) -> float:
        """Update with the learning rates at ``scale`` times their peaks; returns the gradient norm before clipping."""
        assert self.deepspeed.is_gradient_accumulation_boundary()
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        # ZeRO-0 in float32 has torch's own optimizer, which does not tell; clipping changes the gradients in step().
        untold = self._gradient_norm() if self.config.zero.stage == 0 and self.config.precision == "fp32" else 0.0
        self.deepspeed.step()
        told = self.deepspeed.get_global_grad_norm()
        return untold if told is None else float(told)

    def _gradient_norm(self) -> float:
        gradients = [parameter.grad for parameter in self._trainable.values() if parameter.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    @torch.no_grad()
    def loss_sum(self, batch: Batch) -> float:
        """The batch's loss sum (nats) in eval mode."""
        self.deepspeed.eval()
        total = float(self.deepspeed(batch.to(self.world.device)))
        self.deepspeed.train()
        return total

    def trainable_state(self) -> dict[str, Tensor] | None:
        """All trainable parameters, whole, float32, on the CPU of rank 0; None on other ranks."""
        state: dict[str, Tensor] = {}
        for name, parameter in self._trainable.items():
            value = self._full_value(parameter)
            if self.world.is_first:
                state[name] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        return state if self.world.is_first else None

    def _full_value(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        # The float32 master where the optimizer keeps one (ZeRO 1-3, bf16); without one the parameter is the master.
        master: Tensor | None = safe_get_full_fp32_param(parameter)
        return parameter.data if master is None else master

    def save(self, folder: str, tag: str, client_state: dict[str, Any]) -> None:
        """DeepSpeed's own sharded state. Frozen parameters are left out: no checkpoint carries the encoder."""
        self.deepspeed.save_checkpoint(
            folder, tag=tag, client_state=client_state, save_latest=False, exclude_frozen_parameters=True
        )

    def load(self, folder: str, tag: str) -> None:
        self.deepspeed.load_checkpoint(folder, tag=tag, load_module_strict=False)
