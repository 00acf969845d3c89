"""pytest tests/test_shardindex.py: tars that others wrote, used where they lie."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, build_shapes
from PIL import Image
from test_shardwriter import files, picture
from test_stream import rank, view

from pvtcap.config import Config, batch_plan
from pvtcap.errors import ConfigError, ShardError
from pvtcap.shardindex import IndexOptions, index_tars, run
from pvtcap.shardset import Sample, ShardReader, ShardSet
from pvtcap.shardverify import verify
from pvtcap.stream import train_batches, whole_batches

Members = list[tuple[str, bytes | str | dict[str, Any]]]


def write_tar(path: Path, members: Members, form: int = tarfile.PAX_FORMAT, mtime: float = 1.5) -> Path:
    """A tar as WebDataset's writer makes it: the time with its fraction, so a PAX header before each member."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            raw = json.dumps(content).encode() if isinstance(content, dict) else content
            raw = raw.encode() if isinstance(raw, str) else raw
            header = tarfile.TarInfo(name)
            header.size, header.mtime = len(raw), mtime
            tar.addfile(header, io.BytesIO(raw))
    return path


def img2dataset(first: int, count: int) -> Members:
    """As img2dataset lays samples out."""
    found: Members = []
    for number in range(first, first + count):
        key, caption = f"{number:09d}", f"photo number {number}"
        about = {"caption": caption, "url": "http://x/y", "key": key, "status": "success", "width": 40, "height": 30}
        found += [(f"{key}.jpg", picture(40 + number % 7, 30)), (f"{key}.json", about), (f"{key}.txt", caption)]
    return found


def samples(folder: Path) -> list[Sample]:
    shardset = ShardSet.open(folder)
    with ShardReader(shardset) as reader:
        return [reader.read(shard, index) for shard, size in enumerate(shardset.sizes) for index in range(size)]


def index(folder: Path, out: Path | None = None, **options: Any) -> dict[str, int]:
    """Index a folder, verify the result; what was left out, by reason."""
    report = index_tars(folder, out or folder, IndexOptions(**options))
    assert verify(out or folder) == []
    assert report.examples.keys() == report.manifest.skipped.keys()
    return report.manifest.skipped


def test_img2dataset_is_read_and_trained_on_where_it_lies(tmp_path: Path, config: Config) -> None:
    folder = tmp_path / "cc3m"
    for shard in range(3):
        write_tar(folder / f"{shard:05d}.tar", img2dataset(shard * 10_000, 8))
        (folder / f"{shard:05d}.parquet").write_bytes(b"not looked at")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    before = files(folder)
    counted: list[int] = []
    report = index_tars(folder, folder, IndexOptions(processes=2), counted.append)
    assert counted == [8, 8, 8]
    assert {name: content for name, content in files(folder).items() if name in before} == before
    assert (report.num_candidates, report.examples, report.manifest.name) == (24, {}, "cc3m")
    assert verify(folder) == []
    found = samples(folder)
    assert [sample.key for sample in found] == [f"{s}{n:04d}".zfill(9) for s in range(3) for n in range(8)]
    assert [sample.image_id for sample in found] == [sample.key for sample in found]
    assert found[9].captions == ("photo number 10001",)  # KEY.txt and KEY.json say the same: once
    assert found[9].source == "cc3m"
    assert all(Image.open(io.BytesIO(sample.photo)).size == (sample.width, sample.height) for sample in found)

    seen = view(folder, config)
    (found_set,) = seen[0].shardsets
    plan = batch_plan(seen[1].data, 1)
    stream = itertools.islice(train_batches(*seen, plan, rank(0, 1), seed=0, first_step=0), 3)
    assert sorted(sample.key for batch in stream for sample in batch.samples) == [sample.key for sample in found]
    whole = whole_batches(found_set, seen[1], 4, rank(0, 1), even=False)
    assert [sample.key for batch in whole for sample in batch.samples] == [sample.key for sample in found]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_same_samples_as_webdataset(tmp_path: Path, form: int) -> None:
    import gc

    import webdataset as wds

    long, text = "a/" * 30 + "long" * 20, "a cat"
    members: Members = [
        ("00000/000000012.jpg", picture()), ("00000/000000012.txt", text),
        ("v1.2/b.PNG", picture(kind="PNG")), ("v1.2/b.JSON", {"text": text}),
        ("./c.webp", picture(kind="WEBP")), ("./c.json", {"captions": [text, "the cat"]}), ("./c.cls", "7"),
        ("README", "no key"), (".hidden", "nor here"),
        (f"{long}.jpeg", picture()), (f"{long}.0.txt", text), (f"{long}.1.txt", "the cat"),
        ("d.jpg", picture()), ("d.seg.png", picture(kind="PNG")), ("d.txt", text),
    ]  # fmt: skip
    tar = write_tar(tmp_path / "tars/x.tar", members, form, mtime=3)
    assert index(tar.parent) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the last tar to the garbage collector
        theirs = list(wds.WebDataset([str(tar)], shardshuffle=False))
        gc.collect()
    ours = samples(tar.parent)
    assert [sample.key for sample in ours] == [sample["__key__"] for sample in theirs]
    photos = [next(sample[kind] for kind in ("jpg", "png", "webp", "jpeg") if kind in sample) for sample in theirs]
    assert [sample.photo for sample in ours] == photos
    assert [len(sample.captions) for sample in ours] == [1, 1, 2, 2, 1]
    left_alone = ShardSet.open(tar.parent).manifest.build["left_alone"]
    assert left_alone == {"without a key": 2, ".cls": 1, ".seg.png": 1}


