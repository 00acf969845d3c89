"""pytest tests/test_engine.py"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import RankFunction

from pvtcap.captioner import Captioner
from pvtcap.config import Config, OptimConfig, batch_plan
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.engine import Engine, deepspeed_dict, lr_scale, parameter_groups
from pvtcap.ledger import Ledger
from pvtcap.sources import Sources
from pvtcap.stream import View, train_batches
from pvtcap.text import CaptionTokenizer
from pvtcap.train import train_step, val_loss

STEPS = 4


def train(world: World, config: Config) -> dict[str, Any]:
    """A few steps: the losses, gradient norms, a validation loss, and a checksum of every parameter."""
    sources = Sources.open(config.data)
    tokenizer = CaptionTokenizer.train((text for group in sources.captions() for text in group), 100)
    plan = batch_plan(config.data, world.size)
    engine = Engine(Captioner(config, tokenizer.size), config, plan, world)
    view = View(config.data, tokenizer, config.text.max_tokens)
    batches = train_batches(sources, view, plan, world, seed=0, first_step=0)
    ledger = Ledger(config.run.dir, sources, world, start_step=0, max_bad_fraction=0.0)
    stats = [train_step(engine, batches, ledger, plan, world, step=step, scale=1.0)[0] for step in range(1, STEPS + 1)]
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
    """Without dropout: it differs between one worker and two."""
    return merged(tree, {"model": {"dropout": 0.0}})


def test_zero_0_to_3_on_two_workers_give_one_workers_losses(run_ranks: RankFunction, plain: dict[str, Any]) -> None:
    variants = [{"zero": {"stage": stage}} for stage in range(4)]
    accumulating = [{"zero": {"stage": stage}, "data": {"micro_batch": 2}} for stage in range(4)]
    ((alone,),) = run_ranks("test_engine:stages", 1, tree=plain, variants=[{"zero": {"stage": 0}}])
    assert alone["losses"][-1] < alone["losses"][0]
    for result in run_ranks("test_engine:stages", 2, tree=plain, variants=variants + accumulating)[0]:
        assert result["losses"] == pytest.approx(alone["losses"], rel=2e-5)
        assert result["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-3)
        assert result["val_loss"] == pytest.approx(alone["val_loss"], rel=2e-5)
        assert result["weights"].keys() == alone["weights"].keys()
        for name, total in result["weights"].items():
            # AdamW's step is lr in size however small the gradient: where that is rounding alone, signs differ.
            assert total == pytest.approx(alone["weights"][name], rel=1e-3, abs=5e-2), name


def test_bfloat16_follows_float32_at_each_stage(run_ranks: RankFunction, plain: dict[str, Any]) -> None:
    variants = [{"precision": "fp32"}, *({"precision": "bf16", "zero": {"stage": stage}} for stage in range(4))]
    fp32, *bf16 = run_ranks("test_engine:stages", 2, tree=plain, variants=variants)[0]
    for result in bf16:
        assert result["losses"] == pytest.approx(fp32["losses"], rel=2e-2)
        assert result["losses"] != fp32["losses"]
        assert result["losses"][-1] < result["losses"][0]


def test_warmup_is_linear_and_the_cosine_ends_where_it_should() -> None:
    optim = OptimConfig(warmup_steps=10, min_lr_ratio=0.1)
    scales = [lr_scale(step, 110, optim) for step in range(1, 111)]
    assert scales[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert scales[59] == pytest.approx(0.55)  # half way down
    assert scales[-1] == pytest.approx(0.1)
    assert scales[9:] == sorted(scales[9:], reverse=True)
    assert lr_scale(1, 5, OptimConfig(warmup_steps=0)) < 1


def test_biases_and_norms_do_not_decay_and_the_encoder_has_its_own_rate(tree: dict[str, Any]) -> None:
    config = parse(merged(tree, {"optim": {"encoder_lr": 1e-5, "weight_decay": 0.05}}), "test")
    model = Captioner(config, 60)
    groups = parameter_groups(model, config.optim)
    names = {id(parameter): name for name, parameter in model.trainable().items()}
    by_name = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    assert by_name.keys() == model.trainable().keys()
    for name, group in by_name.items():
        undecayed = name.endswith(".bias") or "norm" in name.lower()
        assert group["weight_decay"] == (0.0 if undecayed else 0.05), name
        assert group["peak_lr"] == (1e-5 if name.startswith("encoder.") else config.optim.lr), name


def test_the_deepspeed_dictionary_is_plain_and_says_what_the_configuration_says(config: Config) -> None:
    changed = config.model_copy(update={"precision": "bf16"})
    plan = batch_plan(config.data.model_copy(update={"micro_batch": 1}), 2)
    settings = deepspeed_dict(changed, plan)
    assert (settings["train_batch_size"], settings["train_micro_batch_size_per_gpu"]) == (8, 1)
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["bf16"] == {"enabled": True}
    assert settings["zero_optimization"]["stage"] == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine")
def test_on_a_gpu_bfloat16_and_float32_learn(plain: dict[str, Any]) -> None:
    with World.start() as world:
        for precision, stage in itertools.product(("fp32", "bf16"), (0, 2, 3)):
            result = train(world, parse(merged(plain, {"precision": precision, "zero": {"stage": stage}}), "test"))
            assert result["losses"][-1] < result["losses"][0]
