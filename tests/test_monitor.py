"""pytest tests/test_monitor.py"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pvtcap.config import Config
from pvtcap.dist import World
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


def test_other_ranks_are_silent(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Monitor(config, {}, replace(WORLD, rank=1, size=2), 0, 6) as monitor:
        monitor.say("hello")
        monitor.step(6, ONE)
        monitor.val(6, 1.0, 0.5)
        monitor.scores(Scored(6, tmp_path / "none", {"scores": {"Bleu_4": 0.5}}))
        monitor.scores(Scored(6, tmp_path, None, "a reason"))
    assert capsys.readouterr().out == ""
    assert not config.run.dir.exists()
