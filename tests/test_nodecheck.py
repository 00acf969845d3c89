"""pytest tests/test_nodecheck.py: what one node says; how nodes are compared is in test_slurm.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pvtcap.nodecheck import check


@pytest.fixture
def file(tree: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_training_names_its_data_its_run_folder_and_how_far_it_is(
    file: Path, tree: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000004").mkdir(parents=True)
    (run / "checkpoints" / "step_00000004" / "manifest.json").touch()
    (run / "checkpoints" / "step_00000009.partial").mkdir()
    (run / "checkpoints" / "step_00000009.partial" / "manifest.json").touch()
    facts = check(["train", str(file), "optim.lr=1e-4", "--resume", "auto"])
    assert facts["problem"] is None
    assert (facts["run"], facts["last_step"]) == (str(run), 4)
    assert list(facts["places"]) == [tree["data"]["train"], tree["data"]["val"], str(run)]
    other = check(["train", str(file), f"data.train={tree['data']['val']}"])
    assert other["places"][tree["data"]["val"]] == facts["places"][tree["data"]["val"]]


def test_what_is_wrong_is_one_line(file: Path, tmp_path: Path) -> None:
    assert "no ShardSet here" in check(["train", str(file), f"data.val={tmp_path}"])["problem"]
    assert "unknown key" in check(["train", str(file), "optim.lrr=1"])["problem"]
    assert "no configuration" in check(["train"])["problem"]
    (tmp_path / "file").touch()
    assert "cannot write to the run folder" in check(["train", str(file), f"run.dir={tmp_path}/file/run"])["problem"]
    assert "no ShardSet here" in check(["evaluate", str(file.parent), "--data", str(tmp_path)])["problem"]
    assert "no such file or folder" in check(["evaluate", str(tmp_path / "nothing")])["problem"]


def test_it_loads_no_torch_and_is_not_in_the_help(file: Path) -> None:
    program = (
        "import sys; from pvtcap.nodecheck import check; check(['train', sys.argv[1]]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    said = subprocess.run(
        [sys.executable, "-m", "pvtcap", "nodecheck", "train", str(file)], capture_output=True, text=True, check=True
    )
    assert json.loads(said.stdout)["problem"] is None
    help_text = subprocess.run([sys.executable, "-m", "pvtcap", "--help"], capture_output=True, text=True, check=True)
    assert "nodecheck" not in help_text.stdout
