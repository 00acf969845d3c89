"""pytest tests/test_plan.py"""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from shardserver import ShardServer

from pvtcap.batch import Batch
from pvtcap.captioner import Captioner
from pvtcap.config import Config
from pvtcap.configfile import load, parse
from pvtcap.dryrun import meta_captioner, step_bytes
from pvtcap.errors import ConfigError
from pvtcap.plan import plan, print_plan
from pvtcap.rankmemory import RankMemory, Sizes, rank_memory
from pvtcap.scaling import NETWORKS


def sizes(config: Config) -> Sizes:
    return Sizes.of(meta_captioner(config, 30_524 if config.text.vocab != "train" else config.text.vocab_size))


def test_it_counts_what_the_model_has(config: Config) -> None:
    model = Captioner(config, config.text.vocab_size)
    learning = sum(parameter.numel() for parameter in model.trainable().values())
    assert sizes(config) == Sizes(learning, sum(p.numel() for p in model.parameters()) - learning)


def test_the_full_size_model_is_the_published_one() -> None:
    # 137.9M of decoder and 3.5M of projection; 13.5M of encoder and the two token types that BLIP does not have.
    found = sizes(load("flickr30k"))
    assert (found.trained, found.frozen) == (141_420_860, 13_496_000 + 2 * 768)


def test_what_the_forward_pass_keeps_is_counted_as_a_real_one_keeps_it(config: Config) -> None:
    """Against the bytes that autograd saves of a real step, each storage once; parameters are not among them."""
    model = Captioner(config, config.text.vocab_size).train()
    torch.manual_seed(0)
    tokens = torch.randint(1, 100, (4, 20))
    segments = torch.ones(4, 20, dtype=torch.int64)
    photos = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(photos=photos, tokens=tokens, labels=tokens, predictors=torch.arange(20).expand(4, -1),
                  positions=segments, segments=segments, samples=(),
                  num_captions=4)  # fmt: skip
    theirs = {parameter.untyped_storage().data_ptr() for parameter in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in theirs:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch)
    assert float(loss.detach()) > 0
    counted = step_bytes(meta_captioner(config, config.text.vocab_size), 4, 32, tokens=20, labels=80)
    assert counted.saved == pytest.approx(sum(saved.values()), rel=0.1)


@pytest.mark.parametrize(("photos", "features", "gib"), [(64, False, 4.94), (512, False, 25.06), (1024, True, 47.5)])
def test_a_gpus_memory_is_what_one_h200_took(photos: int, features: bool, gib: float) -> None:
    """benchmarks/gpu.py: ZeRO-2, rows of 82 tokens with 67 labels."""
    config = load("flickr30k")
    model = meta_captioner(config, 30_524)
    shape = (512, 12, 12) if features else None
    counted = step_bytes(model, photos, 384, tokens=82, labels=67 * photos, features=shape)
    planned = rank_memory(Sizes.of(model), counted, 2, "bf16", ranks=1, bucket_elements=50_000_000)
    assert planned.gpu / 2**30 == pytest.approx(gib, rel=0.15)


def test_steps_batches_shards_and_the_line_to_submit(tree: dict[str, Any]) -> None:
    tree["train"] = {"what": "projection+decoder+encoder", "epochs": 2}
    found = plan(parse(tree, "test"), "tiny.yaml", nodes=2, gpus_per_node=2)
    assert (found.batches.micro_batch, found.batches.world_size, found.batches.accumulation) == (2, 4, 1)
    assert (found.total_steps, found.num_shards, found.why_no_steps) == (12, 3, None)
    assert found.submit == "sbatch --nodes 2 --gpus-per-node 2 slurm/train.sbatch tiny.yaml"
    tree["data"]["train"] = "nowhere"
    absent = plan(parse(tree, "test"), "tiny.yaml", 1, 1)
    assert "no such shard folder" in str(absent.why_no_steps)
    assert (absent.speed.storage, absent.speed.rows[0].first_bytes_s) == (None, None)
    with pytest.raises(ConfigError, match="not a multiple"):
        plan(parse(tree, "test"), "tiny.yaml", 3, 1)


