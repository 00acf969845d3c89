"""DeepSpeed behind one seam: its configuration as a pure function, the optimizer's groups, the learning rate.

engine = Engine(model, config, plan, world)
loss_sum = engine.forward_backward(batch, scale)     # once a micro-batch
grad_norm = engine.step(lr_scale)                    # once a global batch
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pvtcap import jsonfile
from pvtcap.batch import Batch
from pvtcap.captioner import Captioner
from pvtcap.config import BatchPlan, Config, OptimConfig
from pvtcap.deepspeedops import load_cpu_communication
from pvtcap.dist import World
from pvtcap.errors import ConfigError
from pvtcap.zerogradients import taken_at_once

# Elements of the buffer through which ZeRO reduces gradients. DeepSpeed's 500 million would hold all of our models' at
# once: 2 GB of float32, on CPUs new pages in each step (0.8 s of 4.6, benchmarks/LOG.md).
_BUCKET = 50_000_000
_UNSEEN_BYTES = 32 << 20  # of gradients that wait to be looked at: a GPU looks at many in the time of one


def deepspeed_dict(config: Config, plan: BatchPlan, *, universal: bool = False) -> dict[str, Any]:
    """DeepSpeed's own configuration; written to the run folder as ``deepspeed.json``.

    ``universal``: it is to load a checkpoint in DeepSpeed's universal format. Raises ConfigError where the user's own
    file (``zero.deepspeed_json``) says something else than follows from the rest of the configuration.
    """
    bf16, fp16, zero = config.precision == "bf16", config.precision == "fp16", config.zero
    pinned = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    tree: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": {
            "stage": zero.stage,
            **({"offload_optimizer": pinned} if zero.offload != "none" else {}),
            **({"offload_param": pinned} if zero.offload == "optimizer+parameters" else {}),
        },
        # Not finite, a gradient ends the run before the step (gradients_are_finite): DeepSpeed need not look again.
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
        "fp16": {"enabled": fp16},
        # Sums of many small gradients: in 16 bits the later ones would be rounded away. ZeRO-0 offers nothing else.
        "data_types": {"grad_accum_dtype": config.precision if zero.stage == 0 else "fp32"},
        "steps_per_print": 10**9,  # the monitor prints
        # Offloaded too, the optimizer is torch's fused one: DeepSpeed's own would be compiled first.
        "zero_force_ds_cpu_optimizer": False,
    }
    if universal:
        tree["checkpoint"] = {"load_universal": True}
    if zero.deepspeed_json is not None:
        tree = _merged(tree, _read_json(zero.deepspeed_json), zero.deepspeed_json)
    tree["zero_optimization"].setdefault("reduce_bucket_size", _BUCKET)
    if zero.stage in (1, 2):
        # DeepSpeed would cut up each gradient for those who need a part of it, and yet send all of it to all.
        tree["zero_optimization"].setdefault("reduce_scatter", False)
    if zero.stage == 2 and zero.offload == "none" and config.precision == "fp32" and plan.world_size == 1:
        # There is nobody to reduce with: neither into a bucket nor from it into the rank's part (zerogradients).
        tree["zero_optimization"].setdefault("contiguous_gradients", False)
    return tree


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError("cannot read zero.deepspeed_json", where=path, got="no such file")
    tree = jsonfile.read(path, ConfigError, "zero.deepspeed_json is not JSON")
    if not isinstance(tree, dict):
        raise ConfigError("zero.deepspeed_json is not a JSON object", where=path, got=type(tree).__name__)
    return tree


def _merged(ours: dict[str, Any], theirs: dict[str, Any], where: Path, above: str = "") -> dict[str, Any]:
    """Both; ConfigError at the first key to which they give different values. "auto" leaves it to ours."""
    merged = dict(ours)
    for key, value in theirs.items():
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            merged[key] = _merged(ours[key], value, where, f"{above}{key}.")
        elif key not in ours:
            merged[key] = value
        elif value not in (ours[key], "auto"):
            raise ConfigError(
                f"'{above}{key}' follows from the configuration, and zero.deepspeed_json says something else",
                where=where,
                got=json.dumps(value),
                wanted=json.dumps(ours[key]),
                do="Leave it out there, and set it in the configuration (docs/training.md says which key).",
            )
    return merged


def lr_scale(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Share of the peak learning rate at ``step`` (from 1): linear warm-up, then a cosine to ``min_lr_ratio``."""
    if step <= optim.warmup_steps:
        return step / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine


def parameter_groups(model: Captioner, optim: OptimConfig) -> list[dict[str, Any]]:
    """AdamW's groups: encoder or not, decayed (matrices) or not (biases, norms). lr_scale scales their ``peak_lr``."""
    trainable = model.trainable()
    return [
        {
            "params": [trainable[name] for name in names],
            "weight_decay": optim.weight_decay if decayed else 0.0,
            "peak_lr": (optim.encoder_lr or optim.lr) if in_encoder else optim.lr,
        }
        for (in_encoder, decayed), names in _named_groups(model).items()
    ]


def _named_groups(model: Captioner) -> dict[tuple[bool, bool], list[str]]:
    """The trainable parameters' names, by whether they are the encoder's and whether they are matrices."""
    groups: dict[tuple[bool, bool], list[str]] = {}
    for name, parameter in model.trainable().items():
        groups.setdefault((name.startswith("encoder."), parameter.ndim >= 2), []).append(name)
    return groups


