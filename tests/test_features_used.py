"""pytest tests/test_features_used.py: training and evaluating from features, and those that are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, RankFunction, torchrun
from featuresets import ALONE, build, frozen_tree, one_thread_each, save_encoder
from safetensors.torch import load_file, save_file

from pvtcap import evaluate as evaluation
from pvtcap import frozenencoder, stepfolders
from pvtcap import train as training
from pvtcap.captioner import Captioner
from pvtcap.checkpoint import MANIFEST, TRAINABLE, Checkpoint
from pvtcap.config import SourceConfig, batch_plan
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.errors import ConfigError
from pvtcap.featureformat import decode
from pvtcap.shardset import ShardReader, ShardSet, sha256_file
from pvtcap.sources import Sources
from pvtcap.stream import View, train_batches, whole_batches
from pvtcap.text import CaptionTokenizer


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_thread_each():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shapes: Path, one_thread: None) -> Path:
    return build(tmp_path_factory.mktemp("features"), shapes)


@pytest.fixture
def tree(shapes: Path, folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {**frozen_tree(shapes, folder), "run": {"dir": str(tmp_path / "run")}}


def seen_views(folder: Path, tree: dict[str, Any], num_ranks: int, workers: int, epochs: int) -> list[dict[str, int]]:
    """By epoch and key: the view that training drew."""
    shardset = ShardSet.open(folder)
    described = shardset.manifest.features
    assert described is not None
    config = parse(tree, "test")
    tokenizer = CaptionTokenizer.train((text for group in shardset.captions() for text in group), 100)
    data = config.data.model_copy(update={"workers": workers, "train": (SourceConfig(path=str(folder)),)})
    view = View(data, tokenizer, config.text.max_tokens)
    plan = batch_plan(data, num_ranks)
    with ShardReader(shardset) as reader:
        places = [(shard, index) for shard, size in enumerate(shardset.sizes) for index in range(size)]
        views = {
            decode(sample.photo, described, number, "here").tobytes(): (sample.key, number)
            for sample in (reader.read(*place) for place in places)
            for number in range(3)
        }
    found: list[dict[str, int]] = [{} for _ in range(epochs)]
    for rank in range(num_ranks):
        world = World(rank, num_ranks, rank, torch.device("cpu"))
        batches = train_batches(Sources.open(data), view, plan, world, seed=3, first_step=0)
        for step in range(6 * epochs):
            batch = next(batches)
            assert batch.photos.dtype == torch.float16
            for photo, sample in zip(batch.photos, batch.samples, strict=True):
                key, number = views[photo.numpy().tobytes()]
                assert key == sample.key
                found[step // 6][key] = number
    return found


def test_each_time_a_sample_is_seen_one_of_its_views_is_drawn(tree: dict[str, Any], folder: Path) -> None:
    alone = seen_views(folder / "three", tree, num_ranks=1, workers=0, epochs=2)
    assert alone == seen_views(folder / "three", tree, num_ranks=2, workers=1, epochs=2)
    assert [len(epoch) for epoch in alone] == [48, 48]
    assert all(set(epoch.values()) == {0, 1, 2} for epoch in alone)
    assert alone[0] != alone[1]


def lines(run: Path, kind: str, name: str) -> list[float]:
    found = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line[name] for line in found if line["kind"] == kind]


def train_all(world: World, trees: list[dict[str, Any]]) -> None:
    for tree in trees:
        training.run(parse(tree, "test"), world)


@pytest.fixture(scope="module")
def runs(folder: Path, shapes: Path) -> Path:
    """Runs with whole photos and no dropout: from photos, from features in fp16 and int8; in bf16; 'timm' offline."""
    timm = {name: folder / f"timm-{name}" for name in ("one", "val")}
    for name, path in timm.items():
        shutil.copytree(folder / name, path)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["features"]["encoder_weights"] = "timm"
        (path / "manifest.json").write_text(json.dumps(manifest))
    trees = []
    for name, train, val in (
        ("photos", shapes / "train", shapes / "val"), ("fp16", folder / "one", folder / "val"),
        ("int8", folder / "int8", shapes / "val"), ("bf16", folder / "one", folder / "val"),
        ("timm", timm["one"], timm["val"]),
    ):  # fmt: skip
        tree = frozen_tree(shapes, folder)
        tree |= {"run": {"dir": str(folder / "runs" / name)}, "zero": {"stage": 3 if name == "timm" else 2}}
        tree["data"] |= {"train": str(train), "val": str(val), "crop_min_area": 1, "flip_probability": 0}
        tree["train"] |= {"val_every_steps": 6, "steps": 30}
        tree["optim"]["lr"] = 1e-2
        if name == "bf16":
            tree["precision"] = "bf16"
        if name == "timm":
            tree["model"]["encoder_weights"] = "timm"
        trees.append(tree)
    arguments = json.dumps({"trees": trees})
    done = torchrun(
        1, str(ROOT / "tests/ranks.py"), "test_features_used:train_all", arguments, str(folder / "runs.json")
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "from fp16 features of pvt_v2_b0 at 32 px, 1 views, no crops" in done.stdout
    return folder / "runs"


def test_losses_are_those_of_photos_within_the_rounding(runs: Path) -> None:
    for kind, name in (("train", "train/loss"), ("val", "val/loss")):
        photos, fp16, int8, bf16, timm = (
            np.array(lines(runs / run, kind, name)) for run in ("photos", "fp16", "int8", "bf16", "timm")
        )
        assert len(photos) == (30 if kind == "train" else 6)
        np.testing.assert_allclose(fp16, photos, rtol=1e-3)
        np.testing.assert_allclose(int8, photos, rtol=1e-2)
        np.testing.assert_allclose(bf16, photos, rtol=5e-2)
        np.testing.assert_allclose(timm, fp16, rtol=1e-4)


def test_without_the_hub_the_checkpoint_knows_the_encoder(runs: Path) -> None:
    found = {name: Checkpoint.open(runs / name).manifest.encoder_sha256 for name in ("photos", "fp16", "timm")}
    assert len(set(found.values())) == 1
    with pytest.raises(ConfigError, match=r"pvt_v2_b0.* nor reachable|cannot fetch"):
        Checkpoint.open(runs / "timm").captioner(ALONE.device)


def captions(world: World, pairs: list[tuple[str, str]], out: str) -> list[list[str]]:
    """What the checkpoint in each first folder says of the ShardSet in the second."""
    told = []
    for number, (run, data) in enumerate(pairs):
        how, folder = Checkpoint.open(Path(run)).config.evaluate, Path(out) / str(number)
        evaluation.run(Path(run), data, folder, world, how)
        told.append([row["caption"] for row in json.loads((folder / "results.json").read_text())])
    return told


def looking_harder(run: Path, out: Path) -> Path:
    """Its checkpoint with so much more of what cross-attention says that captions differ between photos: thirty steps
    teach a model this small to see little, and some seeds nothing.
    """
    shutil.copytree(run, out)
    checkpoint = stepfolders.latest(out / "checkpoints")
    assert checkpoint is not None
    weights = load_file(checkpoint / TRAINABLE)
    for name in weights:
        if "crossattention.output.dense.weight" in name:
            weights[name] *= 50
    save_file(weights, checkpoint / TRAINABLE)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][TRAINABLE]["sha256"] = sha256_file(checkpoint / TRAINABLE)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    return out


def test_evaluation_from_features_gives_the_captions_of_the_photos(
    run_ranks: RankFunction, runs: Path, shapes: Path, folder: Path, tmp_path: Path
) -> None:
    fp16, timm = (looking_harder(runs / name, tmp_path / name) for name in ("fp16", "timm"))
    pairs = [(fp16, shapes / "val"), (timm, folder / "timm-val"), (fp16, folder / "val")]
    words, out = [[str(run), str(data)] for run, data in pairs], tmp_path / "out"
    ((photos, *others),) = run_ranks("test_features_used:captions", 1, pairs=words, out=str(out))
    assert others == [photos, photos]
    assert len(photos) == 11
    assert len(set(photos)) > 1
    drawn = {path.relative_to(out).parts for path in out.rglob("*.png")}
    assert drawn == {("0", "captions.png"), ("0", "worst.png")}  # of features there is nothing to draw


def test_float32_features_are_the_photos_to_the_last_bit(tree: dict[str, Any], shapes: Path) -> None:
    config = parse(tree, "test")
    tokenizer = CaptionTokenizer.train(["a red circle"], 100)
    model = Captioner(config, tokenizer.size)
    photos_only = ShardSet.open(shapes / "val")
    frozenencoder.ready(model, config, [photos_only])
    view = View(config.data, tokenizer, config.text.max_tokens)
    (batch,) = whole_batches(photos_only, view, 11, ALONE, even=False)
    with torch.no_grad():
        assert torch.equal(model.patches(model.encoder(batch.photos)), model.patches(batch.photos))


@pytest.mark.parametrize(
    ("section", "key", "value", "got", "wanted"),
    [
        ("model", "encoder", "pvt_v2_b1", "pvt_v2_b0", "pvt_v2_b1"),
        ("model", "encoder_stages", 3, "2", "3"),
        ("data", "image_px", 64, "32", "64"),
        ("data", "crop_min_area", 0.25, "0.5", "0.25"),
        ("data", "flip_probability", 0.0, "0.5", "0.0"),
    ],
)
def test_features_of_something_else_are_refused_with_both_values(
    tree: dict[str, Any], folder: Path, section: str, key: str, value: object, got: str, wanted: str
) -> None:
    tree[section][key] = value
    three = ShardSet.open(folder / "three")
    with pytest.raises(ConfigError) as caught:
        frozenencoder.check(parse(tree, "test"), [three], trained=[three])
    assert f"features made with another {section}.{key}; got {got}; wanted {wanted}" in str(caught.value)
    if section == "data" and key != "image_px":
        frozenencoder.check(parse(tree, "test"), [three])  # to be evaluated, which no crop is in
        one = ShardSet.open(folder / "one")
        frozenencoder.check(parse(tree, "test"), [one], trained=[one])


def test_features_of_other_weights_are_refused_with_both_fingerprints(
    tree: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    one = ShardSet.open(folder / "one")
    tree["model"]["encoder_weights"] = str(save_encoder(tmp_path / "other.safetensors", 2))
    config = parse(tree, "test")
    model, other = Captioner(config, 50), Captioner(config, 50)
    frozenencoder.ready(other, config, [])
    described = one.manifest.features
    assert described is not None
    for known in (None, other.encoder.fingerprint()):  # from the file; from a checkpoint, without any file
        with pytest.raises(ConfigError, match="features of other encoder weights") as caught:
            frozenencoder.ready(model, config, [one], known)
        assert described.encoder_sha256 in str(caught.value)
        assert other.encoder.fingerprint() in str(caught.value)
