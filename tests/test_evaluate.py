"""pytest tests/test_evaluate.py"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, RankFunction, torchrun

from pvtcap import evaluate as evaluation
from pvtcap import train as training
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.errors import EvaluationError
from pvtcap.evaluate import Captioned, merge
from pvtcap.scoretable import read_report, reasons, score_table
from pvtcap.shardset import ShardSet

FILES = ["captions.jsonl", "captions.png", "report.html", "results.json", "scores.json", "worst.png"]


def train_and_score(world: World, tree: dict[str, Any]) -> None:
    """A short run that scores itself at its start and its end, as ``pvtcap train`` has it."""
    config = parse(tree, "test")
    with evaluation.BackgroundEvaluation(config, world) as beside:
        training.run(config, world, evaluation=beside)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """The run folder of a model that has seen a few batches."""
    from conftest import tiny_tree

    folder = tmp_path_factory.mktemp("trained")
    tree = tiny_tree(shapes, folder / "run")
    tree["evaluate"] |= {"every_steps": 6, "at_start": True, "min_length": 0}
    tree["optim"]["lr"] = 1e-2
    done = torchrun(2, str(ROOT / "tests/ranks.py"), "test_evaluate:train_and_score", json.dumps({"tree": tree}),
                    str(folder / "out.json"))  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return folder / "run"


def test_any_number_of_ranks_writes_the_same_bytes(trained: Path, shapes: Path, tmp_path: Path) -> None:
    """By the command; test_evaluate_ranks has other numbers of ranks."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    words = ["-m", "pvtcap", "evaluate", str(trained), "--data", str(shapes / "val"), "--micro-batch", "2"]
    for ranks, out in ((1, alone), (3, together)):
        done = torchrun(ranks, *words, "--out", str(out))
        assert done.returncode == 0, done.stderr[-6000:]
        assert "Bleu_4" in done.stdout
    assert sorted(path.name for path in together.iterdir()) == FILES
    for name in FILES:
        assert (together / name).read_bytes() == (alone / name).read_bytes(), name


def test_what_a_run_writes_about_its_own_captions(trained: Path, shapes: Path) -> None:
    folder = trained / "eval" / "step_00000006"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    results = json.loads((folder / "results.json").read_text())
    assert [row["image_id"] for row in results] == list(range(11))
    assert all(row.keys() == {"image_id", "caption"} for row in results)
    report = json.loads((folder / "scores.json").read_text())
    assert list(report["scores"]) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE"]
    assert list(report["unavailable"]) == ["SPICE"]  # its models are not fetched in tests
    assert (report["step"], report["num_photos"], report["blank_photos"]) == (6, 11, False)
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == [row["caption"] for row in results]
    assert all(len(line["references"]) == 5 and "CIDEr" in line["scores"] for line in lines)
    before = read_report(trained / "eval" / "step_00000000")
    assert before["scores"]["Bleu_1"] < report["scores"]["Bleu_1"]


def test_scores_that_a_stopped_run_owes_are_made_when_it_goes_on(trained: Path, shapes: Path, tmp_path: Path) -> None:
    """Stopped between its last checkpoint and the scores of it."""
    from conftest import tiny_tree

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    owed = run / "eval" / "step_00000006"
    before = (owed / "scores.json").read_bytes()
    shutil.rmtree(owed)
    lines = (run / "log.jsonl").read_text().splitlines()
    kept = [line for line in lines if (json.loads(line)["kind"], json.loads(line)["step"]) != ("evaluate", 6)]
    assert len(kept) == len(lines) - 1
    (run / "log.jsonl").write_text("".join(line + "\n" for line in kept))
    tree = tiny_tree(shapes, run)
    tree["evaluate"] |= {"every_steps": 6, "at_start": True, "min_length": 0}
    tree["optim"]["lr"] = 1e-2
    done = torchrun(2, str(ROOT / "tests/ranks.py"), "test_evaluate:train_and_score", json.dumps({"tree": tree}),
                    str(tmp_path / "out.json"))  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    assert (owed / "scores.json").read_bytes() == before
    assert (run / "log.jsonl").read_text().count('"kind": "evaluate"') == 2


def test_blanked_photos_all_get_one_caption(trained: Path, shapes: Path, tmp_path: Path) -> None:
    words = ["-m", "pvtcap", "evaluate", str(trained), "--data", str(shapes / "val"), "--blank-photos"]
    done = torchrun(1, *words, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-6000:]
    report = read_report(tmp_path / "out")
    assert report["blank_photos"] is True
    assert report["statistics"]["num_distinct"] == 1


def captioned(keys: list[str]) -> list[Captioned]:
    return [Captioned(key, int(key[-6:]), "a star", ("a star",)) for key in keys]


def test_each_photo_must_have_exactly_one_caption(shapes: Path) -> None:
    shardset = ShardSet.open(shapes / "val")
    keys = list(shardset.keys())
    assert [item.key for item in merge(shardset, captioned(keys[::-1]))] == keys
    for wrong, says in (
        (keys[1:], f"got 0 for {keys[0]}, 1 such photos"),
        ([*keys, keys[3]], f"got 2 for {keys[3]}"),
        ([*keys, "other-000099"], "got 1 for other-000099"),
    ):
        with pytest.raises(EvaluationError, match="not exactly one caption for each photo") as caught:
            merge(shardset, captioned(wrong))
        assert says in str(caught.value)


def test_a_table_of_several_evaluations() -> None:
    from rich.console import Console

    statistics = {"num_distinct": 3}
    one = {"scores": {"Bleu_4": 0.5, "METEOR": None}, "unavailable": {"METEOR": "no Java"}, "num_photos": 1000,
           "statistics": statistics}  # fmt: skip
    console = Console(width=100, record=True)
    console.print(score_table({"one": one, "other": {**one, "scores": {"Bleu_4": 0.25, "METEOR": 0.1}}}))
    text = console.export_text()
    assert "0.5000" in text
    assert "0.2500" in text
    assert "unavailable" in text
    assert reasons({"one": one}) == ["METEOR is unavailable: no Java"]
    assert "1,000" in text


def test_no_scores_there(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no scores\.json here"):
        read_report(tmp_path)
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(EvaluationError, match="not JSON"):
        read_report(tmp_path)


def test_run_ranks_reports_a_failing_rank(run_ranks: RankFunction) -> None:
    with pytest.raises(AssertionError, match="no_such_function"):
        run_ranks("test_evaluate:no_such_function", 1)
