"""pytest tests/test_shardjoin.py"""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from pvtcap import shardcommands, shardjoin
from pvtcap.errors import ShardError
from pvtcap.shardset import ShardSet
from pvtcap.shardverify import verify


def build(out: Path, numbers: range, missing: int = 0) -> Path:
    """A ShardSet of drawn photos with these numbers; so many more are named in its input and not there."""
    photos = out.parent / f"photos-{out.name}"
    photos.mkdir(parents=True)
    for number in numbers:
        Image.effect_noise((40, 30), 50).convert("RGB").save(photos / f"{number}.jpg")
    names = [*numbers, *(f"gone-{number}" for number in range(missing))]
    (photos / "captions.csv").write_text("file,caption\n" + "".join(f"{name}.jpg,photo {name}\n" for name in names))
    main = runpy.run_path(str(ROOT / "shards" / "folder.py"))["main"]
    words = ["--images", str(photos), "--captions", str(photos / "captions.csv"), "--max-skipped", "0.9"]
    main([*words, "--drop-duplicates", "--samples-per-shard", "5", "--processes", "1", "--out", str(out)])
    return out


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return [build(tmp_path / "a", range(12), missing=2), build(tmp_path / "b", range(12, 20), missing=1)]


def say_part(folder: Path, part: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["build"]["part"] = part
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_joined_it_is_one(parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shardcommands.COMMANDS["join"]([*map(str, parts), "--out", str(tmp_path / "all")])
    assert "20 samples in 5 shards of 2 parts" in " ".join(capsys.readouterr().out.split())
    whole = ShardSet.open(tmp_path / "all")
    assert list(whole.keys()) == [str(number) for number in range(20)]
    assert (whole.num_captions, whole.manifest.skipped) == (20, {"missing photo": 3})
    assert verify(tmp_path / "all") == []
    for name in ("a-000000.tar", "b-000001.index.json"):
        assert (tmp_path / "all" / name).samefile(tmp_path / name[0] / name), "a copy, not a link"
    for part in parts:
        shutil.rmtree(part)
    assert verify(tmp_path / "all") == []


def test_all_parts_have_to_be_there(parts: list[Path], tmp_path: Path) -> None:
    say_part(parts[0], "1/3")
    say_part(parts[1], "3/3")
    with pytest.raises(ShardError, match="parts are missing; got 2 of 3; wanted 2/3"):
        shardjoin.join(parts, tmp_path / "all")
    say_part(parts[1], "1/3")
    with pytest.raises(ShardError, match="part 1/3 is there twice"):
        shardjoin.join(parts, tmp_path / "all")
    say_part(parts[1], "2/2")
    with pytest.raises(ShardError, match="parts of different builds"):
        shardjoin.join(parts, tmp_path / "all")
    say_part(parts[0], "1/2")
    shardjoin.join(parts, tmp_path / "all")


def test_names_that_meet(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"a-000000\.tar is in two parts"):
        shardjoin.join([parts[0], build(tmp_path / "again" / "a", range(30, 33))], tmp_path / "all")
    with pytest.raises(ShardError, match=r"a-000001\.tar: 3 keys are there twice, the first in this shard"):
        shardjoin.join([parts[0], build(tmp_path / "again" / "c", range(7, 10))], tmp_path / "all")
    with pytest.raises(ShardError, match="the folder is there already"):
        shardjoin.join(parts, parts[0])
    with pytest.raises(ShardError, match="no such shard folder"):
        shardjoin.join([parts[0], tmp_path / "gone"], tmp_path / "all")
    assert not list(tmp_path.glob("all*"))


def test_photos_that_two_parts_have_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = build(tmp_path / "a", range(3)), tmp_path / "b"
    photos = tmp_path / "photos-a"
    (photos / "9.jpg").write_bytes((photos / "1.jpg").read_bytes())
    (photos / "captions.csv").write_text("file,caption\n9.jpg,the same photo\n")
    main = runpy.run_path(str(ROOT / "shards" / "folder.py"))["main"]
    words = ["--images", str(photos), "--captions", str(photos / "captions.csv"), "--processes", "1"]
    main([*words, "--drop-duplicates", "--out", str(second)])
    shardjoin.run([str(first), str(second), "--out", str(tmp_path / "all")])
    assert "1 photos are in more than one part" in " ".join(capsys.readouterr().out.split())
