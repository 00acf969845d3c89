"""pytest tests/test_checkpoint.py: a checkpoint as a folder. Saving and going on are in test_train.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pvtcap import __version__
from pvtcap.captioner import Captioner
from pvtcap.checkpoint import FORMAT, MANIFEST, TRAINABLE, Checkpoint
from pvtcap.config import Config
from pvtcap.dist import World
from pvtcap.errors import CheckpointError
from pvtcap.resuming import find
from pvtcap.saving import prune
from pvtcap.shardset import sha256_file
from pvtcap.stepfolders import complete, latest, step_folder
from pvtcap.text import CaptionTokenizer

TOKENIZER = CaptionTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"])


def write(config: Config, step: int) -> Path:
    """A checkpoint without DeepSpeed's part, of a model with new weights."""
    folder = step_folder(config.run.dir, step)
    folder.mkdir(parents=True)
    model = Captioner(config, TOKENIZER.size)
    save_file({name: value.detach().clone() for name, value in model.trainable().items()}, folder / TRAINABLE)
    TOKENIZER.save(folder / "vocab.txt")
    manifest = {
        "format": FORMAT, "pvtcap": __version__, "step": step, "num_samples_seen": step * 8, "world_size": 1,
        "global_batch": 8, "train_data": [], "config": config.model_dump(mode="json"),
        "encoder": config.model.encoder, "encoder_sha256": None,
        "files": {
            TRAINABLE: {
                "size_bytes": (folder / TRAINABLE).stat().st_size, "sha256": sha256_file(folder / TRAINABLE)
            }
        },
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_the_newest_complete_one_is_chosen_by_run_folder_or_by_name(config: Config) -> None:
    for step in (5, 10, 200):
        write(config, step)
    (step_folder(config.run.dir, 200) / MANIFEST).unlink()
    run = config.run.dir
    assert latest(run / "checkpoints") == step_folder(run, 10)
    assert Checkpoint.open(run).manifest.step == Checkpoint.open(run / "checkpoints").manifest.step == 10
    assert Checkpoint.open(step_folder(run, 5)).manifest.step == 5
    found = find(config, "auto", World.alone())
    assert found.checkpoint is not None
    assert (found.checkpoint.manifest.step, found.refused) == (10, ())
    with pytest.raises(CheckpointError, match="no complete checkpoint here"):
        Checkpoint.open(step_folder(run, 200))
    with pytest.raises(CheckpointError, match="already holds a run"):
        find(config, "none", World.alone())


def test_pruning_keeps_the_newest_and_sweeps_what_a_killed_save_left(config: Config) -> None:
    folders = [write(config, step) for step in (1, 2, 3)]
    for killed in ("step_00000004.partial", "step_00000002.old", "step_00000003.universal"):
        (folders[0].parent / killed).mkdir()
    prune(config)
    assert sorted(path.name for path in folders[0].parent.iterdir()) == ["step_00000002", "step_00000003"]


def scored(run: Path, step: int, cider: float | None, bleu_4: float = 0.1) -> None:
    folder = run / "eval" / step_folder(run, step).name
    folder.mkdir(parents=True)
    if cider != 0.0:
        (folder / "scores.json").write_text(json.dumps({"scores": {"CIDEr": cider, "Bleu_4": bleu_4}}))


def test_pruning_keeps_the_best_by_its_captions_and_links_it(config: Config) -> None:
    run = config.run.dir
    for step, cider in ((1, 0.4), (2, 0.9), (3, None), (4, 0.7)):
        write(config, step)
        scored(run, step, cider)
    for step in (5, 6):
        write(config, step)
    prune(config)
    assert [path.name[-1] for path in complete(run / "checkpoints")] == ["2", "5", "6"]
    best = Checkpoint.open(run / "checkpoints" / "best")
    assert (best.manifest.step, best.path.name) == (2, "step_00000002")
    scored(run, 6, 1.2)  # a better one came
    prune(config)
    assert [path.name[-1] for path in complete(run / "checkpoints")] == ["5", "6"]
    assert (run / "checkpoints" / "best").resolve().name == "step_00000006"


def test_one_whose_captions_are_being_scored_may_yet_be_the_best(config: Config) -> None:
    run = config.run.dir
    for step in (1, 2, 3, 4, 5):
        write(config, step)
        if step < 4:
            scored(run, step, 0.0)  # captions, and no scores yet: one is scored, one waits, the oldest was given up
    prune(config)
    assert [path.name[-1] for path in complete(run / "checkpoints")] == ["2", "3", "4", "5"]


def test_a_damaged_one_is_named_and_the_last_good_one_is_gone_on_from(config: Config) -> None:
    for step, how in ((1, ""), (2, "changed"), (3, "format"), (4, "cut")):
        damage(write(config, step), how)
    found = find(config, "auto", World.alone())
    assert found.checkpoint is not None
    assert found.checkpoint.manifest.step == 1
    assert [("step_0000000" + number in line) for number, line in zip("432", found.refused, strict=True)] == [True] * 3
    assert "got other/9; wanted pvtcap-checkpoint/" in found.refused[1]
    assert "sha256 differs" in found.refused[2]
    damage(step_folder(config.run.dir, 1), "not json")
    with pytest.raises(CheckpointError, match="no checkpoint to go on from is whole"):
        find(config, "auto", World.alone())


def test_the_whole_model_comes_back(config: Config) -> None:
    opened = Checkpoint.open(write(config, 1))
    model = opened.captioner(torch.device("cpu"))
    assert not model.training
    made = Captioner(config, TOKENIZER.size).state_dict()
    assert all(torch.equal(value, made[name]) for name, value in model.state_dict().items())
    assert opened.tokenizer().vocab == TOKENIZER.vocab


def damage(folder: Path, how: str) -> None:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    weights = (folder / TRAINABLE).read_bytes()
    if how == "cut":
        (folder / TRAINABLE).write_bytes(weights[:-10])
    elif how == "changed":
        (folder / TRAINABLE).write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    elif how == "gone":
        (folder / TRAINABLE).unlink()
    elif how == "format":
        (folder / MANIFEST).write_text(json.dumps({**manifest, "format": "other/9"}))
    elif how == "not json":
        (folder / MANIFEST).write_text("{")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut", "a checkpoint's file is damaged"),
        ("gone", "got nothing"),
        ("changed", "sha256 differs"),
        ("format", "got other/9"),
        ("not json", "not a checkpoint's manifest"),
    ],
)
def test_a_damaged_one_is_named_and_not_used(config: Config, how: str, says: str) -> None:
    folder = write(config, 1)
    damage(folder, how)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder).captioner(torch.device("cpu"))
    assert says in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_weights_of_a_frozen_encoder_are_noticed(config: Config) -> None:
    from pvtcap.checkpoint import check_encoder

    opened = Checkpoint.open(write(config, 1))
    model = opened.captioner(torch.device("cpu"))
    trained_on = opened.manifest.model_copy(update={"encoder_sha256": model.encoder.fingerprint()})
    check_encoder(model, trained_on, opened.path)
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1e-3)
    with pytest.raises(CheckpointError, match="trained on other encoder weights"):
        check_encoder(model, trained_on, opened.path)
