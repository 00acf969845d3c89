"""pytest tests/test_full_disk.py: builds on a filesystem that is really full. Needs root, to mount one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from test_shardindex import img2dataset, write_tar
from test_shardwriter import files, picture

from pvtcap.shardset import sha256_file
from pvtcap.shardverify import verify


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 400 kB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small filesystem")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small filesystem here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def make_room(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)


def shards(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pvtcap", "shards", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("pvtcap: error: ")
    return line


def builders(tmp_path: Path) -> dict[str, list[object]]:
    """The words of two builds, each twice as large as the small filesystem."""
    (tmp_path / "photos").mkdir()
    lines = ["file,caption"]
    for number in range(60):
        (tmp_path / f"photos/{number}.jpg").write_bytes(picture(300 + number, 200, quality=98))
        lines.append(f"{number}.jpg,a gradient")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    return {
        "shapes": ["shapes", "--split", "train", "--num-samples", 600, "--samples-per-shard", 25],
        "folder": [
            "folder", "--images", tmp_path / "photos", "--captions", tmp_path / "captions.csv",
            "--samples-per-shard", 4,
        ],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["shapes", "folder"])
def test_a_build_stops_in_one_line_and_goes_on_to_the_same_bytes(tmp_path: Path, small: Path, name: str) -> None:
    words = [*builders(tmp_path)[name], "--processes", 2, "--out"]
    assert shards(*words, tmp_path / "whole/cats").returncode == 0
    whole = files(tmp_path / "whole/cats")
    assert sum(map(len, whole.values())) > 800_000  # twice the filesystem
    out = small / "cats"
    for _ in range(2):  # the second time it is full from the start
        line = one_line(shards(*words, out))
        assert "no space left on the disk" in line
        assert str(out) in line
        assert "run the same command again" in line
        left = files(out)
        assert "manifest.json" not in left
        assert not any(file.endswith(".partial") for file in left)
        finished = {file: content for file, content in left.items() if file != "building.json"}
        assert len(finished) >= 4
        assert len(finished) % 2 == 0
        assert finished == {file: whole[file] for file in finished}
    make_room(small)
    done = shards(*words, out)
    assert done.returncode == 0
    assert "were there from an interrupted run" in done.stdout
    assert files(out) == whole
    assert verify(out) == []


def test_an_index_stops_in_one_line_and_leaves_the_tars(tmp_path: Path, small: Path) -> None:
    for folder in (tmp_path / "whole/cats", small / "cats"):
        for number in range(2):
            write_tar(folder / f"{number}.tar", img2dataset(100 * number, 30))
    sums = {tar.name: sha256_file(tar) for tar in (small / "cats").glob("*.tar")}
    with (small / "rest").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    line = one_line(shards("index", small / "cats"))
    assert "No space left on device" in line
    assert {tar.name: sha256_file(tar) for tar in (small / "cats").iterdir()} == sums
    make_room(small)
    assert shards("index", small / "cats").returncode == 0
    assert shards("index", tmp_path / "whole/cats").returncode == 0
    assert files(small / "cats") == files(tmp_path / "whole/cats")
