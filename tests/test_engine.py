"""pytest tests/test_engine.py"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, RankFunction, torchrun
from torch import Tensor

from pvtcap import zerogradients
from pvtcap.afterstep import val_loss
from pvtcap.captioner import Captioner
from pvtcap.config import Config, batch_plan
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.engine import Engine
from pvtcap.ledger import Ledger
from pvtcap.sources import Sources
from pvtcap.stream import View, train_batches
from pvtcap.text import CaptionTokenizer
from pvtcap.train import train_step

STEPS = 20


def train(world: World, config: Config, steps: int = STEPS) -> dict[str, Any]:
    """A few steps: the losses, gradient norms, a validation loss, and a checksum of every parameter."""
    sources = Sources.open(config.data)
    tokenizer = CaptionTokenizer.train((text for group in sources.captions() for text in group), 100)
    plan = batch_plan(config.data, world.size)
    engine = Engine(Captioner(config, tokenizer.size), config, plan, world)
    view = View(config.data, tokenizer, config.text.max_tokens)
    batches = train_batches(sources, view, plan, world, seed=0, first_step=0)
    ledger = Ledger(config.run.dir, sources, world, start_step=0, max_bad_fraction=0.0)
    stats = [
        train_step(engine, batches, ledger, plan, world, step=step, scale=1.0).stats for step in range(1, steps + 1)
    ]
    state = engine.trainable_state() or {}
    return {
        "losses": [one.loss for one in stats],
        "grad_norms": [one.grad_norm for one in stats],
        "val_loss": val_loss(engine, sources.shardsets[0], view, world, 5),
        "weights": {name: float(value.double().abs().sum()) for name, value in state.items()},
    }


def stages(world: World, tree: dict[str, Any], variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [train(world, parse(merged(tree, variant), "test")) for variant in variants]


def merged(tree: dict[str, Any], variant: dict[str, Any]) -> dict[str, Any]:
    return {**tree, **{k: {**tree.get(k, {}), **v} if isinstance(v, dict) else v for k, v in variant.items()}}


@pytest.fixture
def plain(tree: dict[str, Any]) -> dict[str, Any]:
    """Without dropout, which differs between one worker and two, and with a rate at which rounding stays small.

    AdamW's step is lr in size however small the gradient: where that is rounding alone, signs differ.
    """
    return merged(tree, {"model": {"dropout": 0.0}, "optim": {"lr": 1e-4}})


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(4, marks=pytest.mark.long)])
def test_every_stage_precision_and_accumulation_gives_the_losses_of_one_worker(
    run_ranks: RankFunction, plain: dict[str, Any], ranks: int
) -> None:
    """ZeRO 0-3 × {fp32, bf16} × accumulation {1, 2} on 1, 2 and 4 ranks, beside ZeRO-0 in fp32 on one."""
    grid = list(itertools.product(range(4), ("fp32", "bf16"), (1, 2)))
    variants = [
        {"zero": {"stage": stage}, "precision": precision, "data": {"micro_batch": 8 // ranks // turns}}
        for stage, precision, turns in grid
    ]
    ((alone,),) = run_ranks("test_engine:stages", 1, tree=plain, variants=[{"zero": {"stage": 0}}])
    assert alone["losses"][-1] < alone["losses"][0]
    for case, result in zip(
        grid, run_ranks("test_engine:stages", ranks, tree=plain, variants=variants)[0], strict=True
    ):
        fp32 = case[1] == "fp32"
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5 if fp32 else 2e-2), case
        assert result["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-5 if fp32 else 2e-2), case
        assert (result["losses"] == alone["losses"]) <= fp32, "bf16 must round"
        assert result["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-3 if fp32 else 5e-2), case
        assert result["weights"].keys() == alone["weights"].keys()
        if fp32:
            for name, total in result["weights"].items():
                assert total == pytest.approx(alone["weights"][name], rel=1e-4, abs=1e-3), (case, name)


def test_one_value_that_is_not_finite_is_seen_at_every_stage(run_ranks: RankFunction, plain: dict[str, Any]) -> None:
    """In the first gradient of the backward pass or the last, before DeepSpeed takes them away, or sets them to 0."""
    for seen in run_ranks("test_engine:broken_gradients", 2, tree=plain):
        assert len(seen) == 16
        assert all(found == [True, False] for found in seen.values()), seen


def broken_gradients(world: World, tree: dict[str, Any]) -> dict[str, list[bool]]:
    """Of each stage, precision and place: were gradients finite without a broken one, and with it?"""
    found = {}
    for stage, precision in itertools.product(range(4), ("fp32", "bf16")):
        for name in ("decoder.lm.cls.predictions.transform.dense.bias", "encoder.pvt.patch_embed.proj.bias"):
            config = parse(merged(tree, {"zero": {"stage": stage}, "precision": precision}), "test")
            sources, plan = Sources.open(config.data), batch_plan(config.data, world.size)
            tokenizer = CaptionTokenizer.train((text for group in sources.captions() for text in group), 100)
            view = View(config.data, tokenizer, config.text.max_tokens)
            batch = next(train_batches(sources, view, plan, world, seed=0, first_step=0))
            model, broken = Captioner(config, tokenizer.size), False

            def spoil(gradient: Tensor) -> Tensor:
                spoiled = gradient.clone()
                spoiled[0] = float("inf")
                return spoiled if broken else gradient  # noqa: B023  # of this turn, as it is to be

            model.trainable()[name].register_hook(spoil)
            engine = Engine(model, config, plan, world)
            finite = []
            for broken in (False, True):  # spoil() looks
                engine.forward_backward(batch, 1 / batch.num_labels)
                finite.append(engine.gradients_are_finite())
                if not broken:
                    engine.step(0.0)
            found[f"{stage} {precision} {name}"] = finite
    return found


def test_gradients_taken_at_once_are_those_taken_one_by_one(
    run_ranks: RankFunction, plain: dict[str, Any], tmp_path: Path
) -> None:
    """Beside DeepSpeed's own way; three ranks share no parameter evenly, and a small bucket holds few of them."""
    small = tmp_path / "small.json"
    small.write_text('{"zero_optimization": {"reduce_bucket_size": 1000}}')
    tree = merged(plain, {"data": {"global_batch": 6}, "precision": "bf16"})
    forms: dict[str, dict[str, Any]] = {
        "bf16": {"zero": {"stage": 1}, "data": {**tree["data"], "micro_batch": 2}},
        "fp32": {"zero": {"stage": 2}, "precision": "fp32"},
        "small": {"zero": {"stage": 2, "deepspeed_json": str(small)}},
        "offload": {"zero": {"stage": 2, "offload": "optimizer"}},
    }
    for found in run_ranks("test_engine:both_ways", 3, tree=tree, forms=forms):
        for at_once, one_by_one in found.values():
            assert at_once["grad_norms"][:3] == pytest.approx(one_by_one["grad_norms"][:3], rel=1e-6)
            # A clipped gradient's last digit decides how some weight is rounded to 16 bits, sooner or later.
            assert at_once["grad_norms"] == pytest.approx(one_by_one["grad_norms"], rel=1e-3)
            assert at_once["losses"] == pytest.approx(one_by_one["losses"], rel=1e-4)
            assert at_once["weights"] == pytest.approx(one_by_one["weights"], rel=1e-3, abs=1e-3)


