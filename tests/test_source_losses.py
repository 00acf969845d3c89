"""pytest tests/test_source_losses.py: which source's photos cost how much; and a trace of some steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RankFunction, build_shapes

from pvtcap import train as training
from pvtcap.batch import Batch
from pvtcap.captioner import Captioner
from pvtcap.config import Config
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.sources import Sources
from pvtcap.text import IGNORE


@pytest.fixture
def mixed(tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Two ShardSets of the same name, with weights."""
    other = build_shapes(tmp_path / "other", "train", 16, 8)
    tree["data"]["train"] = [{"path": tree["data"]["train"], "weight": 1}, {"path": str(other), "weight": 1}]
    return tree


def test_a_rows_loss_is_what_it_costs_alone(config: Config) -> None:
    model = Captioner(config, 100).eval()
    photos = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.randint(1, 100, (3, 7))
    labels = torch.where(torch.rand(3, 7) < 0.5, tokens, IGNORE)
    labels[1] = IGNORE  # a bad photo's row has none

    def batch(rows: slice) -> Batch:
        some = tokens[rows]
        places = torch.arange(7).expand_as(some)
        return Batch(photos[rows], some, labels[rows], places, places, torch.ones_like(some), (), len(some))

    with torch.no_grad():
        total = model(batch(slice(0, 3)))
        together = model.decoder.row_losses_B
        alone = torch.stack([model(batch(slice(row, row + 1))) for row in range(3)])
    torch.testing.assert_close(together, alone)
    assert together[1] == 0
    torch.testing.assert_close(together.sum(), total)


def train(world: World, tree: dict[str, Any]) -> list[str]:
    config = parse(tree, "test")
    training.run(config, world)
    return Sources.open(config.data).names


def test_a_run_tells_each_sources_loss(run_ranks: RankFunction, mixed: dict[str, Any]) -> None:
    mixed["train"]["profile_steps"] = 2
    names, _ = run_ranks("test_source_losses:train", 2, tree=mixed)
    assert len(set(names)) == 2
    run = Path(mixed["run"]["dir"])
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in (line for line in lines if line["kind"] == "train"):
        of = [line[f"train/loss_of/{name}"] for name in names]
        assert min(of) <= line["train/loss"] <= max(of)
        assert of[0] != of[1]
    (trace,) = (run / "profile").iterdir()
    assert trace.name == "step_00000004-00000005.json.gz"
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
