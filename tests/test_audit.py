"""pytest tests/test_audit.py: the ledger that a run keeps, and what ``pvtcap audit`` says of it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import RankFunction
from test_stream import damaged
from typer.testing import CliRunner

from pvtcap.audit import Report, audit
from pvtcap.cli import app
from pvtcap.config import batch_plan
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.errors import PvtcapError, TrainError
from pvtcap.ledger import CONSUMED, Ledger, read, sample_hash, sum_hashes
from pvtcap.sources import Sources
from pvtcap.stream import View, train_batches
from pvtcap.text import CaptionTokenizer


def walk(world: World, tree: dict[str, Any], first: int, last: int, write_every: int = 5) -> None:
    """What training does with the stream and the ledger from step ``first`` + 1 to ``last``, and nothing else."""
    config = parse(tree, "test")
    sources = Sources.open(config.data)
    tokenizer = CaptionTokenizer.train((text for group in sources.captions() for text in group), 100)
    plan = batch_plan(config.data, world.size)
    ledger = Ledger(config.run.dir, sources, world, start_step=first, max_bad_fraction=config.data.max_bad_fraction)
    view = View(config.data, tokenizer, config.text.max_tokens)
    batches = train_batches(sources, view, plan, world, seed=config.run.seed, first_step=first)
    for step in range(first + 1, last + 1):
        (num_bad,) = world.sum([ledger.take(list(itertools.islice(batches, plan.accumulation)))])
        if num_bad:
            ledger.judge(step)
        if step % write_every == 0 or step == last:
            ledger.write(step)
    if world.is_first:
        (config.run.dir / "config.yaml").write_text(config.to_yaml())


def alone(tree: dict[str, Any], first: int, last: int, **more: Any) -> Report:
    walk(World.alone("cpu"), tree, first, last, **more)
    return audit(Path(tree["run"]["dir"]))


def test_a_whole_epoch_and_the_one_begun(tree: dict[str, Any]) -> None:
    report = alone(tree, 0, 8)  # of 8 photos, from 48
    assert report.is_clean
    assert [(e.epoch, e.num_samples, e.seen, e.missing, e.is_open) for e in report.epochs] == [
        (0, 48, 48, 0, False),
        (1, 48, 16, 32, True),
    ]
    assert (report.first_step, report.last_step, report.starts) == (0, 8, [(0, 1)])


def test_killed_and_resumed_on_another_number_of_ranks_it_is_still_each_once(
    run_ranks: RankFunction, tree: dict[str, Any]
) -> None:
    tree["data"]["global_batch"] = 12
    run = Path(tree["run"]["dir"])
    run_ranks("test_audit:walk", 2, tree=tree, first=0, last=7)
    # Its last checkpoint was that of step 5; step 8's line was being written when it was killed.
    with (run / "ledger" / CONSUMED).open("a") as file:
        file.write('{"after": 7, "st')
    run_ranks("test_audit:walk", 3, tree=tree, first=5, last=9)
    report = alone(tree, 9, 13)
    assert report.is_clean
    assert report.starts == [(0, 2), (5, 3), (9, 1)]
    assert [(e.seen, e.duplicates, e.is_open) for e in report.epochs] == [(48, 0, False)] * 3 + [(12, 0, True)]


def test_sources_with_weights_have_epochs_of_their_own(tree: dict[str, Any], shapes: Path) -> None:
    tree["data"]["train"] = [
        {"path": str(shapes / "train"), "weight": 0.75},
        {"path": str(shapes / "val"), "weight": 0.25},
    ]
    report = alone(tree, 0, 8)
    assert report.is_clean
    of_source = [(e.source, e.epoch, e.num_samples, e.seen, e.is_open) for e in report.epochs]
    names = [shardset.manifest.name for shardset in Sources.open(parse(tree, "test").data).shardsets]
    assert of_source == [(names[0], 0, 48, 48, True), (names[1], 0, 11, 11, False), (names[1], 1, 11, 5, True)]


@pytest.mark.parametrize("what", ["twice", "lost", "other", "gap"])
def test_what_is_wrong_is_found_and_said(tree: dict[str, Any], what: str) -> None:
    run = Path(tree["run"]["dir"])
    assert alone(tree, 0, 12, write_every=3).is_clean
    path = run / "ledger" / CONSUMED
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    shard = next(shard for shard in lines[0]["shards"] if shard[1] == 0)
    if what == "twice":
        shard[3:] = [shard[3] + 1, (shard[4] + 17) % 2**64]
    elif what == "lost":
        shard[3:] = [shard[3] - 1, (shard[4] - 17) % 2**64]
    elif what == "other":
        shard[4] = (shard[4] + 1) % 2**64
    else:
        del lines[1]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = audit(run)
    assert not report.is_clean
    first = report.epochs[0]
    if what == "gap":
        assert report.gaps == ["after step 3 comes step 7"]
        assert first.missing > 0
    else:
        assert (first.missing, first.duplicates) == {"twice": (0, 1), "lost": (1, 0), "other": (1, 1)}[what]
        assert len(first.wrong_shards) == 1
        assert first.wrong_shards[0].endswith(".tar")
    done = CliRunner().invoke(app, ["audit", str(run)])
    assert done.exit_code == 1
    assert "NOT clean" in done.stdout
    done = CliRunner().invoke(app, ["audit", str(run), "--json"])
    assert json.loads(done.stdout)["clean"] is False


def test_a_clean_run_at_the_command_line(tree: dict[str, Any]) -> None:
    alone(tree, 0, 6)
    done = CliRunner().invoke(app, ["audit", tree["run"]["dir"]])
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1] == "clean"
    assert "steps 1 to 6; ranks: 1 from step 1" in done.stdout


def test_what_cannot_be_audited(tree: dict[str, Any], tmp_path: Path, shapes: Path) -> None:
    with pytest.raises(TrainError, match="not a run folder"):
        audit(tmp_path)
    run = Path(tree["run"]["dir"])
    run.mkdir()
    (run / "config.yaml").write_text(parse(tree, "test").to_yaml())
    with pytest.raises(TrainError, match="no ledger yet"):
        audit(run)
    alone(tree, 0, 1)
    (run / "config.yaml").write_text(parse(tree | {"data": {"train": str(shapes / "val")}}, "test").to_yaml())
    with pytest.raises(TrainError, match="not those that the run was trained on"):
        audit(run)
    (run / "ledger" / CONSUMED).write_text('{"after": "x"}\n')
    with pytest.raises(TrainError, match="a damaged ledger"):
        audit(run)


def test_bad_photos_are_counted_up_to_a_share_and_no_further(
    run_ranks: RankFunction, tree: dict[str, Any], shapes: Path, tmp_path: Path
) -> None:
    tar, key = damaged(shapes, tmp_path / "damaged", 5)
    tree["data"] |= {"train": str(tmp_path / "damaged")}
    run, strict = Path(tree["run"]["dir"]), tmp_path / "strict"
    told = run_ranks("test_audit:train", 2, tree=tree, runs=[[str(run), 0.03], [str(strict), 0.02]])  # one of 48: 0.021
    assert told[0] == told[1]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["data/bad_samples"] for line in log if line["kind"] == "bad"] == [1]
    report = audit(run)
    assert report.is_clean
    assert [(e.seen, e.skipped, e.missing) for e in report.epochs] == [(47, 1, 0)]
    (skipped,) = report.skipped
    assert (skipped.key, skipped.reason, skipped.where) == (key, "not a photo", f"{tar}, sample {key}")
    assert told[0][0] == ""
    assert f"{tar}, sample {key}: too many photos cannot be decoded: not a photo; got 1 in epoch 0 of 48" in told[0][1]
    assert "at most 0 (data.max_bad_fraction 0.02)" in told[0][1]
    assert [one.key for one in read(strict / "ledger").skipped] == [key]


def train(world: World, tree: dict[str, Any], runs: list[tuple[str, float]]) -> list[str]:
    """Whole runs, each with its share of bad photos that is allowed: what each is told."""
    from pvtcap import train as training

    told = []
    for run, max_bad_fraction in runs:
        chosen = tree | {"run": {"dir": run}, "data": {**tree["data"], "max_bad_fraction": max_bad_fraction}}
        try:
            training.run(parse(chosen, "test"), world)
            told.append("")
        except PvtcapError as error:
            told.append(str(error))
    return told


def test_hashes_do_not_depend_on_order_and_see_doubles() -> None:
    assert sum_hashes(["a", "b", "c"]) == sum_hashes(["c", "a", "b"])
    assert len({sum_hashes(keys) for keys in (["a"], ["a", "a"], ["b"], [], ["a", "b"])}) == 5
    assert 0 <= sample_hash("a") < 2**64
