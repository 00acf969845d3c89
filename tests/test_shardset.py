"""pytest tests/test_shardset.py"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pvtcap.errors import ShardError
from pvtcap.shardset import Manifest, ShardReader, ShardSet, parse_json, write_json
from pvtcap.shardwriter import BuildOptions, Candidate, PhotoBytes, build


@pytest.fixture
def cats(tmp_path: Path) -> Path:
    """Five samples in three shards."""
    encoded = io.BytesIO()
    Image.new("RGB", (40, 30), "orange").save(encoded, "JPEG")
    photos = [
        Candidate(
            f"cat{n}", n, tuple(f"cat {n}, caption {c}" for c in range(n + 1)), "test", PhotoBytes(encoded.getvalue())
        )
        for n in range(5)
    ]
    build(photos, tmp_path / "cats", BuildOptions(samples_per_shard=2), {"builder": "test"})
    return tmp_path / "cats"


def edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_counts_keys_and_captions(cats: Path) -> None:
    shardset = ShardSet.open(cats)
    assert (shardset.num_samples, shardset.num_captions, shardset.sizes) == (5, 15, [2, 2, 1])
    assert list(shardset.keys()) == [f"cat{n}" for n in range(5)]
    assert [len(captions) for captions in shardset.captions()] == [1, 2, 3, 4, 5]
    assert shardset.manifest.build["builder"] == "test"


def test_random_access_in_any_order(cats: Path) -> None:
    with ShardReader(ShardSet.open(cats)) as reader:
        for shard, index in ((2, 0), (0, 1), (1, 1), (0, 0), (2, 0)):
            sample = reader.read(shard, index)
            number = 2 * shard + index
            assert (sample.key, sample.image_id, sample.source) == (f"cat{number}", number, "test")
            assert (sample.width, sample.height) == Image.open(io.BytesIO(sample.photo)).size == (40, 30)
            assert reader.read_text(shard, index).photo == b""
            assert reader.read_text(shard, index).captions == sample.captions


def test_more_shards_than_files_kept_open(tmp_path: Path) -> None:
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8)).save(encoded, "JPEG")
    photos = [Candidate(str(n), n, ("a cat",), "test", PhotoBytes(encoded.getvalue())) for n in range(70)]
    build(photos, tmp_path / "many", BuildOptions(samples_per_shard=1), {})
    with ShardReader(ShardSet.open(tmp_path / "many")) as reader:
        assert [reader.read(n, 0).key for n in range(70)] == [str(n) for n in range(70)]
        assert reader.read(0, 0).key == "0"


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda cats: (cats / "manifest.json").unlink(), r"without a manifest\.json.*run the same"),
        (lambda cats: (cats / "manifest.json").write_text("{"), "not a valid Manifest"),
        (lambda cats: edited(cats / "manifest.json", lambda m: m.update(format="other/9")), "unknown format"),
        (lambda cats: edited(cats / "manifest.json", lambda m: m.update(num_samples=6)), "do not add up"),
        (
            lambda cats: edited(cats / "manifest.json", lambda m: m["shards"][0].update(file="../x.tar")),
            "shards.0.file",
        ),
        (lambda cats: os.truncate(cats / "cats-000001.tar", 5_000), "truncated tar; got 5,000 bytes"),
        (lambda cats: os.truncate(cats / "cats-000001.tar", 50_000), "larger than its manifest says"),
        (lambda cats: (cats / "cats-000002.tar").unlink(), "named in the manifest is missing"),
    ],
)
def test_damage_that_open_sees(cats: Path, damage: Callable[[Path], object], complaint: str) -> None:
    damage(cats)
    with pytest.raises(ShardError, match=complaint) as caught:
        ShardSet.open(cats)
    assert "\n" not in str(caught.value)
    assert str(cats) in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no such shard folder"):
        ShardSet.open(tmp_path / "none")


def test_damage_that_only_reading_sees(cats: Path) -> None:
    shardset = ShardSet.open(cats)
    edited(cats / "cats-000000.index.json", lambda index: index["keys"].reverse())
    (cats / "cats-000001.index.json").unlink()
    with pytest.raises(ShardError, match="sha256 differs"):
        shardset.load_index(0)
    with pytest.raises(ShardError, match="index is missing"):
        shardset.load_index(1)
    with ShardReader(shardset) as reader:
        reader.key(2, 0)
        os.truncate(cats / "cats-000002.tar", 600)
        with pytest.raises(ShardError, match=r"cats-000002\.tar, sample cat4: truncated tar"):
            reader.read(2, 0)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"not": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"é": 1}
    with pytest.raises(ShardError, match=r"a\.json: not a valid Manifest: format Field required"):
        parse_json(Manifest, b"{}", tmp_path / "a.json")


def test_a_reader_keeps_the_shards_open_that_it_used_last(cats: Path) -> None:
    reader = ShardReader(ShardSet.open(cats), max_open=2)
    for shard in (0, 1, 0, 2):
        reader.read(shard, 0)
    assert list(reader._open) == [0, 2]
    descriptors = [opened.tar for opened in reader._open.values()]
    copy = pickle.loads(pickle.dumps(reader))
    assert (copy.shardset, copy.max_open, copy._open) == (reader.shardset, 2, {})
    del reader
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_a_file_url_is_a_folder(cats: Path) -> None:
    assert ShardSet.open(f"file://{cats}") == ShardSet.open(cats) == ShardSet.open(str(cats))
