"""pytest tests/test_features.py: features are made, on any number of ranks, killed or not; what they cannot do."""

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
from conftest import ROOT, RankFunction, torchrun
from featuresets import ALONE, build, frozen_tree, make, one_thread_each

from pvtcap import caption, featurefolder, frozenencoder, photoviews, pixels, shardcommands, shardjoin
from pvtcap.captioner import Captioner
from pvtcap.configfile import parse
from pvtcap.errors import PvtcapError, ShardError
from pvtcap.featureformat import decode
from pvtcap.shardset import ShardReader, ShardSet
from pvtcap.shardverify import verify


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
    run_ranks("featuresets:make", 3, tree=tree, data=str(shapes / "train"), out=out, num_views=3)
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