def test_a_lone_ranks_step_is_deepspeeds(run_ranks: RankFunction, plain: dict[str, Any]) -> None:
    """In float32, whether gradients are clipped or not: the same numbers but for the division's last digit."""
    forms: dict[str, dict[str, Any]] = {
        f"{stage} {name}": {"zero": {"stage": stage}, "optim": {**plain["optim"], "clip_norm": clip}}
        for stage in (1, 2)
        for name, clip in (("clipped", 0.1), ("not clipped", 1e6))
    }
    (found,) = run_ranks("test_engine:both_ways", 1, tree=plain, forms=forms)
    for alone, usual in found.values():
        assert len(set(alone["grad_norms"])) == 5
        for key in ("losses", "grad_norms"):
            assert alone[key] == pytest.approx(usual[key], rel=2e-6)
        assert alone["weights"] == pytest.approx(usual["weights"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 300_000])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e30])
def test_a_norm_by_rows_is_the_norm(size: int, scale: float) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)) * scale
    expected = float(values.double().square().sum())
    assert float(zerogradients._square(values)) == pytest.approx(expected, rel=1e-6)
    if size:
        values[-1] = float("nan")
        assert not zerogradients._square(values).isfinite()


def both_ways(world: World, tree: dict[str, Any], forms: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Of each form: training with ``taken_at_once``, and without it."""
    import deepspeed

    release, found = zerogradients._BUFFERS, {}
    assert deepspeed.__version__.startswith(release), "pvtcap.zerogradients does not know this release"
    for name, form in forms.items():
        both = []
        for known in (release, "none of them"):
            zerogradients._BUFFERS = known
            both.append(train(world, parse(merged(tree, form), "test"), steps=5))
        found[name] = both
    zerogradients._BUFFERS = release
    return found


def test_offload_and_checkpointing_change_no_losses(run_ranks: RankFunction, plain: dict[str, Any]) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"zero": {"stage": 1, "offload": "optimizer"}},
        {"zero": {"stage": 2, "offload": "optimizer"}},
        {"zero": {"stage": 3, "offload": "optimizer+parameters"}},
        {"train": {"activation_checkpointing": True}},
        {"train": {"activation_checkpointing": True}, "zero": {"stage": 3}},
    ]
    usual, *others = run_ranks("test_engine:stages", 2, tree=plain, variants=variants)[0]
    for variant, result in zip(variants[1:], others, strict=True):
        assert result["losses"] == pytest.approx(usual["losses"], rel=1e-5), variant
        assert result["val_loss"] == pytest.approx(usual["val_loss"], rel=1e-5), variant


@pytest.mark.parametrize("micro_batch", [8, 4])
def test_a_lone_rank_learns_the_same_from_gradients_where_they_lie(
    run_ranks: RankFunction, plain: dict[str, Any], tmp_path: Path, micro_batch: int
) -> None:
    """To the last bit what it learns from those that DeepSpeed copies to a bucket and from there to the rank's part."""
    copied = tmp_path / "copied.json"
    copied.write_text('{"zero_optimization": {"contiguous_gradients": true}}')
    variants: list[dict[str, Any]] = [{}, {"zero": {"deepspeed_json": str(copied)}}]
    for variant in variants:
        variant["data"] = {"micro_batch": micro_batch}
    ((lying, moved),) = run_ranks("test_engine:stages", 1, tree=plain, variants=variants)
    assert lying == moved


@pytest.mark.long
def test_compilation_changes_no_losses(run_ranks: RankFunction, plain: dict[str, Any]) -> None:
    variants: list[dict[str, Any]] = [{}, {"train": {"compile": True}}]
    ((usual, compiled),) = run_ranks("test_engine:stages", 1, tree=plain, variants=variants)
    assert compiled["losses"] == pytest.approx(usual["losses"], rel=1e-5)
    assert compiled["val_loss"] == pytest.approx(usual["val_loss"], rel=1e-5)


def test_the_communication_op_is_compiled_with_our_own_ninja_whatever_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "ninja"
    other.write_text("#!/bin/sh\ntouch $(dirname $0)/called; exit 1\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    out = tmp_path / "out.json"
    done = torchrun(1, str(ROOT / "tests" / "ranks.py"), "test_engine:load_op", "{}", str(out))
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(out.read_text()) == [True]
    assert not (tmp_path / "called").exists()


def load_op(world: World) -> bool:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from pvtcap.deepspeedops import load_cpu_communication

    before = os.environ["PATH"]
    load_cpu_communication()
    from deepspeed.ops.op_builder.builder import OpBuilder

    return "deepspeed_shm_comm" in OpBuilder._loaded_ops and os.environ["PATH"] == before
