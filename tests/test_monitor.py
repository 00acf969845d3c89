"""pytest tests/test_monitor.py"""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import RankFunction
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from pvtcap.config import Config
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.eventfiles import CHARTS
from pvtcap.flops import StepFlops
from pvtcap.monitor import Monitor, StepStats
from pvtcap.scoring import SHEET, Scored

ONE = StepStats(loss=2.0, grad_norm=1.0, lr=1e-3, photos=8, captions=16, tokens=100, seconds=0.5, data_wait_seconds=0.1)
WORLD = World.alone("cpu")


def lines(config: Config) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.run.dir / "log.jsonl").read_text().splitlines()]


def test_a_line_is_the_mean_over_its_steps_weighted_as_the_loss_is(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    every_two = config.model_copy(update={"train": config.train.model_copy(update={"log_every_steps": 2})})
    with Monitor(every_two, {}, WORLD, 0, 5) as monitor:
        for step in range(1, 6):
            monitor.step(step, replace(ONE, loss=float(step), tokens=100 * step, grad_norm=float(step)))
    first, second, last = lines(config)
    assert [line["step"] for line in (first, second, last)] == [2, 4, 5]
    assert first["train/loss"] == pytest.approx((1 * 100 + 2 * 200) / 300)
    assert first["train/grad_norm"] == pytest.approx(1.5)
    assert first["speed/images_per_second"] == pytest.approx(16)
    assert first["speed/captions_per_second"] == pytest.approx(32)
    assert first["data/wait_share"] == pytest.approx(0.2)
    assert last["train/perplexity"] == pytest.approx(148.41, rel=1e-4)
    assert "step 2/5  loss 1.667  lr 1.0e-03  grad 1.50  16 images/s  32 captions/s" in capsys.readouterr().out


def test_going_on_drops_what_was_logged_beyond_the_checkpoint(config: Config) -> None:
    with Monitor(config, {}, WORLD, 0, 6) as monitor:
        for step in range(1, 5):
            monitor.step(step, ONE)
    with Monitor(config, {}, WORLD, 2, 6) as monitor:
        monitor.step(3, replace(ONE, loss=7.0))
    assert [(line["step"], line["train/loss"]) for line in lines(config)] == [(1, 2.0), (2, 2.0), (3, 7.0)]
    events = EventAccumulator(str(config.run.dir / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0), (2, 2.0), (3, 7.0)]


def test_scores_and_the_sheet_reach_tensorboard(config: Config, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / SHEET)
    with Monitor(config, {}, WORLD, 0, 6) as monitor:
        monitor.scores(Scored(3, tmp_path, {"scores": {"Bleu_4": 0.25, "METEOR": None}}))
    (line,) = lines(config)
    assert line == {"step": 3, "kind": "evaluate", "val/Bleu_4": 0.25}
    events = EventAccumulator(str(config.run.dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("val/captions")] == [3]


def test_what_a_run_is_arranged_by_in_tensorboard(config: Config) -> None:
    """The custom layout's charts, the configuration as text and as hyperparameters, what happened as text."""
    flops = StepFlops(photo=1e9, token=1e6, label=1e6, prefix=3)
    fast = config.model_copy(update={"train": config.train.model_copy(update={"device_peak_tflops": 0.1})})
    with Monitor(fast, {}, WORLD, 0, 6, flops) as monitor:
        monitor.step(1, ONE)
        monitor.captioned(1, 2.5)
        monitor.event(1, "something")
    first, captions, _ = lines(config)
    # 8 photos, 100 - 16 + 24 tokens, 100 labels: 8.208 GFLOP in half a second, of a tenth of a TFLOP/s
    assert first["speed/mfu"] == pytest.approx(0.16416)
    assert first["speed/tokens_per_second"] == pytest.approx(200)
    assert first["train/lr_encoder"] == pytest.approx(1e-3)
    assert 0.05 < first["memory/host_gib"] < 20
    assert captions == {"step": 1, "kind": "captions", "val/caption_seconds": 2.5}
    events = EventAccumulator(str(config.run.dir / "tensorboard"))
    events.Reload()
    written = set(events.Tags()["scalars"])
    charts = [tag for titles in CHARTS.values() for tags in titles.values() for tag in tags]
    assert {name for name in written if not any(re.fullmatch(tag, name) for tag in charts)} == {
        "speed/images_per_second_per_device", "speed/captions_per_second_per_device", "speed/tokens_per_second",
        "speed/step_seconds", "speed/model_tflops_per_device", "data/wait_worst_rank",
    }  # fmt: skip
    assert {"custom_scalars__config__", "config/text_summary", "events/text_summary"} <= set(events.Tags()["tensors"])
    told = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    session = HParamsPluginData.FromString(told).session_start_info
    assert session.hparams["optim.lr"].number_value == pytest.approx(2e-3)
    assert session.hparams["model.encoder"].string_value == "pvt_v2_b0"


def test_all_ranks_are_in_the_numbers_and_the_slowest_is_named(
    run_ranks: RankFunction, tree: dict[str, Any], config: Config
) -> None:
    first, _ = run_ranks("test_monitor:two_ranks", 2, tree=tree)
    (line,) = lines(config)
    assert line["data/wait_share"] == pytest.approx((0.1 + 0.4) / 2 / 0.5)
    assert (line["data/wait_share_worst"], line["data/wait_worst_rank"]) == (pytest.approx(0.8), 1)
    assert line["speed/images_per_second_per_device"] == pytest.approx(8)
    assert line["train/loss_of/coco"] == pytest.approx((10.0 + 30.0) / (5 + 5))
    assert line["train/loss_of/mine"] == pytest.approx(6.0 / 3)
    assert first


def two_ranks(world: World, tree: dict[str, Any]) -> bool:
    mine = [
        replace(ONE, losses={0: (10.0, 5)}),
        replace(ONE, data_wait_seconds=0.4, losses={0: (30.0, 5), 1: (6.0, 3)}),
    ][world.rank]
    with Monitor(parse(tree, "test"), {}, world, 0, 6, sources=["coco", "mine"]) as monitor:
        monitor.step(6, mine)
    return True


def test_a_bar_where_a_person_watches_and_lines_alone_in_a_file(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", screen)
    with Monitor(config, {}, WORLD, 0, 6) as monitor:
        for step in range(1, 4):
            monitor.step(step, ONE)
    assert "3/6" in screen.getvalue()
    assert "step 3/6  loss 2.000" in screen.getvalue()


def test_other_ranks_are_silent(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Monitor(config, {}, replace(WORLD, rank=1, size=2), 0, 6) as monitor:
        monitor.say("hello")
        monitor.val(6, 1.0, 0.5)
        monitor.scores(Scored(6, tmp_path / "none", {"scores": {"Bleu_4": 0.5}}))
        monitor.scores(Scored(6, tmp_path, None, "a reason"))
    assert capsys.readouterr().out == ""
    assert not config.run.dir.exists()
