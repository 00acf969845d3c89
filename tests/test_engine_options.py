"""pytest tests/test_engine_options.py: what the engine makes of a configuration, before DeepSpeed has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_engine import merged

from pvtcap.captioner import Captioner
from pvtcap.config import Config, OptimConfig, batch_plan
from pvtcap.configfile import parse
from pvtcap.engine import deepspeed_dict, lr_scale, parameter_groups
from pvtcap.errors import ConfigError


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
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert settings["zero_optimization"]["stage"] == 2


def test_only_a_lone_rank_in_fp32_has_its_gradients_where_they_lie(config: Config) -> None:
    def settings(ranks: int, **changes: object) -> dict[str, Any]:
        found: dict[str, Any] = deepspeed_dict(config.model_copy(update=changes), batch_plan(config.data, ranks))
        return found["zero_optimization"]  # type: ignore[no-any-return]

    offloading = config.zero.model_copy(update={"offload": "optimizer"})
    assert settings(1)["contiguous_gradients"] is False
    for other in (settings(2), settings(1, precision="bf16"), settings(1, zero=offloading)):
        assert "contiguous_gradients" not in other


def test_a_deepspeed_file_of_ones_own_is_merged_and_must_not_contradict(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    changed = config.model_copy(update={"zero": config.zero.model_copy(update={"deepspeed_json": file})})
    plan = batch_plan(config.data, 1)
    ours = {"stage": "auto", "reduce_bucket_size": 1000, "reduce_scatter": True, "contiguous_gradients": True}
    mine = {"zero_optimization": ours, "wall_clock_breakdown": True}
    file.write_text(json.dumps(mine))
    settings = deepspeed_dict(changed, plan)
    assert settings["zero_optimization"] == ours | {"stage": 2}
    assert settings["wall_clock_breakdown"] is True
    for clash, key in (({"zero_optimization": {"stage": 3}}, "zero_optimization.stage"), ({"bf16": True}, "bf16")):
        file.write_text(json.dumps(clash))
        with pytest.raises(ConfigError, match=f"'{key}' follows from the configuration") as caught:
            deepspeed_dict(changed, plan)
        assert str(file) in str(caught.value)
    for text, says in (("{", "is not JSON"), ("[]", "not a JSON object")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=says):
            deepspeed_dict(changed, plan)
    file.unlink()
    with pytest.raises(ConfigError, match=r"cannot read zero\.deepspeed_json"):
        deepspeed_dict(changed, plan)
