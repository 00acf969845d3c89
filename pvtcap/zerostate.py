"""A trained model's parameters out of DeepSpeed's sharded files, by one process, whatever ranks and stage wrote them.

Needed only where a checkpoint has lost its ``trainable.safetensors``. DeepSpeed's reader unpickles anything, so a file
is first looked through for what it would call: tensors, plain values and a few classes of DeepSpeed's pass.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Set
from pathlib import Path

import torch
from torch import Tensor

from pvtcap.errors import CheckpointError
from pvtcap.weightfiles import read_tree

_ALLOWED = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def consolidated(folder: Path, stage: int, precision: str, wanted: Set[str]) -> dict[str, Tensor]:
    """The ``wanted`` parameters by name, whole, float32, on the CPU; CheckpointError when the files lack any.

    ``folder`` holds DeepSpeed's ``*_model_states.pt`` and ``*_optim_states.pt``; no process group is started.
    """
    files = sorted(folder.glob("*_states.pt"))
    if not files:
        raise CheckpointError("no DeepSpeed state here", where=folder, wanted="*_model_states.pt, *_optim_states.pt")
    refuse_code(folder)
    state = _unsharded(folder, files, precision) if stage == 0 else _sharded(folder)
    missing = sorted(wanted - set(state))
    if missing:
        raise CheckpointError(
            "DeepSpeed's files lack parameters of this model",
            where=folder,
            got=f"{len(missing)} missing ({missing[0]}, …)",
        )
    return {name: state[name].to(torch.float32) for name in wanted}


def refuse_code(folder: Path) -> None:
    """CheckpointError where a file of DeepSpeed's would run code when it is read."""
    for file in sorted(folder.glob("*_states.pt")):
        _refuse_code(file)


def _refuse_code(file: Path) -> None:
    try:
        calls = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - _ALLOWED
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"not a readable DeepSpeed file ({type(error).__name__})", where=file, do="It may be cut short."
        ) from None
    if calls:
        raise CheckpointError("refused: this file would run code", where=file, got=", ".join(sorted(calls)))


def _unsharded(folder: Path, files: list[Path], precision: str) -> dict[str, Tensor]:
    """ZeRO-0: every rank has all of it, in the precision of the training."""
    if precision != "fp32":
        raise CheckpointError(
            f"ZeRO-0 in {precision} keeps its float32 parameters where only training finds them",
            where=folder,
            do="Resume the run for one step: its next checkpoint has trainable.safetensors.",
        )
    state: dict[str, Tensor] = read_tree(files[0])["module"]
    return state


def _sharded(folder: Path) -> dict[str, Tensor]:
    # DeepSpeed picks its accelerator at import; for reading files it needs none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its progress
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        try:
            state: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
        except (ValueError, FileNotFoundError, KeyError, IndexError) as error:
            raise CheckpointError(
                f"DeepSpeed cannot put its files together ({' '.join(str(error).split())[:160]})",
                where=folder,
                do="Copy the files of all ranks into this folder.",
            ) from None
    return state