def test_a_photo_once_a_caption_is_several_samples(tmp_path: Path) -> None:
    photo, members = picture(), list[Any]()
    for number in range(5):
        members += [(f"391895_{number}.jpg", photo), (f"391895_{number}.txt", f"caption {number}")]
    write_tar(tmp_path / "coco.tar", members)
    assert index(tmp_path) == {}
    assert [sample.captions for sample in samples(tmp_path)] == [(f"caption {number}",) for number in range(5)]


def test_keys_that_tars_share_get_the_tars_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / "tars" / f"{name}.tar", [("0.jpg", picture()), ("0.txt", f"cat {name}")])
    assert index(tmp_path / "tars") == {}
    assert [(s.key, s.image_id, s.captions) for s in samples(tmp_path / "tars")] == [
        ("a/0", "a/0", ("cat a",)), ("b/0", "b/0", ("cat b",)),
    ]  # fmt: skip
    assert list(ShardSet.open(tmp_path / "tars").keys()) == ["a/0", "b/0"]


def test_another_folder_gets_links(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars/0.tar", img2dataset(0, 3))
    before = files(tmp_path / "tars")
    out = tmp_path / "deep/out"
    assert index(tmp_path / "tars", out, name="mine") == {}
    assert files(tmp_path / "tars") == before
    assert (out / "0.tar").is_symlink()
    assert (samples(out)[2].key, samples(out)[2].source) == ("000000002", "mine")
    assert index(tmp_path / "tars", out, overwrite=True) == {}
    (out / "notes.txt").write_text("mine")
    (out / "manifest.json").unlink()
    with pytest.raises(ShardError, match="holds other files"):
        index(tmp_path / "tars", out)


def gzipped(tar: Path) -> None:
    import gzip

    tar.write_bytes(gzip.compress(tar.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda tar: os.truncate(tar, 2_000), "cut off"),
        (lambda tar: os.truncate(tar, 0), "cut off"),
        (lambda tar: tar.write_bytes(tar.read_bytes().rstrip(b"\0")), "cut off"),
        (lambda tar: tar.write_bytes(b"this is no tar" * 1000), "a damaged header"),
        (gzipped, "Unpack it: gunzip"),
        (lambda tar: tar.write_bytes(bytes(10_240)), "no sample in it"),
        (lambda tar: (tar.unlink(), os.mkfifo(tar)), "not a plain file"),
        (lambda tar: (tar.unlink(), tar.mkdir()), "not a plain file"),
        (lambda tar: (tar.unlink(), tar.symlink_to("/nowhere")), "cannot open"),
        (lambda tar: tar.write_bytes(tar.read_bytes() * 2), "two tars joined"),
    ],
)
def test_an_unusable_tar_is_left_out_whole(tmp_path: Path, damage: Callable[[Path], object], says: str) -> None:
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", img2dataset(number * 10, 3))
    damage(tmp_path / "1.tar")
    with pytest.raises(ShardError, match=r"1 of 2 tars had to be left out; got 1\.tar \(.*at most 10%") as caught:
        index(tmp_path)
    assert says in str(caught.value)
    assert not list(tmp_path.glob("*json*"))
    assert index(tmp_path, max_skipped=0.5) == {"unusable tar": 1}
    assert [sample.key for sample in samples(tmp_path)] == [f"{n:09d}" for n in range(3)]


