"""pytest tests/test_shardverify.py"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pvtcap.errors import ShardError
from pvtcap.shardset import ShardSet
from pvtcap.shardverify import Verification, inspect, verify
from pvtcap.shardwriter import BuildOptions, Candidate, PhotoBytes, SkippedItem, build


def photo() -> bytes:
    encoded = io.BytesIO()
    Image.effect_noise((64, 48), 60).convert("RGB").save(encoded, "JPEG")
    return encoded.getvalue()


@pytest.fixture
def cats(tmp_path: Path) -> Path:
    """Six samples in three shards, and one thing left out."""
    photos = [Candidate(f"cat{n}", n, ("a cat", "the cat"), "test", PhotoBytes(photo())) for n in range(6)]
    skipped = SkippedItem(key="dog", reason="no cat")
    build([*photos, skipped], tmp_path / "cats", BuildOptions(samples_per_shard=2, max_skipped=0.5), {})
    return tmp_path / "cats"


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def vouch_for(cats: Path, shard: int) -> None:
    """Write the shard's checksums and size into the manifest, as if it had been built like this."""
    manifest = json.loads((cats / "manifest.json").read_text())
    entry = manifest["shards"][shard]
    tar, index = cats / entry["file"], cats / entry["file"].replace(".tar", ".index.json")
    entry["sha256"] = hashlib.sha256(tar.read_bytes()).hexdigest()
    entry["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    entry["size_bytes"] = tar.stat().st_size
    (cats / "manifest.json").write_text(json.dumps(manifest))


def told(cats: Path) -> list[tuple[str, str, str]]:
    return [(problem.shard, problem.key, problem.problem) for problem in verify(cats)]


def test_whole(cats: Path) -> None:
    counted: list[int] = []
    assert verify(cats, progress=counted.append) == []
    assert counted == [2, 2, 2]
    assert verify(cats, processes=2) == []


def test_one_flipped_bit(cats: Path) -> None:
    offset, _ = ShardSet.open(cats).load_index(1).texts[0]
    overwrite(cats / "cats-000001.tar", offset + 30, b"Z")
    [(shard, key, problem)] = told(cats)[:1]
    assert (shard, key) == ("cats-000001.tar", "")
    assert "sha256" in problem


def test_truncated_tar_leaves_the_others_checked(cats: Path) -> None:
    os.truncate(cats / "cats-000000.tar", 2_000)
    (cats / "cats-000002.tar").unlink()
    problems = told(cats)
    assert ("cats-000002.tar", "", "the tar is missing") in problems
    assert any(shard == "cats-000000.tar" and problem.startswith("truncated: 2,000") for shard, _, problem in problems)
    assert {key for shard, key, _ in problems if shard == "cats-000000.tar"} >= {"cat0", "cat1"}
    assert not any(shard == "cats-000001.tar" for shard, _, _ in problems)


def test_a_photo_that_does_not_decode_and_a_text_that_is_no_json(cats: Path) -> None:
    index = ShardSet.open(cats).load_index(0)
    overwrite(cats / "cats-000000.tar", index.photos[0][0], b"rubbish, not a JPEG")
    overwrite(cats / "cats-000000.tar", index.texts[1][0], b"rubbish")
    vouch_for(cats, 0)
    problems = {key: problem for _, key, problem in told(cats)}
    assert problems["cat0"].startswith("not a photo")
    assert "not a valid Text" in problems["cat1"]


def test_an_index_of_other_places(cats: Path) -> None:
    path = cats / "cats-000001.index.json"
    index = json.loads(path.read_text())
    index["photos"].reverse()
    index["keys"][1] = "lion"
    path.write_text(json.dumps(index))
    vouch_for(cats, 1)
    problems = told(cats)
    assert ("cats-000001.tar", "cat2", "the index places its photo where the tar has cat3.jpg") in problems
    assert ("cats-000001.tar", "cat3", "in the tar, but not in the index") in problems


def test_the_same_sample_in_two_shards(cats: Path) -> None:
    for name in ("cats-00000{}.tar", "cats-00000{}.index.json"):
        (cats / name.format(1)).write_bytes((cats / name.format(0)).read_bytes())
    vouch_for(cats, 1)
    problems = told(cats)
    assert ("cats-000001.tar", "cat0", "the same key is in cats-000000.tar") in problems
    assert ("cats-000001.tar", "0", "the same image_id is in cats-000000.tar") in problems


def test_totals_strays_and_wrong_size(cats: Path) -> None:
    manifest = json.loads((cats / "manifest.json").read_text())
    manifest["num_captions"] = 99
    manifest["shards"][0]["num_captions"] = 5
    (cats / "manifest.json").write_text(json.dumps(manifest))
    (cats / "skipped.jsonl").write_text("")
    (cats / "other.tar").write_bytes(b"")
    offset, size = ShardSet.open(cats).load_index(2).texts[0]
    text = (cats / "cats-000002.tar").read_bytes()[offset : offset + size]
    overwrite(cats / "cats-000002.tar", offset, text.replace(b'"width": 64', b'"width": 46'))
    vouch_for(cats, 2)
    problems = told(cats)
    assert ("cats-000000.tar", "", "4 captions; wanted 5") in problems
    assert ("cats-000002.tar", "cat4", "the photo is 64 x 48, its text says 46 x 48") in problems
    assert ("manifest.json", "", "the shards' num_captions add up to 13; the manifest says 99") in problems
    assert ("other.tar", "", "a tar that the manifest does not name") in problems
    assert ("skipped.jsonl", "", "it counts {}; the manifest says {'no cat': 1}") in problems


def test_indexes_and_tars_that_lie_take_no_memory(cats: Path) -> None:
    path, ten_gb = cats / "cats-000001.index.json", 10 << 30
    index = json.loads(path.read_text())
    index["photos"][0][1] = ten_gb
    index["texts"][1] = [100, 2**62]
    path.write_text(json.dumps(index))
    vouch_for(cats, 1)
    header = tarfile.TarInfo("cat4.jpg")
    header.type, header.size = tarfile.XHDTYPE, ten_gb
    overwrite(cats / "cats-000002.tar", 0, header.tobuf(tarfile.GNU_FORMAT))
    os.truncate(cats / "cats-000002.tar", ten_gb + 10_000)  # holes
    manifest = json.loads((cats / "manifest.json").read_text())
    manifest["shards"][2]["size_bytes"] = ten_gb  # so that it is not read through for its checksum
    (cats / "manifest.json").write_text(json.dumps(manifest))
    tracemalloc.start()
    try:
        problems = told(cats)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert any(key == "cat2" and "the index points outside the file" in problem for _, key, problem in problems)
    assert any(key == "cat3" and "the index points outside the file" in problem for _, key, problem in problems)
    assert any("a header that claims 10,737,418,240 bytes" in problem for _, _, problem in problems)
    assert any(key == "cat4" and "has changed since it was indexed" in problem for _, key, problem in problems)


def test_nothing_to_verify_against(cats: Path) -> None:
    (cats / "manifest.json").unlink()
    with pytest.raises(ShardError, match="without a manifest"):
        verify(cats)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["shards"][0].update(size_bytes=-1), r"shards\.0\.size_bytes"),
        (lambda m: m["shards"][0].update(num_samples=10**400), r"shards\.0\.num_samples"),
        (lambda m: m["shards"][0].update(file="../cats-000000.tar"), r"shards\.0\.file"),
        (lambda m: m["shards"][0].update(file="..\\cats.tar"), r"shards\.0\.file"),
        (lambda m: m["shards"][0].update(file="/etc/passwd"), r"shards\.0\.file"),
        (lambda m: m.update(shards="none"), "shards"),
        (lambda m: m.update(format="webdataset/9"), "unknown format"),
        (lambda m: m.update(more=1), "more"),
    ],
)
def test_a_manifest_that_is_none(cats: Path, change: Callable[[Any], None], says: str) -> None:
    edit(cats / "manifest.json", change)
    with pytest.raises(ShardError, match=says):
        verify(cats)


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe", b"[" * 100_000, b"null", b"{}"])
def test_a_manifest_of_rubbish(cats: Path, raw: bytes) -> None:
    (cats / "manifest.json").write_bytes(raw)
    with pytest.raises(ShardError, match="not a valid Manifest"):
        verify(cats)


@pytest.mark.parametrize("name", ["a\0.tar", "\n.tar", "[red].tar"])
def test_a_name_that_no_file_has(cats: Path, name: str) -> None:
    edit(cats / "manifest.json", lambda m: m["shards"][1].update(file=name))
    assert (name, "", "the tar is missing") in told(cats)
    with pytest.raises(ShardError, match="missing"):
        ShardSet.open(cats)


def test_numbers_that_are_not_the_shards(cats: Path) -> None:
    edit(cats / "manifest.json", lambda m: m["shards"][0].update(size_bytes=2**62, num_samples=2**62))
    assert any(shard == "cats-000000.tar" and problem.startswith("truncated") for shard, _, problem in told(cats))
    assert any("wrong number of samples" in problem for _, _, problem in told(cats))


def test_the_same_shard_named_twice_and_none_named(cats: Path) -> None:
    edit(cats / "manifest.json", lambda m: m["shards"].append(m["shards"][0]))
    assert ("manifest.json", "", "it names cats-000000.tar 2 times") in told(cats)
    edit(cats / "manifest.json", lambda m: m.update(shards=[], num_samples=0, num_captions=0))
    assert ("manifest.json", "", "no samples") in told(cats)


@pytest.mark.parametrize("span", [[2**62, 2**62], [0, 2**62], [2**63 - 1, 1], [10**6, 7]])
def test_an_index_that_leads_out_of_its_tar(cats: Path, span: list[int]) -> None:
    def change(index: Any) -> None:
        index["photos"][0] = index["texts"][1] = span

    edit(cats / "cats-000000.index.json", change)
    vouch_for(cats, 0)
    problems = [(key, problem) for shard, key, problem in told(cats) if shard == "cats-000000.tar"]
    assert {key for key, problem in problems if "points outside the file" in problem} == {"cat0", "cat1"}


@pytest.mark.parametrize("what", ["cats-000000.tar", "cats-000000.index.json", "skipped.jsonl"])
def test_a_folder_in_the_place_of_a_file(cats: Path, what: str) -> None:
    (cats / what).unlink()
    (cats / what).mkdir()
    assert any(what in (shard, problem) or what in problem for shard, _, problem in told(cats))


def test_a_tar_that_leads_backwards(cats: Path) -> None:
    """A member of negative size, over which Python's tarfile goes round for ever."""
    tar = cats / "cats-000000.tar"
    header = tarfile.TarInfo.frombuf(tar.read_bytes()[:512], "utf-8", "strict")
    header.size = -1024
    overwrite(tar, 0, header.tobuf(tarfile.GNU_FORMAT))
    vouch_for(cats, 0)
    assert any("a damaged header" in problem for _, _, problem in told(cats))


def test_damage_anywhere_is_a_problem_and_never_a_traceback(cats: Path, tmp_path: Path) -> None:
    dice = random.Random(1)
    for trial in range(60):
        folder = tmp_path / f"damaged{trial}"
        shutil.copytree(cats, folder)
        path = folder / dice.choice(["manifest.json", "cats-000001.index.json", "cats-000001.tar"])
        raw = bytearray(path.read_bytes())
        for _ in range(dice.randint(1, 8)):
            raw[dice.randrange(len(raw))] = dice.choice(b'\0\x80\xff09-.["{')
        path.write_bytes(raw)
        with suppress(ShardError, ValueError, KeyError, OSError, TypeError, IndexError):  # of a damaged manifest
            vouch_for(folder, 1)
        with suppress(ShardError):
            verify(folder)


def test_what_was_read_is_counted(cats: Path) -> None:
    sizes = [tar.stat().st_size for tar in sorted(cats.glob("*.tar"))]
    assert inspect(cats) == Verification(3, 6, sum(sizes), [])
    os.truncate(cats / "cats-000000.tar", 2_000)
    assert inspect(cats, processes=2).bytes_read == sum(sizes[1:])
