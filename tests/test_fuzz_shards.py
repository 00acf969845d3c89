"""pytest tests/test_fuzz_shards.py: ShardSets and tars with random damage.

Whatever the bytes, opening, reading, verifying and indexing end in a PvtcapError, in reported problems, or in a right
result; never in another exception, and never in a sample that is not the one asked for. What is right, precisely:

* Through a manifest that is as it was, a sample that is read has the key of its place in the index, and stands behind
  that key's own tar header. Bytes that changed within a sample's own photo or text may be given as they are now
  (reading computes no checksum of them), but never another's; and ``verify`` reports every change of a tar, an index
  or a file of texts, down to a bit.
* Through an edited manifest or an index that somebody vouched for anew, what is read is a sample that is stored there.
* ``shards index`` of a damaged tar gives samples only whose photos and keys Python's tarfile finds there too.

FUZZ_EXAMPLES=20000 runs as many of each; without it, few and always the same ones.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_shardindex import Members, write_tar
from test_shardwriter import candidate, picture

from pvtcap import pixels
from pvtcap.errors import PvtcapError
from pvtcap.shardindex import IndexOptions, index_tars
from pvtcap.shardset import Sample, ShardReader, ShardSet
from pvtcap.shardverify import verify
from pvtcap.shardwriter import BuildOptions, build
from pvtcap.tarwalk import split_name

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
FUZZ = settings(
    max_examples=int(EXAMPLES or 800),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=5_000,  # ms: a hang, not a slow machine
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
KINDS = st.sampled_from(["ours", "foreign"])


@pytest.fixture(autouse=True, scope="module")
def _small_photos_only() -> Iterator[None]:
    """A flipped bit can make a photo of 80 megapixels, right but slow."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 100_000
    yield
    Image.MAX_IMAGE_PIXELS = limit