class Engine:
    """A Captioner under DeepSpeed. All methods are collective: every rank calls them in the same order.

    ``universal``: ``load`` will be given a checkpoint that ``elastic`` converted.
    """

    def __init__(
        self, model: Captioner, config: Config, plan: BatchPlan, world: World, *, universal: bool = False
    ) -> None:
        # DeepSpeed picks its accelerator at import; on a machine without a GPU it must not look for CUDA's compiler.
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if world.device.type == "cuda" else "cpu")
        import deepspeed

        deepspeed.utils.logger.setLevel("WARNING")
        if world.device.type == "cpu":
            load_cpu_communication()
        groups = parameter_groups(model, config.optim)
        # Fused: one pass over memory instead of ten, on CPUs as well.
        adamw = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, fused=True)
        self.world, self.config, self.model = world, config, model
        # The names, since ZeRO-3 hides sizes and DeepSpeed may not be asked which parameters it holds.
        self._trainable = model.trainable()
        # Names and shapes of the optimizer's parameters, group by group, in its order.
        self.groups = [{name: self._trainable[name].shape for name in names} for names in _named_groups(model).values()]
        self._num_trainable = sum(parameter.numel() for parameter in self._trainable.values())
        self._gradient_sum = torch.zeros((), device=world.device)
        self._unseen, self._unseen_bytes = list[Tensor](), 0
        if config.precision != "fp16":
            self._watch_gradients()
        model.decoder.prepare_training(
            checkpointing=config.train.activation_checkpointing, compiled=config.train.compile
        )
        if config.train.compile:
            model.encoder.compile()
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model.to(world.device),
            optimizer=adamw,
            config=deepspeed_dict(config, plan, universal=universal),
            dist_init_required=False,
        )
        taken_at_once(self.optimizer)

    def forward_backward(self, batch: Batch, scale: float) -> float:
        """Back-propagate the batch's loss sum times ``scale``; returns the sum itself (nats)."""
        loss_sum: Tensor = self.deepspeed(batch.to(self.world.device))
        # DeepSpeed averages gradients over ranks, and would divide by accumulation: ours are sums over a global count.
        self.deepspeed.backward(loss_sum * (scale * self.world.size), scale_wrt_gas=False)
        return float(loss_sum.detach())

    def row_losses(self) -> list[float]:
        """Sums of the losses of each row (nats), of the last ``forward_backward``."""
        return [float(loss) for loss in self.model.decoder.row_losses_B]

    def gradients_are_finite(self) -> bool:
        """Whether those of this rank were, in all backward passes since last asked.

        In fp16 some are not from time to time: DeepSpeed leaves out that step and lowers the loss's scale.
        """
        finite = bool(torch.isfinite(self._gradient_sum))
        self._gradient_sum = torch.zeros((), device=self.world.device)
        return finite

    def _watch_gradients(self) -> None:
        """ZeRO takes gradients away as soon as they are there: each is kept until some can be looked at together."""

        def keep(gradient: Tensor) -> None:
            if not self._unseen:
                # The last ones at the end of the backward pass: behind it DeepSpeed may set them to 0 where they are.
                torch.autograd.Variable._execution_engine.queue_callback(self._look)
            # Another tensor of the same memory: the gradient itself becomes the parameter's without being copied.
            self._unseen.append(gradient.detach())
            self._unseen_bytes += gradient.nbytes
            if self._unseen_bytes > _UNSEEN_BYTES:
                self._look()

        for parameter in self._trainable.values():
            parameter.register_hook(keep)  # type: ignore[no-untyped-call]

    def _look(self) -> None:
        """A value that is not finite stays so in a sum: of both infinities comes NaN."""
        if self._unseen:
            if self.world.device.type == "cuda":  # many in one kernel
                self._gradient_sum += nn.utils.get_total_norm(self._unseen, norm_type=1.0)
            else:  # a quarter of the time of that
                self._gradient_sum += torch.stack([gradient.sum() for gradient in self._unseen]).sum()
            self._unseen.clear()
            self._unseen_bytes = 0

    def accumulate(self) -> None:
        """Tell DeepSpeed that a micro-batch which is not the step's last has been back-propagated."""
        assert not self.deepspeed.is_gradient_accumulation_boundary()
        self.deepspeed.step()

    def step(self, scale: float) -> float:
        """Update with the learning rates at ``scale`` times their peaks; returns the gradient norm before clipping."""
        assert self.deepspeed.is_gradient_accumulation_boundary()
        for group in self.optimizer.param_groups:
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

    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes: weights and AdamW's two moments in float32, the weights once more, whole."""
        in_16_bits = 2 if self.config.precision != "fp32" else 0
        return self._num_trainable * (4 + 4 + 4 + 4 + in_16_bits)

    def save(self, folder: str, tag: str) -> None:
        """DeepSpeed's own sharded state. Frozen parameters are left out: no checkpoint carries the encoder."""
        self.deepspeed.save_checkpoint(folder, tag=tag, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: str, tag: str) -> None:
        """What ``save`` wrote, by as many ranks and at the same ZeRO stage, or what ``elastic`` made of another's.

        The optimizer's options stay those of this configuration: DeepSpeed would take the saved ones, and at ZeRO-3
        those of the first group for all.
        """
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.deepspeed.load_checkpoint(folder, tag=tag, load_module_strict=False)
        for group, kept in zip(self.optimizer.param_groups, options, strict=True):
            group.update(kept)
        for state in self.optimizer.state.values():
            # Of the universal format ZeRO-3 gives all groups one tensor, to which each would add its step.
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()
