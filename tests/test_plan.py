"""pytest tests/test_plan.py"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pvtcap.captioner import Captioner
from pvtcap.config import Config
from pvtcap.configfile import load, parse
from pvtcap.errors import ConfigError
from pvtcap.plan import count_parameters, plan


def test_it_counts_what_the_model_has(config: Config) -> None:
    model = Captioner(config, config.text.vocab_size)
    learning = sum(parameter.numel() for parameter in model.trainable().values())
    assert count_parameters(config) == (learning, sum(p.numel() for p in model.parameters()) - learning)


def test_the_full_size_model_is_the_published_one() -> None:
    trainable, frozen = count_parameters(load("flickr30k"))
    # 137.9M of decoder and 3.5M of projection; 13.5M of encoder and the two token types that BLIP does not have.
    assert (trainable, frozen) == (141_420_860, 13_496_000 + 2 * 768)


def test_steps_batches_shards_and_the_line_to_submit(tree: dict[str, Any]) -> None:
    tree["train"] = {"what": "projection+decoder+encoder", "epochs": 2}
    found = plan(parse(tree, "test"), "tiny.yaml", nodes=2, gpus_per_node=2)
    assert (found.batches.micro_batch, found.batches.world_size, found.batches.accumulation) == (2, 4, 1)
    assert (found.total_steps, found.num_shards, found.why_no_steps) == (12, 3, None)
    assert found.submit == "sbatch --nodes 2 --gpus-per-node 2 slurm/train.sbatch tiny.yaml"
    tree["data"]["train"] = "nowhere"
    assert "no such shard folder" in str(plan(parse(tree, "test"), "tiny.yaml", 1, 1).why_no_steps)
    with pytest.raises(ConfigError, match="not a multiple"):
        plan(parse(tree, "test"), "tiny.yaml", 3, 1)


def test_each_stage_shares_out_what_it_is_for(config: Config) -> None:
    one, four = (plan(config, "", 1, ranks).memory for ranks in (1, 4))
    learning, _ = count_parameters(config)
    assert four[0].optimizer == one[0].optimizer == 8 * learning
    for stage in (1, 2, 3):
        assert four[stage].optimizer == one[stage].optimizer / 4 == 2 * learning
        assert four[stage].master == learning
    assert four[2].gradients == four[1].gradients - 4 * learning
    assert four[3].gradients == four[2].gradients


def test_a_checkpoints_time_is_the_runs_own_where_there_is_one(config: Config) -> None:
    assert not plan(config, "", 1, 1).measured
    config.run.dir.mkdir()
    lines = [{"step": step, "kind": "checkpoint", "checkpoint/seconds": step / 2} for step in (1, 2, 3)]
    (config.run.dir / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = plan(config, "", 1, 1)
    assert (found.measured, found.checkpoint_seconds) == (True, 1.0)


def test_the_command_prints_it_for_people_and_for_scripts(tree: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    said = [
        subprocess.run(
            [sys.executable, "-m", "pvtcap", "plan", str(file), *more], capture_output=True, text=True, check=True
        ).stdout
        for more in ([], ["--json"])
    ]
    assert "global batch 8 = 8 × 1 ranks × 1 accumulated" in said[0]
    assert "6 steps" in said[0]
    assert json.loads(said[1])["memory"]["2"]["total"] > 0