def test_folders_that_cannot_be_indexed(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no such folder of tars"):
        index(tmp_path / "none")
    (tmp_path / "x.tar.gz").write_text("")
    with pytest.raises(ShardError, match=r"no tar in this folder.*Unpack 'x\.tar\.gz'"):
        index(tmp_path)
    shapes = build_shapes(tmp_path / "shapes", "train", 4, 4)
    before = files(shapes)
    for overwrite in (False, True):
        with pytest.raises(ShardError, match=r"of another kind.*--out"):
            index(shapes, overwrite=overwrite)
    (shapes / "manifest.json").rename(shapes / "building.json")  # a builder that was interrupted
    with pytest.raises(ShardError, match="of another kind"):
        index(shapes)
    (shapes / "building.json").unlink()
    with pytest.raises(ShardError, match=r"other files; got shapes-000000\.index\.json"):
        index(shapes)
    assert files(shapes) == {name: content for name, content in before.items() if name != "manifest.json"}
    assert index(shapes, tmp_path / "lost") == {}  # tars of ours whose manifest is lost
    assert [len(sample.captions) for sample in samples(tmp_path / "lost")] == [5] * 4
    for wrong in ({"processes": -1}, {"max_skipped": 2.0}):
        with pytest.raises(ConfigError, match="--"):
            IndexOptions(**wrong)


def test_again_needs_to_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "0.tar", [*img2dataset(0, 3), ("0.npy", "7")])
    write_tar(tmp_path / "1.tar", img2dataset(1, 3))
    run([str(tmp_path), "--processes", "1", "--name", "cats"])
    printed = capsys.readouterr()
    assert "1 members were left alone: .npy 1." in printed.out
    assert "stands behind its tar's name: 0/KEY" in printed.out
    before = files(tmp_path)
    with pytest.raises(ShardError, match=r"already indexed.*--overwrite"):
        run([str(tmp_path)])
    assert files(tmp_path) == before
    (tmp_path / "1.tar").unlink()
    run([str(tmp_path), "--overwrite", "--name", "cats"])
    assert not (tmp_path / "1.index.json").exists()
    assert [sample.key for sample in samples(tmp_path)] == [f"{n:09d}" for n in range(3)]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars/0.tar", img2dataset(0, 3))
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match=r"cannot index: .*--out"):
        index(tmp_path / "tars", tmp_path / "file/out")


def test_killed_at_any_moment_and_run_again(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole/cats", tmp_path / "cats"
    for folder in (whole, killed):
        for number in range(12):
            write_tar(folder / f"{number:05d}.tar", img2dataset(number * 10, 6))
    index(whole)
    command = [sys.executable, "-m", "pvtcap", "shards", "index", str(killed), "--processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for written in ("building.json", "00003.index.json", "00008.texts.jsonl"):
        with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 60
            while not (killed / written).exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.001)
            os.killpg(process.pid, signal.SIGKILL)
        if (killed / "manifest.json").exists():
            (killed / "manifest.json").unlink()  # it was quicker than the kill
            (killed / "building.json").write_text('{"builder": "index"}')
        (killed / "00011.index.json.partial").write_text("half")
    with pytest.raises(ShardError, match="without a manifest"):
        ShardSet.open(killed)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert files(killed) == files(whole)


def test_a_tar_that_changed_is_not_read_as_another_sample(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", img2dataset(0, 4))
    index(tmp_path)
    shardset = ShardSet.open(tmp_path)
    offset, _ = shardset.load_index(0).photos[1]
    raw = bytearray((tmp_path / "x.tar").read_bytes())
    raw[offset - 512] ^= 1  # in the name
    (tmp_path / "x.tar").write_bytes(raw)
    with ShardReader(shardset) as reader:
        reader.read(0, 0)
        with pytest.raises(ShardError, match=r"x\.tar, sample 000000001: .* has changed since it was indexed"):
            reader.read(0, 1)
    text = (tmp_path / "x.texts.jsonl").read_text()
    (tmp_path / "x.texts.jsonl").write_text(text.replace('"image_id": "000000000"', '"image_id": "000000009"'))
    with ShardReader(shardset) as reader, pytest.raises(ShardError, match="points at something else"):
        reader.read_text(0, 0)
    told = {(problem.shard, problem.problem.split(":")[0]) for problem in verify(tmp_path)}
    assert ("x.texts.jsonl", "sha256 is not the manifest's") in told
    assert ("x.tar", "sha256 is not the manifest's") in told
    os.truncate(tmp_path / "x.texts.jsonl", 10)
    with pytest.raises(ShardError, match="truncated file of texts"):
        ShardSet.open(tmp_path)
    assert any(problem.problem.startswith("10 bytes") for problem in verify(tmp_path))
    (tmp_path / "x.texts.jsonl").unlink()
    assert any(problem.problem == "the file of texts is missing" for problem in verify(tmp_path))
