"""pytest tests/test_runreport.py"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from pvtcap import runreport
from pvtcap.config import Config
from pvtcap.errors import ConfigError


def made(folder: Path, config: Config, lr: float) -> Path:
    """A run folder as a run leaves it."""
    folder.mkdir()
    changed = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": lr})})
    (folder / "config.yaml").write_text(changed.to_yaml())
    (folder / "environment.json").write_text(json.dumps({"world_size": 2, "device": "cpu"}))
    lines = [
        {"step": n, "kind": "train", "train/loss": 5 - n * lr, "speed/captions_per_second": 9.0} for n in (1, 2, 3)
    ]
    lines += [{"step": 2, "kind": "val", "val/loss": 3.25}, {"step": 3, "kind": "val", "val/loss": 3.5}]
    lines += [{"step": 3, "kind": "evaluate", "val/CIDEr": 0.5}]
    lines += [{"step": 2, "kind": "event", "text": "going on from step 2 with <2> ranks"}]
    lines += [{"step": 3, "kind": "spike", "train/loss": 99.0, "expected": 3.0, "keys": ["photo7"]}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sheet = folder / "eval" / "step_00000003"
    sheet.mkdir(parents=True)
    Image.new("RGB", (30, 20), "red").save(sheet / "captions.png")
    return folder


def test_two_runs_on_one_page(config: Config, tmp_path: Path) -> None:
    runs = [runreport.read(made(tmp_path / name, config, lr)) for name, lr in (("first", 1e-3), ("second", 2e-3))]
    html = runreport.page(runs)
    assert "<td>val loss, best</td><td>3.2500 at step 2</td><td>3.2500 at step 2</td>" in html
    assert "<td>CIDEr, best</td><td>0.5000 at step 3</td>" in html
    assert "METEOR, best" not in html  # no run has it
    assert "<td>optim.lr</td><td>0.001</td><td>0.002</td>" in html
    assert "<td>optim.warmup_steps</td>" not in html  # the same in both
    assert "going on from step 2 with &lt;2&gt; ranks" in html
    assert "loss 99.000 where 3.000 was expected; photos: photo7" in html
    assert html.count("<svg") == 3  # loss, CIDEr, captions a second; nothing that nobody has
    assert html.count("data:image/png;base64,") == 2
    assert not re.search(r"""(src|href)=["']http""", html)  # nothing is fetched
    assert max(runs[0].curve("train/loss")[1]) < 5  # a spike is told, and is not a point of the curve


def test_one_run_differs_from_nothing(config: Config, tmp_path: Path) -> None:
    html = runreport.page([runreport.read(made(tmp_path / "only", config, 1e-3))])
    assert "What differs" not in html


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run is logged here"):
        runreport.read(tmp_path)