def test_each_stage_shares_out_what_it_is_for(config: Config) -> None:
    one, four = (plan(config, "", 1, ranks).memory for ranks in (1, 4))
    learning, everything = sizes(config).trained, sizes(config).trained + sizes(config).frozen
    assert four[0].optimizer == one[0].optimizer == 8 * learning
    for stage in (1, 2, 3):  # in float32 the parameters are their own master, but for ZeRO-3
        assert one[stage].optimizer == (8 if stage < 3 else 12) * learning
        assert four[stage].optimizer == pytest.approx(one[stage].optimizer / 4, abs=12)
    assert [memory.parameters for memory in four] == [4 * everything] * 3 + [everything]
    assert all(memory.peak > memory.parameters + memory.optimizer + memory.activations for memory in four)
    halved = plan(config.model_copy(update={"precision": "bf16"}), "", 1, 4).memory
    assert halved[2].parameters == four[2].parameters / 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_offloaded_is_the_hosts_and_not_the_gpus(config: Config, precision: str) -> None:
    def planned(offload: str) -> tuple[RankMemory, ...]:
        zero = config.zero.model_copy(update={"stage": 3, "offload": offload})
        return plan(config.model_copy(update={"precision": precision, "zero": zero}), "", 1, 2).memory

    none, optimizer, both = map(planned, ("none", "optimizer", "optimizer+parameters"))
    element, part = 4 if precision == "fp32" else 2, -(-sizes(config).trained // 2)
    assert [one.host for one in none] == [0, 0, 0, 0]
    assert optimizer[0] == none[0]  # there is nothing to offload without ZeRO
    for stage in (1, 2, 3):
        assert optimizer[stage].optimizer == 12 * part
        assert optimizer[stage].host == (20 if stage == 3 else 16 + element) * part
        assert none[stage].gpu - optimizer[stage].gpu >= none[stage].optimizer + 4 * part
        assert optimizer[stage].peak > none[stage].peak  # where there is no GPU, it only costs
    assert both[:3] == optimizer[:3]
    moved = optimizer[3].parameters
    assert (both[3].host - optimizer[3].host, optimizer[3].gpu - both[3].gpu) == (moved, moved)


def test_less_is_kept_where_activations_are_computed_again(tree: dict[str, Any]) -> None:
    tree["model"] |= {"decoder_layers": 6}
    kept = plan(parse(tree, "test"), "", 1, 1).memory[2].activations
    tree["train"]["activation_checkpointing"] = True
    assert plan(parse(tree, "test"), "", 1, 1).memory[2].activations < 0.7 * kept


def test_rows_are_as_long_as_the_captions_are(tree: dict[str, Any]) -> None:
    """Of shapes' captions, five to eight words; 12 words, as COCO's are, where there is nothing to look at."""
    there = plan(parse(tree, "test"), "", 1, 1).row_tokens
    tree["data"]["train"] = "nowhere"
    assert 2 * 5 < there < plan(parse(tree, "test"), "", 1, 1).row_tokens


def test_a_checkpoints_time_is_the_runs_own_where_there_is_one(config: Config) -> None:
    assert not plan(config, "", 1, 1).measured
    config.run.dir.mkdir()
    lines = [{"step": step, "kind": "checkpoint", "checkpoint/seconds": step / 2} for step in (1, 2, 3)]
    (config.run.dir / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = plan(config, "", 1, 1)
    assert (found.measured, found.checkpoint_seconds) == (True, 1.0)


def test_speed_is_assumed_until_the_run_has_measured_it(config: Config) -> None:
    assumed = plan(config, "", 2, 2).speed
    assert assumed.compute.source.startswith("assumed, as on one H200: 16% of 67 TFLOP/s")
    assert [row.network for row in assumed.rows] == [network.name for network in NETWORKS]
    assert all(one.step_s < other.step_s for one, other in itertools.pairwise(assumed.rows))
    config.run.dir.mkdir()
    numbers = {"speed/images_per_second": 8.0, "speed/images_per_second_per_device": 4.0}
    lines = [{"step": step, "kind": "train"} | numbers for step in (1, 2, 3)]
    (config.run.dir / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = plan(config, "", 1, 1).speed
    assert found.compute.source.startswith("measured by this run on 2 ranks")
    assert (found.sent_bytes, found.rows[0].waited_share) == (0, 0)
    assert found.rows[0].step_s == pytest.approx(8 / 4)
    assert found.rows[0].captions_s == pytest.approx(4 * 2)


def test_speed_heeds_the_stage_the_features_and_deepspeeds_own_option(tree: dict[str, Any], tmp_path: Path) -> None:
    learning = sizes(parse(tree, "test")).trained
    assert plan(parse(tree, "test"), "", 2, 1).speed.sent_bytes == 3 * 4 * learning / 2
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"overlap_comm": true}}')
    tree["zero"] = {"stage": 0, "deepspeed_json": str(tmp_path / "mine.json")}
    found = plan(parse(tree, "test"), "", 2, 1).speed
    assert (found.sent_bytes, found.overlap) == (2 * 4 * learning / 2, 0.5)
    tree["zero"] = {"stage": 3}
    assert plan(parse(tree, "test"), "", 2, 1).speed.overlap == 0.5


def test_nodes_that_share_lanes_fetch_the_same_shards(shapes: Path, tree: dict[str, Any], tmp_path: Path) -> None:
    with ShardServer(shapes / "train") as server:
        tree["data"] |= {"train": server.url, "cache_dir": str(tmp_path / "cache"), "lanes": 1}
        config = parse(tree, "test")
        found = plan(config, "", 2, 1)
        console = Console(file=io.StringIO(), width=200)
        print_plan(found, config, console)
    assert found.speed.storage is not None
    assert (found.speed.storage.nodes_a_shard, found.speed.storage.again) == (2.0, 0.0)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a shard is read by 2.00 nodes; by one with data.lanes=2" in said


def test_the_command_prints_it_for_people_and_for_scripts(tree: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    said = [
        subprocess.run(
            [sys.executable, "-m", "pvtcap", "plan", str(file), *more], capture_output=True, text=True, check=True
        ).stdout
        for more in ([], ["--json"], ["zero.stage=2", "zero.offload=optimizer"])
    ]
    assert "global batch 8 = 8 × 1 rank × 1 accumulated" in said[0]
    assert "6 steps" in said[0]
    assert "assumed, as on one H200: " in said[0]
    assert "each node reads 8 of 8 lanes" in said[0]
    found = json.loads(said[1])
    assert found["memory"]["2"]["peak"] > 0
    told = "offloaded to its host", "not in it: what offloading takes"
    assert [[line in text for line in told] for text in (said[0], said[2])] == [[False, False], [True, True]]
    assert found["speed"]["rows"][0]["captions_s"] > 0
