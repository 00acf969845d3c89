"""pytest tests/test_tarsamples.py: what of a tar becomes a sample, and what is left out and why."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_shardindex import Members, img2dataset, index, samples, write_tar
from test_shardwriter import picture
from test_stream import rank, whole

from pvtcap.config import Config
from pvtcap.shardindex import IndexOptions, index_tars
from pvtcap.shardset import ShardSet
from pvtcap.shardverify import verify
from pvtcap.stream import whole_batches
from pvtcap.tarsamples import MAX_TEXT_BYTES


def test_captions_from_everywhere(tmp_path: Path) -> None:
    photo = picture()
    texts: list[Members] = [
        [("txt", " a\ncat "), ("json", {"caption": "a cat"})],
        [("json", {"captions": ["one", "two", "one"], "caption": "three"})],
        [("json", {"caption": None, "text": "four"})],
        [("txt", "\ufeffé"), ("json", "[" * 100_000)],
        [("0.txt", "zero"), ("1.txt", "one"), ("json", b"\xff")],
    ]
    members: Members = []
    for number, parts in enumerate(texts):
        members += [(f"{number}.jpg", photo), *((f"{number}.{end}", content) for end, content in parts)]
    write_tar(tmp_path / "x.tar", members)
    assert index(tmp_path) == {}
    assert [sample.captions for sample in samples(tmp_path)] == [
        ("a cat",), ("one", "two"), ("four",), ("é",), ("zero", "one"),
    ]  # fmt: skip
    assert ShardSet.open(tmp_path).manifest.build["left_alone"] == {".json that is too large or damaged": 2}


def odd_sample(end: str, photo: bytes | None, *texts: tuple[str, bytes | str | dict[str, Any]]) -> Members:
    return [*([] if photo is None else [(f"odd.{end}", photo)]), *((f"odd.{kind}", text) for kind, text in texts)]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (odd_sample("jpg", picture()), "no caption"),
        (odd_sample("jpg", picture(), ("txt", " \n")), "no caption"),
        (odd_sample("jpg", picture(), ("json", {"caption": 7, "captions": [1]})), "no caption"),
        (odd_sample("jpg", picture(), ("json", "{")), "damaged text"),
        (odd_sample("jpg", picture(), ("json", "[" * 100_000)), "damaged text"),
        (odd_sample("jpg", picture(), ("txt", b"caf\xe9")), "text is not UTF-8"),
        (odd_sample("jpg", picture(), ("txt", b"x" * (MAX_TEXT_BYTES + 1))), "text too large"),
        (odd_sample("jpg", None, ("txt", "a cat")), "missing photo"),
        (odd_sample("jpg", b"", ("txt", "a cat")), "empty photo"),
        (odd_sample("jpg", b"GIF89a, it says", ("txt", "a cat")), "not a photo"),
        (odd_sample("webp", b"RIFF????WEBPVP8?" + bytes(20), ("txt", "a cat")), "damaged photo"),
        (odd_sample("jpg", picture(), ("png", picture()), ("txt", "a cat")), "several photos"),
        (odd_sample("jpg", picture(), ("jpg", picture()), ("txt", "a cat")), "duplicate member"),
        ([("0.jpg", picture()), ("0.txt", "another cat")], "duplicate key"),
        ([("/etc/odd.jpg", picture())], "name outside the folder"),
        ([("a/../../odd.jpg", picture())], "name outside the folder"),
        ([("odd\x1b[2J.jpg", picture())], "unprintable name"),
        ([("x" * 2000 + ".jpg", picture())], "name too long"),
    ],
)
def test_what_is_no_sample_is_left_out_by_name_and_reason(tmp_path: Path, members: Members, reason: str) -> None:
    good: Members = [("0.jpg", picture()), ("0.txt", "a cat"), ("1.jpg", picture()), ("1.txt", "the cat")]
    write_tar(tmp_path / "x.tar", good + members)
    assert index(tmp_path, max_skipped=0.5) == {reason: 1}
    [line] = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["key"].startswith("x/")
    assert [sample.key for sample in samples(tmp_path)] == ["0", "1"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_left_out(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in (("0.jpg", picture()), ("0.txt", b"a cat"), ("1.txt", b"a passwd")):
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
        header = tarfile.TarInfo("1.jpg")
        header.type, header.linkname = kind, "/etc/passwd"
        tar.addfile(header)
    assert index(tmp_path, max_skipped=0.7) == {"missing photo": 1, "not a plain file": 1}


def test_photos_that_only_decoding_finds_damaged(tmp_path: Path) -> None:
    members = img2dataset(0, 4)
    members[3] = (members[3][0], picture(300, 300)[:-900])
    write_tar(tmp_path / "x.tar", members)
    assert index_tars(tmp_path, tmp_path, IndexOptions()).examples == {}
    assert [problem.problem.split(":")[0] for problem in verify(tmp_path)] == ["truncated photo"]
    assert index(tmp_path, decode=True, max_skipped=0.5, overwrite=True) == {"truncated photo": 1}


def test_photos_too_large_to_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    for kind in ("JPEG", "PNG", "WEBP"):
        big = [("big.jpg", picture(101, 100, kind=kind)), ("big.txt", "a cat")]
        write_tar(tmp_path / kind / "x.tar", [*img2dataset(0, 3), *big])
        assert index(tmp_path / kind, max_skipped=0.5) == {"photo too large": 1}


@pytest.mark.parametrize(("kind", "options"), [
    ("WEBP", {}), ("WEBP", {"lossless": True}), ("WEBP", {"mode": "RGBA"}), ("PNG", {"mode": "P"}), ("JPEG", {}),
])  # fmt: skip
def test_every_kind_of_photo_has_its_size_and_comes_through_the_stream(
    tmp_path: Path, config: Config, kind: str, options: dict[str, Any]
) -> None:
    members: Members = []
    for number in range(8):
        photo = picture(33 + number, 57, kind=kind, **options)
        members += [(f"{number}.jpg", photo), (f"{number}.txt", "a cat")]  # whatever its name says
    write_tar(tmp_path / "x.tar", members)
    assert index(tmp_path) == {}
    assert [(sample.width, sample.height) for sample in samples(tmp_path)] == [(33 + n, 57) for n in range(8)]
    [batch] = whole_batches(*whole(tmp_path, config), 8, rank(0, 1), even=False)
    assert batch.photos.shape == (8, 3, 32, 32)
