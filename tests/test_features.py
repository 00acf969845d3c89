"""pytest tests/test_features.py: features are made, and what is trained and evaluated from them."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, RankFunction, tiny_tree, torchrun
from safetensors.torch import save_file

from pvtcap import caption, featurefolder, features, frozenencoder, photoviews, pixels, shardcommands, shardjoin
from pvtcap import evaluate as evaluation
from pvtcap import train as training
from pvtcap.captioner import Captioner
from pvtcap.checkpoint import Checkpoint
from pvtcap.config import SourceConfig, batch_plan
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.encoder import Encoder
from pvtcap.errors import ConfigError, PvtcapError, ShardError
from pvtcap.featureformat import decode
from pvtcap.shardset import ShardReader, ShardSet
from pvtcap.shardverify import verify
from pvtcap.sources import Sources
from pvtcap.stream import View, train_batches, whole_batches
from pvtcap.text import CaptionTokenizer

ALONE = World(0, 1, 0, torch.device("cpu"))


def save_encoder(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    state = Encoder("pvt_v2_b0", 2).pvt.state_dict()
    # As weights that have learned: those of a new PVT give features that hardly differ from photo to photo.
    save_file({name: value * 3 if value.ndim > 1 else value for name, value in state.items()}, path)
    return path


def frozen_tree(shapes: Path, folder: Path) -> dict[str, Any]:
    tree = tiny_tree(shapes, folder / "run")
    tree["data"] |= {"crop_min_area": 0.5, "flip_probability": 0.5}
    tree["model"] |= {"encoder_weights": str(folder / "encoder.safetensors"), "dropout": 0.0}
    tree["train"] |= {"what": "projection+decoder"}
    return tree


def make(world: World, tree: dict[str, Any], data: str, out: str, num_views: int = 1, dtype: str = "fp16") -> None:
    options = features.FeatureOptions(num_views, "int8" if dtype == "int8" else "fp16")
    features.run(parse(tree, "test"), Path(data), Path(out), world, options)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As each rank has under torchrun: sums of floats may depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shapes: Path, one_thread: None) -> Path:
    """Weights of an encoder, and features of the shapes: train with one view and with three, fp16 and int8; val."""
    folder = tmp_path_factory.mktemp("features")
    save_encoder(folder / "encoder.safetensors", 1)
    tree = frozen_tree(shapes, folder)
    for name, part, views, dtype in (
        ("one", "train", 1, "fp16"), ("int8", "train", 1, "int8"), ("three", "train", 3, "fp16"),
        ("val", "val", 1, "fp16"),
    ):  # fmt: skip
        make(ALONE, tree, str(shapes / part), str(folder / name), views, dtype)
    return folder


@pytest.fixture
def tree(shapes: Path, folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {**frozen_tree(shapes, folder), "run": {"dir": str(tmp_path / "run")}}


def contents(folder: Path) -> dict[str, bytes]:
    """By name, that of the folder itself taken away."""
    return {
        path.name.replace(folder.name, "X"): path.read_bytes().replace(folder.name.encode(), b"X")
        for path in folder.iterdir()
    }


def test_they_stand_where_the_photos_stand(shapes: Path, folder: Path) -> None:
    source, made = ShardSet.open(shapes / "train"), ShardSet.open(folder / "three")
    assert (made.sizes, made.num_captions) == (source.sizes, source.num_captions)
    with ShardReader(source) as theirs, ShardReader(made) as ours:
        for shard, size in enumerate(source.sizes):
            assert made.load_index(shard).keys == source.load_index(shard).keys
            assert [ours.read_json(shard, n) for n in range(size)] == [theirs.read_json(shard, n) for n in range(size)]
    found = made.manifest.features
    assert found is not None
    assert (found.views, found.shape) == (["square", "augmented", "augmented"], (64, 4, 4))
    assert sorted(path.name for path in (folder / "one").iterdir()) == [
        "manifest.json",
        *(f"one-{shard:06d}.{kind}" for shard in range(3) for kind in ("index.json", "tar")),
    ]
    assert "features" not in json.loads((shapes / "train/manifest.json").read_text())


def test_any_number_of_ranks_writes_the_same_bytes(
    run_ranks: RankFunction, tree: dict[str, Any], shapes: Path, folder: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "ranks")
    run_ranks("test_features:make", 3, tree=tree, data=str(shapes / "train"), out=out, num_views=3)
    assert contents(tmp_path / "ranks") == contents(folder / "three")


def test_the_command_on_two_ranks(tree: dict[str, Any], shapes: Path, folder: Path, tmp_path: Path) -> None:
    tree["data"] |= {"image_px": 64, "workers": 1}
    (tmp_path / "c.json").write_text(json.dumps(tree))  # JSON is YAML
    words = ["-m", "pvtcap", "features", str(tmp_path / "c.json"), "--data", str(shapes / "train"), "--out"]
    done = torchrun(2, *words, str(tmp_path / "int8"), "data.image_px=32", "--dtype", "int8")
    assert done.returncode == 0, done.stderr[-6000:]
    assert "48 samples in 3 shards" in done.stdout
    assert contents(tmp_path / "int8") == contents(folder / "int8")
    command = [sys.executable, *words, str(tmp_path / "other"), "--dtype", "fp8"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "--dtype: unknown type of features; got fp8; wanted fp16 or int8" in refused.stderr


def die(tree: str, data: str, out: str) -> None:
    """Make features, and die as if killed while the second shard is written."""
    write = featurefolder.FeatureFolder.write

    def deadly(self: featurefolder.FeatureFolder, shard: int, samples: Iterator[Any]) -> int:
        def some() -> Iterator[Any]:
            for number, sample in enumerate(samples):
                if (shard, number) == (1, 7):
                    os._exit(9)
                yield sample

        return write(self, shard, some())

    featurefolder.FeatureFolder.write = deadly  # type: ignore[method-assign]
    torch.set_num_threads(1)
    make(ALONE, json.loads(tree), data, out, num_views=3)


def test_killed_it_goes_on_behind_the_finished_shards(
    tree: dict[str, Any], shapes: Path, folder: Path, tmp_path: Path
) -> None:
    out, data = tmp_path / "killed", str(shapes / "train")
    code = f"import test_features as t; t.die({json.dumps(tree)!r}, {data!r}, {str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT / "tests")}, check=False
    )
    assert done.returncode == 9
    left = {path.name for path in out.iterdir()}
    assert left == {"building.json", "killed-000000.tar", "killed-000000.index.json", "killed-000001.tar.partial"}
    first = (out / "killed-000000.tar").stat()
    with pytest.raises(ShardError, match=r"the folder holds another ShardSet: its views differs; got \['square', 'aug"):
        make(ALONE, tree, data, str(out))
    make(ALONE, tree, data, str(out), num_views=3)
    assert contents(out) == contents(folder / "three")
    make(ALONE, tree, data, str(out), num_views=3)  # there is nothing to do
    now = (out / "killed-000000.tar").stat()
    assert (now.st_ino, now.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)


def test_a_shard_without_its_index_is_made_again(
    tree: dict[str, Any], shapes: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "three"
    shutil.copytree(folder / "three", out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "building.json").write_text(json.dumps({name: manifest[name] for name in ("features", "build")}))
    for name in ("manifest.json", "three-000002.index.json"):
        (out / name).unlink()
    make(ALONE, tree, str(shapes / "train"), str(out), num_views=3)
    assert contents(out) == contents(folder / "three")


def by_webdataset(shardset: ShardSet) -> dict[str, dict[str, Any]]:
    import webdataset as wds

    tars = [str(shardset.path / entry.file) for entry in shardset.manifest.shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the last tar to the garbage collector
        found = {sample["__key__"]: sample for sample in wds.WebDataset(tars, shardshuffle=False).decode()}
        gc.collect()
    return found


def test_webdataset_reads_them(folder: Path) -> None:
    made, int8 = ShardSet.open(folder / "one"), ShardSet.open(folder / "int8")
    theirs, records = by_webdataset(made), by_webdataset(int8)
    assert list(theirs) == list(records) == list(made.keys())
    assert made.manifest.features is not None
    with ShardReader(made) as reader:
        for index in range(made.sizes[0]):
            sample = reader.read(0, index)
            row, record = theirs[sample.key], records[sample.key]["npy"]
            assert row["json"]["captions"] == list(sample.captions)
            assert np.array_equal(row["npy"][0], decode(sample.photo, made.manifest.features, 0, "here"))
            features_of_record = record["scale"][0].astype(np.float32)[:, None, None] * record["values"][0]
            np.testing.assert_allclose(features_of_record, row["npy"][0], atol=float(record["scale"].max()))


def test_views_differ_and_are_of_the_photo_as_training_would_show_it(
    tree: dict[str, Any], shapes: Path, folder: Path
) -> None:
    source, made = ShardSet.open(shapes / "train"), ShardSet.open(folder / "three")
    described = made.manifest.features
    assert described is not None
    config = parse(tree, "test")
    model = Captioner(config, 50)
    frozenencoder.ready(model, config, [source])
    with ShardReader(source) as photos, ShardReader(made) as reader:
        seen = [photos.read(0, index).photo for index in range(4)]
        views = [photoviews.views_of(photo, "here", described, number) for number, photo in enumerate(seen)]
        assert torch.equal(views[0][0], pixels.whole(seen[0], "here", 32))
        # Not 12: now and then a crop of these small photos is all of it.
        assert len({view.numpy().tobytes() for each in views for view in each}) >= 10
        again = photoviews.views_of(seen[0], "here", described, 1)
        assert not torch.equal(again[1], views[0][1])  # another sample's number is another crop
        for index in range(4):
            stored = reader.read(0, index).photo
            for view in range(3):
                with torch.no_grad():
                    expected = model.encoder(views[index][view][None])[0].numpy()
                np.testing.assert_allclose(decode(stored, described, view, "here"), expected, rtol=2e-3, atol=1e-5)


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
    done = torchrun(1, str(ROOT / "tests/ranks.py"), "test_features:train_all", arguments, str(folder / "runs.json"))
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


def test_evaluation_from_features_gives_the_captions_of_the_photos(
    run_ranks: RankFunction, runs: Path, shapes: Path, folder: Path, tmp_path: Path
) -> None:
    pairs = [(runs / "fp16", shapes / "val"), (runs / "timm", folder / "timm-val"), (runs / "fp16", folder / "val")]
    words = [[str(run), str(data)] for run, data in pairs]
    ((photos, *others),) = run_ranks("test_features:captions", 1, pairs=words, out=str(tmp_path))
    assert others == [photos, photos]
    assert len(photos) == 11
    assert len(set(photos)) > 1
    drawn = {path.relative_to(tmp_path).parts for path in tmp_path.rglob("*.png")}
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


def test_what_features_cannot_do_is_said_in_a_line(
    tree: dict[str, Any], shapes: Path, folder: Path, tmp_path: Path
) -> None:
    one, photos = ShardSet.open(folder / "one"), ShardSet.open(shapes / "train")
    learning = {**tree, "train": {**tree["train"], "what": "projection+decoder+encoder"}}
    blanked = {**tree, "data": {**tree["data"], "blank_photos": True}}
    out = str(tmp_path / "out")
    told = {
        "this one learns; got train.what=": lambda: frozenencoder.check(parse(learning, "test"), [one]),
        "cannot be blanked": lambda: frozenencoder.check(parse(blanked, "test"), [one]),
        "photos and features cannot be in one batch": lambda: frozenencoder.check(
            parse(tree, "test"), [one, photos], trained=[one, photos]
        ),
        "train.what: features are of a frozen": lambda: make(ALONE, learning, str(shapes / "val"), out),
        "made of grey pictures": lambda: make(ALONE, blanked, str(shapes / "val"), out),
        "features already": lambda: make(ALONE, tree, str(folder / "val"), out),
        "no photo in this tar": lambda: list(caption.find_photos([folder / "val" / "val-000000.tar"])),
        "parts of different features; got features; wanted photos": lambda: shardjoin.join(
            [shapes / "train", folder / "val"], Path(out)
        ),
        "got dtype=int8; wanted dtype=fp16": lambda: shardjoin.join([folder / "one", folder / "int8"], Path(out)),
        "the folder holds other files": lambda: make(ALONE, tree, str(shapes / "val"), str(folder)),
    }
    for says, does in told.items():
        with pytest.raises(PvtcapError) as caught:
            does()
        assert says in str(caught.value)
    assert not Path(out).exists()


def test_they_are_verified_counted_and_joined(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(folder / "three") == verify(folder / "int8") == []
    shardcommands.info([str(folder / "val"), "--out", str(tmp_path / "info"), "--processes", "1"])
    told = capsys.readouterr()
    assert "features in place of photos" in told.out
    assert "no contact sheet" in told.err
    assert [path.name for path in (tmp_path / "info").iterdir()] == ["histograms.png"]
    shardcommands.info([str(folder / "val"), "--json", "--processes", "1"])
    assert json.loads(capsys.readouterr().out)["features"]["shape"] == [64, 4, 4]
    shutil.copytree(folder / "one", tmp_path / "one")
    joined, _ = shardjoin.join([tmp_path / "one"], tmp_path / "all")
    assert (joined.features, verify(tmp_path / "all")) == (ShardSet.open(folder / "one").manifest.features, [])
    assert joined.features is not None
    tar = folder / "one" / "one-000000.tar"
    damaged = tmp_path / "one" / tar.name
    raw = bytearray(tar.read_bytes())
    offset, size = ShardSet.open(folder / "one").load_index(0).photos[3]
    raw[offset + size - 2 : offset + size] = np.float16(np.nan).tobytes()
    damaged.write_bytes(raw)
    assert any("features that are not finite" in problem.problem for problem in verify(tmp_path / "one"))


def test_of_tars_that_others_wrote(tree: dict[str, Any], shapes: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    for name in ("00000", "00001"):  # keys that both share, so that each has its tar's name in front
        shutil.copy(next((shapes / "val").glob("*.tar")), others / f"{name}.tar")
    shardcommands.index([str(others), "--processes", "1"])
    make(ALONE, tree, str(others), str(tmp_path / "out"))
    source, made = ShardSet.open(others), ShardSet.open(tmp_path / "out")
    assert list(made.keys()) == list(source.keys())
    assert next(made.keys()).startswith("00000/")
    assert (list(made.captions()), verify(tmp_path / "out")) == (list(source.captions()), [])
