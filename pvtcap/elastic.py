"""A checkpoint of one number of ranks and ZeRO stage, made ready for another.

    convert(checkpoint, into, config, groups)            # rank 0: DeepSpeed's universal format, a folder a parameter
    engine.load(into, ENGINE)                            # an Engine(…, universal=True): ZeRO 1-3
    load_plain(optimizer, groups, into)                  # ZeRO-0, into which DeepSpeed cannot load it

    INTO/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt     the weights and AdamW's state, whole
    INTO/zero/optimizer_state.pt, INTO/*_model_states.pt      what DeepSpeed wants beside them

DeepSpeed converts what ZeRO 1-3 wrote; what ZeRO-0 wrote, torch's own optimizer state, is converted here.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pvtcap.checkpoint import ENGINE, Checkpoint
from pvtcap.config import Config
from pvtcap.errors import CheckpointError
from pvtcap.weightfiles import read_tree
from pvtcap.zerostate import refuse_code

Groups = Sequence[Mapping[str, torch.Size]]  # the optimizer's: parameters' names and shapes, in its order

_STATES, _COMMON = ("exp_avg", "exp_avg_sq"), "optimizer_state.pt"


def is_needed(checkpoint: Checkpoint, config: Config, num_ranks: int) -> bool:
    """Would DeepSpeed refuse, or silently misread, what other ranks or another stage wrote?"""
    before, now = checkpoint.config.zero.stage, config.zero.stage
    # At ZeRO-0 every rank holds all: its files know no number of ranks.
    return before != now or (now > 0 and checkpoint.manifest.world_size != num_ranks)


def convert(checkpoint: Checkpoint, into: Path, config: Config, groups: Groups) -> Path:
    """Write the universal format of ``checkpoint`` to ``into``/deepspeed; one process does it.

    Raises CheckpointError where that is not possible.
    """
    before, now = checkpoint.config.zero.stage, config.zero.stage
    if 0 in (before, now) and config.precision != "fp32":
        raise CheckpointError(
            "ZeRO-0 keeps the float32 weights of a 16-bit run where no other stage finds them",
            where=checkpoint.path,
            got=f"zero.stage {now}",
            wanted=f"zero.stage {before}" if before == 0 else "zero.stage 1, 2 or 3",
        )
    source, out = checkpoint.path / ENGINE, into / ENGINE
    refuse_code(source)
    if into.exists():
        shutil.rmtree(into)
    out.mkdir(parents=True)
    if before == 0:
        _convert_plain(source, out, groups)
    else:
        _convert_sharded(source, out, before, groups)
    _complete(out, groups)
    return into


def load_plain(optimizer: torch.optim.Optimizer, groups: Groups, folder: Path) -> None:
    """Set the weights and AdamW's state of an optimizer that holds the parameters whole."""
    for group, names in zip(optimizer.param_groups, groups, strict=True):
        for parameter, name in zip(group["params"], names, strict=True):
            _load_one(parameter, optimizer.state[parameter], folder / ENGINE / "zero" / name)


def _load_one(parameter: nn.Parameter, state: dict[str, Any], folder: Path) -> None:
    with torch.no_grad():
        parameter.copy_(_param(folder, "fp32"))
    for name in _STATES:
        state[name] = _param(folder, name).reshape(parameter.shape).to(parameter.device)
    step = torch.load(folder / "step.pt", weights_only=True, map_location="cpu")
    state["step"] = torch.as_tensor(step, dtype=torch.float32)


def _param(folder: Path, name: str) -> torch.Tensor:
    tensor: torch.Tensor = torch.load(folder / f"{name}.pt", weights_only=True, map_location="cpu")["param"]
    return tensor


def _convert_sharded(source: Path, out: Path, stage: int, groups: Groups) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its progress
        from deepspeed.checkpoint import ds_to_universal

        how = argparse.Namespace(
            input_folder=str(source),
            output_folder=str(out),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        ds_to_universal.main(how)
    if stage == 3:
        _like_the_others(out, groups)


def _like_the_others(out: Path, groups: Groups) -> None:
    """Of ZeRO-3 DeepSpeed leaves bare flat tensors, and the step in the common state alone: ZeRO 1 and 2 want more."""
    common = torch.load(out / "zero" / _COMMON, weights_only=False, map_location="cpu")  # just written, by this process
    for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
        folder = out / "zero" / name
        for key in ("fp32", *_STATES):
            flat = torch.load(folder / f"{key}.pt", weights_only=True, map_location="cpu")
            torch.save({"param": flat.reshape(shape)}, folder / f"{key}.pt")
        torch.save(common["optimizer_state_dict"]["state"][0]["step"], folder / "step.pt")


def _convert_plain(source: Path, out: Path, groups: Groups) -> None:
    file = sorted(source.glob("mp_rank_*_model_states.pt"))[0]
    tree = read_tree(file)
    optimizer = tree["optimizer"]
    for group, names in zip(optimizer["param_groups"], groups, strict=True):
        for index, name in zip(group["params"], names, strict=True):
            folder, state = out / "zero" / name, optimizer["state"][index]
            folder.mkdir(parents=True)
            torch.save({"param": tree["module"][name]}, folder / "fp32.pt")
            for key in _STATES:
                torch.save({"param": state[key]}, folder / f"{key}.pt")
            torch.save(state["step"], folder / "step.pt")
    torch.save({}, out / "zero" / _COMMON)
    torch.save(tree, out / file.name)


def _complete(out: Path, groups: Groups) -> None:
    """Add what DeepSpeed wants at one stage and writes only at another; CheckpointError if a parameter is missing."""
    names = [name for group in groups for name in group]
    missing = [name for name in names if not (out / "zero" / name / "exp_avg.pt").exists()]
    if missing:
        raise CheckpointError("DeepSpeed's files lack parameters of this model", where=out, got=missing[0])
    step = torch.load(out / "zero" / names[0] / "step.pt", weights_only=True, map_location="cpu")
    common = torch.load(out / "zero" / _COMMON, weights_only=False, map_location="cpu")
    # Empty: the optimizer's options are the configuration's, engine.load sees to it.
    options: list[dict[str, Any]] = [{} for _ in groups]
    common |= {"param_groups": options, "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": options}}
    file = sorted(out.glob("*_model_states.pt"))[0]
    tree = torch.load(file, weights_only=False, map_location="cpu")
    torch.save({"ds_version": tree["ds_version"], **common}, out / "zero" / _COMMON)
    tree |= {"module": {}, "optimizer": None}
    for path in out.glob("*_model_states.pt"):
        path.unlink()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save(tree, out / name)
