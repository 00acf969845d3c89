"""pytest tests/test_configfile.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pvtcap.config import Config, DataConfig, batch_plan
from pvtcap.configfile import load, parse
from pvtcap.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("typed", ["3e-4", "3.0e-4", "0.0003", "'3e-4'"])
def test_a_learning_rate_as_people_type_it(tmp_path: Path, typed: str) -> None:
    # YAML 1.1 reads 3e-4, without a dot, as a string.
    assert load(write(tmp_path, f"optim: {{lr: {typed}}}")).optim.lr == 3e-4
    assert load(write(tmp_path, "{}"), [f"optim.lr={typed}"]).optim.lr == 3e-4


@pytest.mark.parametrize("name", ["2026-12-01", "2026-13-41", "20261201", "1e3", "yes", "[draft", "0x10"])
def test_a_name_stays_what_was_typed(tmp_path: Path, name: str) -> None:
    """YAML would read a date, a number, a truth."""
    assert load(write(tmp_path, "{}"), [f"run.dir={name}"]).run.dir == Path(name)


def test_empty_and_null_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "run: {dir: 2026-12-01}\n")
    config = load(path, ["text.prompt=", "data.val=null", "data.cache_dir=7"])
    assert (config.text.prompt, config.data.val, config.data.cache_dir) == ("", None, Path("7"))
    assert config.run.dir == Path("2026-12-01")
    with pytest.raises(ConfigError, match=r"bad value for 'run\.dir'.*; got \['a'\]; wanted a path"):
        load(path, ["run.dir=[a]"])
    with pytest.raises(ConfigError, match=r"bad value for 'text\.prompt'.*; got None"):
        load(path, ["text.prompt=null"])


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {global_batch: 32, image_px: 64}\n")
    config = load(path, ["data.global_batch=16", "run.dir=x/y", "train.epochs=2", "evaluate.every_steps=null"])
    assert (config.data.global_batch, config.data.image_px, config.data.workers) == (16, 64, DataConfig().workers)
    assert (config.run.dir, config.train.epochs, config.evaluate.every_steps) == (Path("x/y"), 2, None)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"optim": {"learning_rte": 1}}, "unknown key 'optim.learning_rte'"),
        ({"optim": {"warmup_step": 1}}, "Did you mean 'warmup_steps'?"),
        ({"optimizer": {}}, "Did you mean 'optim'?"),
        ({"lr": 1}, "Did you mean 'optim.lr'?"),
        ({"train": {"global_batch": 8}}, "Did you mean 'data.global_batch'?"),
        ({"zero": {"stage": 4}}, "bad value for 'zero.stage'"),
        ({"data": {"image_px": 100}}, "multiple of 32"),
        ({"optim": {"lr": "fast"}}, "got 'fast'"),
        ({"optim": {"lr": -1}}, "greater than 0"),
        ({"train": {"steps": 1, "epochs": 1}}, "keep the one that ends the run"),
        ({"model": {"decoder_width": 100}}, "not a multiple of 12 heads"),
        ({"model": {"encoder_weights": "scratch"}}, "add '+encoder'"),
    ],
)
def test_one_line_says_what_is_wrong(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(tree, "run.yaml")
    assert says in str(caught.value)
    assert "run.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("data: [1", [], "not valid YAML"),
        ("- a\n- b\n", [], "a configuration is a mapping"),
        ("{}", ["optim.lr"], "not an override"),
        ("{}", ["precision.x=1"], "bad value"),
        ("precision: fp32", ["precision.x=1"], "is a value, not a section"),
    ],
)
def test_files_and_words_that_are_not_configurations(
    tmp_path: Path, text: str, overrides: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        load(write(tmp_path, text), overrides)


def test_what_is_written_to_the_run_folder_is_the_same_configuration(config: Config, tmp_path: Path) -> None:
    assert load(write(tmp_path, config.to_yaml())) == config
    assert yaml.safe_load(config.to_yaml())["optim"]["betas"] == [0.9, 0.999]


@given(st.integers(1, 64), st.integers(1, 8), st.one_of(st.none(), st.integers(1, 16)))
def test_a_batch_plan_multiplies_out_or_names_one_that_does(
    global_batch: int, world_size: int, micro_batch: int | None
) -> None:
    data = DataConfig(global_batch=global_batch, micro_batch=micro_batch)
    try:
        plan = batch_plan(data, world_size)
    except ConfigError as error:
        suggested = int(str(error).split("data.global_batch=")[1].split(",")[0])
        assert batch_plan(data.model_copy(update={"global_batch": suggested}), world_size)
    else:
        assert plan.global_batch == plan.micro_batch * plan.world_size * plan.accumulation == global_batch