@lru_cache
def whole(kind: str) -> dict[str, bytes]:
    """The files of a whole ShardSet: pvtcap's own, or one of tars that share keys."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cats"
        if kind == "ours":
            photos = [candidate(n, picture(9 + n, 8)) for n in range(3)]
            build([*photos, candidate(9, b"")], folder, BuildOptions(samples_per_shard=2, max_skipped=0.5), {})
        else:
            for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
                write_tar(folder / f"{number}.tar", members(number), form)
            index_tars(folder, folder, IndexOptions(max_skipped=0.5))
        assert verify(folder) == []
        return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def members(number: int) -> Members:
    long = "d/" * 60 + "e"  # needs a header of its own
    return [
        ("0.jpg", picture(8 + number, 9)), ("0.txt", f"cat {number}"), ("0.cls", "7"),
        ("1.png", picture(9, 9 + number, kind="PNG")), ("1.json", {"captions": ["a cat", f"the cat {number}"]}),
        (f"{long}.webp", picture(7, 8 + number, kind="WEBP")), (f"{long}.txt", "a cat far down"),
        ("no.txt", "photo"),
    ]  # fmt: skip


@contextmanager
def folder_of(content: dict[str, bytes]) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)) / "cats"
    folder.mkdir()
    try:
        for name, raw in content.items():
            (folder / name).write_bytes(raw)
        yield folder
    finally:
        shutil.rmtree(folder.parent)


def everything(folder: Path) -> dict[tuple[int, int], Sample]:
    """All samples that can be read, by place."""
    found: dict[tuple[int, int], Sample] = {}
    with suppress(PvtcapError):
        shardset = ShardSet.open(folder)
        with suppress(PvtcapError):
            list(shardset.keys())
        with ShardReader(shardset) as reader:
            for shard, size in enumerate(shardset.sizes):
                for number in range(min(size, 5)):
                    with suppress(PvtcapError):
                        found[shard, number] = reader.read(shard, number)
                    with suppress(PvtcapError):
                        reader.read_text(shard, number)
    for sample in found.values():
        with suppress(PvtcapError):
            pixels.decode(sample.photo, sample.key)
    return found


@lru_cache
def originals(kind: str) -> dict[tuple[int, int], Sample]:
    with folder_of(whole(kind)) as folder:
        return everything(folder)


def checked(folder: Path) -> int:
    """How many problems verify reports; a manifest that cannot be read is one."""
    try:
        return len(verify(folder))
    except PvtcapError:
        return 1


@st.composite
def damages(draw: st.DrawFn, raw: bytes) -> bytes:
    """The bytes with a few edits; most of them near headers, where they matter."""
    content, edited = bytearray(raw), set[int]()
    for _ in range(draw(st.integers(1, 3))):
        size = len(content)
        place = draw(st.integers(0, max(size - 1, 0)))
        if draw(st.booleans()):
            fields = [0, 1, 2, 99, 100, 124, 132, 133, 134, 135, 148, 155, 156, 157, 257, 329, 345, 482]
            place = place // 512 * 512 + draw(st.sampled_from(fields))
        place = min(place, max(size - 1, 0))
        edited.add(place // 512 * 512)
        match draw(st.sampled_from(["flip", "set", "kind", "overwrite", "insert", "delete", "cut"])):
            case "flip" if size:
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "set" if size:
                content[place] = draw(st.sampled_from([0, 0x20, 0x2E, 0x2F, 0x30, 0x37, 0x7F, 0x80, 0xFF]))
            case "kind" if size >= place // 512 * 512 + 512:
                content[place // 512 * 512 + 156] = draw(st.sampled_from(list(b"\x000123456789xXgLKSVMD")))
            case "overwrite":
                new = draw(st.binary(min_size=1, max_size=12))
                content[place : place + len(new)] = new
            case "insert":
                content[place:place] = draw(st.binary(min_size=1, max_size=600))
            case "delete":
                del content[place : place + draw(st.sampled_from([1, 7, 512, 1024]))]
            case "cut":
                del content[place:]
    if draw(st.booleans()):
        # Headers get their right sum, so that what they say is believed.
        for start in edited:
            header = bytes(content[start : start + 512])
            if len(header) == 512 and header[257:262] == b"ustar":
                content[start + 148 : start + 156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    return bytes(content)


DEEP = "DEEP"
ODD: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 10**30, 1.5, float("nan"), float("inf"), "", "x", "../x.tar", "x.tar", "a\0.tar",
    "n" * 300 + ".tar", "é\n", "\ud800", [], {}, [[]], [[0, 0]], [[512, 2**62]], [1, 2], {"a": 1}, DEEP,
]  # fmt: skip


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, child in children:
        yield from places(child, (*at, name))


@st.composite
def edits(draw: st.DrawFn, raw: bytes) -> bytes:
    """JSON with a value replaced, removed, doubled or moved, or with a key twice."""
    tree = [json.loads(raw)]
    *path, last = draw(st.sampled_from(list(places(tree))[1:]))
    parent: Any = tree
    for name in path:
        parent = parent[name]
    match draw(st.sampled_from(["odd", "odd", "remove", "double", "reverse", "more"])):
        case "odd":
            parent[last] = draw(st.sampled_from(ODD))
        case "remove" if path:
            del parent[last]
        case "double" if path and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
        case "reverse" if isinstance(parent[last], list):
            parent[last].reverse()
        case "more" if isinstance(parent[last], int | str) and parent[last] is not True:
            parent[last] += draw(st.sampled_from([1, -1, 512, 2**40])) if isinstance(parent[last], int) else "x"
    text = json.dumps(tree[0] if tree else None)
    text = text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    if draw(st.integers(0, 9)) == 0 and isinstance(tree and tree[0], dict) and tree[0]:
        text = (
            "{"
            + f"{json.dumps(draw(st.sampled_from(list(tree[0]))))}: {json.dumps(draw(st.sampled_from(ODD)))},"
            + text[1:]
        )
    return text.encode()


def vouched(content: dict[str, bytes]) -> dict[str, bytes]:
    """The files with a manifest that knows their checksums and sizes."""
    manifest = json.loads(content["manifest.json"])
    for entry in manifest["shards"]:
        stem = entry["file"].removesuffix(".tar")
        entry["sha256"] = hashlib.sha256(content[entry["file"]]).hexdigest()
        entry["size_bytes"] = len(content[entry["file"]])
        entry["index_sha256"] = hashlib.sha256(content[f"{stem}.index.json"]).hexdigest()
        if "foreign" in entry:
            texts = content[f"{stem}.texts.jsonl"]
            entry["foreign"] |= {"texts_sha256": hashlib.sha256(texts).hexdigest(), "texts_size_bytes": len(texts)}
    return {**content, "manifest.json": json.dumps(manifest).encode()}


@FUZZ
@given(st.data(), KINDS)
def test_any_file_damaged_below_a_manifest_that_is_whole(data: st.DataObject, kind: str) -> None:
    content = dict(whole(kind))
    name = data.draw(
        st.sampled_from([name for name in content if name.endswith((".tar", ".index.json", ".texts.jsonl"))])
    )
    before, after = content[name], data.draw(damages(content[name]))
    content[name] = after
    with folder_of(content) as folder:
        found = everything(folder)
        assert (checked(folder) > 0) == (before != after)
    changed = {n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b}
    shards = json.loads(content["manifest.json"])["shards"]
    stem, in_texts = name.split(".")[0], name.endswith(".texts.jsonl")
    for (shard, number), sample in found.items():
        wanted = originals(kind)[shard, number]
        if shards[shard]["file"] != f"{stem}.tar" or before == after:
            assert sample == wanted
            continue
        assert not name.endswith(".index.json")
        assert len(before) == len(after)
        assert sample.key == wanted.key
        index = json.loads(content[f"{stem}.index.json"])
        photo, text = ({*range(o, o + s)} & changed for o, s in (index[what][number] for what in ("photos", "texts")))
        if in_texts or not photo:
            assert sample.photo == wanted.photo
        if (kind == "foreign" and not in_texts) or not text:
            assert (sample.captions, sample.image_id) == (wanted.captions, wanted.image_id)


@FUZZ
@given(st.data(), KINDS)
def test_an_edited_manifest(data: st.DataObject, kind: str) -> None:
    content = dict(whole(kind))
    raw = content["manifest.json"]
    content["manifest.json"] = data.draw(st.one_of(edits(raw), damages(raw)))
    with folder_of(content) as folder:
        found = everything(folder)
        checked(folder)
    stored = {(sample.photo, sample.captions) for sample in originals(kind).values()}
    assert all((sample.photo, sample.captions) in stored for sample in found.values())


@FUZZ
@given(st.data(), KINDS)
def test_an_edited_index_that_is_vouched_for(data: st.DataObject, kind: str) -> None:
    content = dict(whole(kind))
    name = data.draw(st.sampled_from([name for name in content if name.endswith((".index.json", "skipped.jsonl"))]))
    content[name] = data.draw(edits(content[name].splitlines()[0] if name.endswith("l") else content[name]))
    with folder_of(vouched(content)) as folder:
        found = everything(folder)
        checked(folder)
    stored = {(sample.key, sample.photo, sample.captions) for sample in originals(kind).values()}
    assert all((sample.key, sample.photo, sample.captions) in stored for sample in found.values())


@FUZZ
@given(st.data(), KINDS)
def test_damaged_tars_and_texts_that_are_vouched_for(data: st.DataObject, kind: str) -> None:
    content = dict(whole(kind))
    name = data.draw(st.sampled_from([name for name in content if name.endswith((".tar", ".texts.jsonl"))]))
    content[name] = data.draw(damages(content[name]))
    with folder_of(vouched(content)) as folder:
        for place, sample in everything(folder).items():
            assert sample.key == originals(kind)[place].key
        checked(folder)


@FUZZ
@given(st.data(), st.booleans())
def test_indexing_damaged_tars(data: st.DataObject, decode: bool) -> None:
    content = {name: raw for name, raw in whole("foreign").items() if name.endswith(".tar")}
    name = data.draw(st.sampled_from(sorted(content)))
    content[name] = data.draw(damages(content[name]))
    with folder_of(content) as folder:
        try:
            index_tars(folder, folder, IndexOptions(max_skipped=1.0, decode=decode))
        except PvtcapError:
            assert sorted(file.name for file in folder.iterdir()) == sorted(content)
            return
        shardset, found = ShardSet.open(folder), everything(folder)
        assert len(found) == shardset.num_samples
        problems = verify(folder)
        # Without decoding, damaged photos are left for verify to find; nothing else is.
        assert not (decode and problems), problems
        assert {problem.key for problem in problems} <= set(shardset.keys())
        for (shard, _), sample in found.items():
            entry = shardset.manifest.shards[shard]
            assert entry.foreign is not None
            tar_key = sample.key.removeprefix(entry.foreign.key_prefix)
            assert (tar_key, sample.photo) in by_tarfile(content[entry.file])


def by_tarfile(raw: bytes) -> set[tuple[str, bytes]]:
    found = set()
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        for member in tar:
            if member.isreg() and (named := split_name(member.name)):
                file = tar.extractfile(member)
                assert file is not None
                found.add((named[0], file.read()))
    return found
