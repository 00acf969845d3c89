"""pytest tests/test_evaluate_ranks.py: the same bytes on any number of ranks, killed or not; photos that are bad."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import test_checkpoint
import torch
from conftest import tiny_tree
from forkedranks import ForkedRanks
from safetensors.torch import save_file

from pvtcap import evaluate as evaluation
from pvtcap import scoring
from pvtcap.checkpoint import MANIFEST, TRAINABLE, Checkpoint
from pvtcap.configfile import evaluating, parse
from pvtcap.dist import World
from pvtcap.errors import ConfigError, EvaluationError, ShardError
from pvtcap.evalparts import Part, Parts
from pvtcap.shardset import ShardSet, sha256_file
from pvtcap.stream import View, whole_batches
from pvtcap.text import CaptionTokenizer

LEFT = ["captions.jsonl", "evaluation.json"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """Of a model with weights so large that it says something else of each photo. Batches of two: six of 11 photos."""
    tree = tiny_tree(shapes, tmp_path_factory.mktemp("evaluated") / "run")
    tree["evaluate"] = {"num_beams": 3, "micro_batch": 2, "min_length": 0}
    config = parse(tree, "test")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "large", "star", "circle", "on", "the"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_checkpoint, "TOKENIZER", CaptionTokenizer(vocab))
        folder = test_checkpoint.write(config, 1)
    model = Checkpoint.open(folder).captioner(torch.device("cpu"))
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    save_file({name: value.detach().clone() for name, value in model.trainable().items()}, folder / TRAINABLE)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][TRAINABLE]["sha256"] = sha256_file(folder / TRAINABLE)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def caption(checkpoint: Path, data: Path, out: Path, **options: Any) -> None:
    how, threads = Checkpoint.open(checkpoint).config.evaluate, torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # as the ranks have: two threads add up in another order, and the loss's last digit shows it
    evaluation.caption_all(checkpoint, data, out, World.alone("cpu"), how, **options)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(checkpoint: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    caption(checkpoint, shapes / "val", out)
    return out


def test_any_number_of_ranks_leaves_the_same_bytes_killed_or_not(
    forked_ranks: ForkedRanks, checkpoint: Path, shapes: Path, alone: Path, tmp_path: Path
) -> None:
    """Six batches on 2, 3, 5 and 8 ranks (more than batches); then 3 ranks, one killed, and 2 that go on."""
    assert len({json.loads(line)["caption"] for line in (alone / LEFT[0]).read_text().splitlines()}) > 5
    one = {"checkpoint": str(checkpoint), "data": str(shapes / "val")}
    worlds = [(size, str(size), None) for size in (2, 3, 5, 8)] + [(3, "killed", 1), (2, "killed", None)]
    captioned = []
    for size, name, die_rank in worlds:
        log = tmp_path / "log"
        log.write_text("")
        arguments = {**one, "out": str(tmp_path / name), "log": str(log), "die_rank": die_rank}
        failed = forked_ranks.call("test_evaluate_ranks:caption_on_ranks", size, arguments, tmp_path / "results.json")
        assert failed.startswith("" if die_rank is None else f"rank {die_rank} ended with -9"), failed
        assert bool(failed) == (die_rank is not None), failed
        captioned.append(sorted(int(line) for line in log.read_text().split()))
    assert captioned[:4] == [list(range(6))] * 4
    # What the killed world had done is not done again, and nothing is left out.
    assert 1 <= len(captioned[4]) < 6
    assert sorted(captioned[4] + captioned[5]) == list(range(6))
    for _, out, _ in worlds:
        assert sorted(path.name for path in (tmp_path / out).iterdir()) == LEFT
        for name in LEFT:
            assert (tmp_path / out / name).read_bytes() == (alone / name).read_bytes(), (out, name)


def caption_on_ranks(world: World, checkpoint: str, data: str, out: str, log: str, die_rank: int | None) -> None:
    """``log`` gets the number of each batch that is captioned; rank ``die_rank`` kills itself after its first."""
    add = Parts.add

    def logged(self: Parts, part: Part) -> None:
        add(self, part)
        with Path(log).open("a") as file:
            file.write(f"{part.number}\n")
        if world.rank == die_rank:
            os.kill(os.getpid(), signal.SIGKILL)

    Parts.add = logged  # type: ignore[method-assign]
    how = Checkpoint.open(Path(checkpoint)).config.evaluate
    evaluation.caption_all(Path(checkpoint), Path(data), Path(out), world, how)


def test_the_held_out_loss_is_the_mean_over_all_tokens(checkpoint: Path, shapes: Path, alone: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    model, tokenizer = opened.captioner(torch.device("cpu")), opened.tokenizer()
    view = View(opened.config.data, tokenizer, opened.config.text.max_tokens)
    (batch,) = whole_batches(ShardSet.open(shapes / "val"), view, 11, World.alone("cpu"), even=False)
    with torch.inference_mode():
        expected = float(model(batch)) / batch.num_labels
    report = json.loads((alone / "evaluation.json").read_text())["report"]
    assert report["loss"] == pytest.approx(expected, rel=1e-5)
    assert report["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


@pytest.mark.parametrize("changed", [{"precision": "bf16"}, {"precision": "fp16"}, {"num_beams": 1, "top_p": 0.9}])
def test_other_ways_to_generate(checkpoint: Path, shapes: Path, alone: Path, tmp_path: Path, changed: Any) -> None:
    how = evaluating(Checkpoint.open(checkpoint).config, changed)
    for out in ("one", "again"):
        evaluation.caption_all(checkpoint, shapes / "val", tmp_path / out, World.alone("cpu"), how)
    assert (tmp_path / "one" / LEFT[0]).read_bytes() == (tmp_path / "again" / LEFT[0]).read_bytes()
    loss, exact = (json.loads((out / LEFT[1]).read_text())["report"]["loss"] for out in (tmp_path / "one", alone))
    assert loss == pytest.approx(exact, rel=0.05)


def test_settings_that_cannot_be_are_one_line(checkpoint: Path) -> None:
    config = Checkpoint.open(checkpoint).config
    with pytest.raises(ConfigError, match="set num_beams to 1"):
        evaluating(config, {"top_p": 0.9})
    with pytest.raises(ConfigError, match=r"bad value for 'evaluate\.precision'; got 'fp8'"):
        evaluating(config, {"precision": "fp8"})


def test_captions_that_only_wait_for_their_scores_are_not_made_again(
    checkpoint: Path, shapes: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(alone, tmp_path / "out")
    monkeypatch.setattr(evaluation, "_captioned", lambda *words: pytest.fail("captioned again"))
    caption(checkpoint, shapes / "val", out)
    monkeypatch.undo()
    # Other photos, or other settings, are another evaluation.
    how = Checkpoint.open(checkpoint).config.evaluate.model_copy(update={"num_beams": 1})
    evaluation.caption_all(checkpoint, shapes / "val", out, World.alone("cpu"), how)
    assert (out / LEFT[1]).read_bytes() != (alone / LEFT[1]).read_bytes()


def test_parts_of_a_killed_rank_may_end_in_half_a_line(
    checkpoint: Path, shapes: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = evaluation._captioned

    def killed(*words: Any) -> Any:
        parts = real(*words)
        yield next(parts)
        yield next(parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "_captioned", killed)
    with pytest.raises(KeyboardInterrupt):
        caption(checkpoint, shapes / "val", tmp_path)
    monkeypatch.undo()
    with (tmp_path / "parts/rank_00000.jsonl").open("a") as file:
        file.write('{"number": 2, "captioned": [{"key"')
    (tmp_path / "parts/rank_00007.jsonl").write_text('{"identity": "of another evaluation"}\n{"number": 3}\n')
    caption(checkpoint, shapes / "val", tmp_path)
    for name in LEFT:
        assert (tmp_path / name).read_bytes() == (alone / name).read_bytes(), name


def damaged(data: Path, to: Path, *indices: int) -> Path:
    """A copy of a ShardSet in which these photos of its first shard are zeros."""
    shutil.copytree(data, to)
    shardset = ShardSet.open(to)
    tar = to / shardset.manifest.shards[0].file
    content = bytearray(tar.read_bytes())
    for index in indices:
        offset, size = shardset.load_index(0).photos[index]
        content[offset : offset + size] = bytes(size)
    tar.write_bytes(content)
    return to


def test_a_photo_that_cannot_be_read_is_refused_or_counted(checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    bad = damaged(shapes / "val", tmp_path / "bad", 4, 6, 7)  # two of them are a whole batch
    keys = list(ShardSet.open(bad).keys())
    with pytest.raises(ShardError, match=f"{keys[4]}: not a photo.*--allow-missing evaluates without it"):
        caption(checkpoint, bad, tmp_path / "out")
    caption(checkpoint, bad, tmp_path / "out", allow_missing=True)
    report = json.loads((tmp_path / "out/evaluation.json").read_text())["report"]
    assert (report["num_photos"], report["num_missing"]) == (8, 3)
    assert [one["key"] for one in report["missing"]] == [keys[4], keys[6], keys[7]]
    assert "not a photo" in report["missing"][0]["reason"]
    # One that cannot be shown is grey in the report.
    caption(checkpoint, bad, tmp_path / "blank", blank_photos=True)
    photos = scoring.Photos(ShardSet.open(bad))
    assert photos.read(keys[4]) == photos.read(keys[6]) != photos.read(keys[0])
    with pytest.raises(EvaluationError, match="no photo could be read; got 11 unreadable"):
        caption(
            checkpoint, damaged(shapes / "val", tmp_path / "all", *range(11)), tmp_path / "none", allow_missing=True
        )


def test_scoring_beside_a_run_never_piles_up(checkpoint: Path, shapes: Path, alone: Path, tmp_path: Path) -> None:
    """Three evaluations at once: the first is scored, the second gives way to the third. Java may use 2 MB: quick."""
    outs = [shutil.copytree(alone, tmp_path / f"{step}") for step in (10, 20, 30)]
    for out in outs:
        about = json.loads((out / "evaluation.json").read_text())
        about["report"]["generation"]["java_heap_mib"] = 2
        about["training"] = str(shapes / "train")
        (out / "evaluation.json").write_text(json.dumps(about))
    queue = scoring.Scoring()
    for step, out in zip((10, 20, 30), outs, strict=True):
        queue.start(step, out)
    (given_up,) = queue.finished()
    assert (given_up.step, given_up.report) == (20, None)
    assert "not scored: the scores of an earlier step were not done when those of step 30 were due" in given_up.reason
    scored = list(queue.wait())
    assert [one.step for one in scored] == [10, 30]
    for one in scored:
        assert one.report is not None, one.reason
        assert one.report["scores"]["METEOR"] is None
        assert one.report["scores"]["CIDEr"] is not None
        assert one.report["statistics"]["novel_share"] > 0
        page = (one.out / "report.html").read_text()
        assert page.count("<figure>") == 3 * 11
        assert 'src="http' not in page
    assert list(queue.finished()) == []
    # The one that gave way has its captions, and scores when it is asked for them; a failure is a reason.
    (outs[1] / "captions.jsonl").write_text("")
    queue.start(20, outs[1])
    (failed,) = queue.wait()
    assert failed.report is None
    assert "no captions to score" in failed.reason


def test_a_run_goes_on_while_its_captions_are_scored(checkpoint: Path, shapes: Path) -> None:
    config = Checkpoint.open(checkpoint).config
    beside = evaluation.BackgroundEvaluation(config, World.alone("cpu"))
    beside.start(checkpoint, 7)
    assert list(beside.finished()) == []  # the scorer has hardly begun
    (scored,) = beside.finished(wait=True)
    assert (scored.step, scored.out) == (7, config.run.dir / "eval" / checkpoint.name)
    assert scored.report is not None, scored.reason
    assert (scored.out / scoring.SHEET).is_file()
    assert (scored.out / scoring.WORST).is_file()


def test_the_page_escapes_what_models_and_people_say(alone: Path) -> None:
    from pvtcap.htmlreport import page

    row = {"key": "a<b>", "caption": "<script>alert(1)</script>", "references": ["x & y"], "scores": {}}
    report = {
        "scores": {"CIDEr": None}, "intervals": {}, "unavailable": {"CIDEr": "<no>"}, "statistics": {},
        "tokenizer": "", **json.loads((alone / "evaluation.json").read_text())["report"],
    }  # fmt: skip
    text = page(report, [row], lambda key: b"jpeg")
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "x &amp; y" in text
    assert "CIDEr is unavailable: &lt;no&gt;" in text
