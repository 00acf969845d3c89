"""pytest tests/test_tarwalk.py: what tarfile sees, where it can be trusted, and refusals where it cannot."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pvtcap.errors import ShardError
from pvtcap.tarwalk import Content, Member, open_tar, split_name, walk_tar

TEN_GB = 10 << 30


def walked(path: Path) -> list[Member]:
    descriptor = open_tar(path)
    try:
        return list(walk_tar(descriptor, path))
    finally:
        os.close(descriptor)


def by_tarfile(path: Path) -> list[tuple[str, bool, int, int]]:
    with tarfile.open(path, "r:") as tar:
        return [(m.name, m.isreg() and not m.issparse(), m.offset_data, m.size) for m in tar]


def same_as_tarfile(path: Path) -> list[Member]:
    members = walked(path)
    assert [(m.name.rstrip("/"), m.kind == "file", m.offset, m.size) for m in members] == by_tarfile(path)
    return members


def block(name: bytes, kind: bytes = b"0", size: int = 0, **fields: bytes) -> bytes:
    """A header by hand, its sum right, for what tarfile would not write."""
    header = tarfile.TarInfo("x")
    raw = bytearray(header.tobuf(tarfile.USTAR_FORMAT))
    raw[:100] = name.ljust(100, b"\0")
    raw[156:157] = kind
    raw[124:136] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    for place, content in fields.items():
        start = int(place.removeprefix("at"))
        raw[start : start + len(content)] = content
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def pax(**records: str) -> bytes:
    payload = b""
    for keyword, value in records.items():
        body = f" {keyword.replace('__', '.')}={value}\n".encode()
        length = len(body) + next(n for n in range(1, 9) if len(str(len(body) + n)) == n)
        payload += str(length).encode() + body
    return block(b"pax", b"x", len(payload)) + payload.ljust(-(-len(payload) // 512) * 512, b"\0")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_members_that_tarfile_sees(tmp_path: Path, form: int) -> None:
    draw = random.Random(form)
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for number in range(300):
            name = "/".join(draw.choice(("a", "é", "long" * 9, "x.y")) for _ in range(draw.randrange(1, 5)))
            header = tarfile.TarInfo(f"{name}/{number}.jpg")
            header.type = draw.choice([tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
            header.linkname = "far/" * draw.choice((0, 1, 20 if form == tarfile.USTAR_FORMAT else 60))
            header.mtime = draw.choice((7, 7.5))
            header.size = draw.randrange(2000) if header.isreg() else 0
            tar.addfile(header, io.BytesIO(bytes(header.size)))
    assert len(same_as_tarfile(path)) == 300


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar command")
@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_what_the_tar_command_writes(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.jpg", "deep/b.txt", "n" * 60 + ".jpg"):
        (folder / name).write_text(name)
    (folder / "link.jpg").symlink_to("a.jpg")
    os.link(folder / "a.jpg", folder / "hard.jpg")
    os.mkfifo(folder / "fifo.jpg")
    with (folder / "holes.jpg").open("wb") as file:
        for place in range(0, 100 << 20, 1 << 20):  # more pieces than fit into one header
            file.seek(place)
            file.write(b"x")
    options = [] if form in ("v7", "ustar") else ["--sparse"]
    leave_out = ["--exclude=fifo.jpg", "--exclude=holes.jpg"] if form == "v7" else []
    command = ["tar", f"--format={form}", *options, *leave_out, "-cf", str(tmp_path / "x.tar"), "-C", str(folder), "."]
    subprocess.run(command, check=True, capture_output=True)
    kinds = {member.name: member.kind for member in walked(tmp_path / "x.tar")}
    assert kinds["./deep/b.txt"] == kinds["./" + "n" * 60 + ".jpg"] == "file"
    assert "symbolic link" in kinds.values()
    assert "hard link" in kinds.values()
    assert ("sparse file" in kinds.values()) == bool(options)
    if not options:
        same_as_tarfile(tmp_path / "x.tar")


def test_signed_sums_and_folders_of_old(tmp_path: Path) -> None:
    header = bytearray(block("é.jpg".encode(), b"\0", 3))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in header)
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(header) + b"cat".ljust(512, b"\0") + block(b"old/", b"\0") + bytes(1024))
    assert [member.kind for member in same_as_tarfile(path)] == ["file", "folder"]


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


GOOD = block(b"a.txt", size=3) + b"cat".ljust(512, b"\0")
END = bytes(1024)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (block(b"x", b"x", TEN_GB), "a header that claims 10,737,418,240 bytes"),
        (block(b"x", b"L", TEN_GB), "a header that claims 10,737,418,240 bytes"),
        (block(b"x", b"K", TEN_GB), "a header that claims"),
        (block(b"x", b"g", 2 << 20), "a header that claims"),
        (block(b"a.jpg", size=100 * TEN_GB), "cut off: a member of 1,073,741,824,000 bytes"),
        (block(b"a.jpg", size=2**80), "cut off"),
        (pax(size=str(100 * TEN_GB)) + block(b"a.jpg"), "cut off"),
        (pax(size="-1") + block(b"a.jpg"), "a damaged PAX header"),
        (pax(size="1" * 50) + block(b"a.jpg"), "a damaged PAX header"),
        (pax(path="a") + pax(path="b") + block(b"a.jpg"), "two names or sizes"),
        (pax(path="a") + block(b"x", b"L", 3) + b"b.c".ljust(512, b"\0") + block(b"a.jpg"), "two names or sizes"),
        (pax(path="a") + END, "a header without its member"),
        (pax(mtime="1.5") + END, "a header without its member"),
        (block(b"p", b"x", 9) + b"99 path=x".ljust(512, b"\0"), "a damaged PAX header"),
        (block(b"p", b"x", 9) + b"nonsense!".ljust(512, b"\0"), "a damaged PAX header"),
        (block(b"p", b"g", 10) + b"10 path=x\n".ljust(512, b"\0"), "gives all members one name"),
        (block(b"a.jpg", at124=b"-0000000001\0"), "a damaged header"),
        (block(b"a.jpg", at124=b"\xff" * 12), "a damaged header"),
        (block(b"a.jpg", b"S", at482=b"\1") + b"\1" * 512, "cut off"),
    ],
)
def test_headers_that_lie(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(GOOD + content)
    if "claims" in says:
        os.truncate(path, 2 * TEN_GB)  # holes: the bytes are there to be read, and take no disk
    with little_memory(), pytest.raises(ShardError, match=f"not a readable tar: .*{says}") as caught:
        walked(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_content_is_not_read_and_headers_do_not_add_up(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        file.write(block(b"a.jpg", size=TEN_GB))
        file.seek(TEN_GB, os.SEEK_CUR)
        for number in range(300):  # any number of headers before one member, each of other words
            file.write(pax(**{f"word{number}": "x" * 100_000}))
        file.write(block(b"b.jpg") + END)
    with little_memory():
        first, second = walked(path)
        descriptor = open_tar(path)
        content = Content(descriptor, first)
        content.seek(-3, os.SEEK_END)
        assert (content.read(99), content.read(), content.tell()) == (bytes(3), b"", TEN_GB)
        os.close(descriptor)
    assert (first.size, second.name) == (TEN_GB, "b.jpg")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("0.jpg", ("0", "jpg")), ("a.b/c.D.JPG", ("a.b/c", "d.jpg")), ("./x.txt", ("./x", "txt")), ("README", None),
        (".hidden", None), ("a.b/README", None), ("", None), ("x.", ("x", "")),
    ],
)  # fmt: skip
def test_keys_are_webdatasets(name: str, split: tuple[str, str] | None) -> None:
    from webdataset.tariterators import base_plus_ext

    key, suffix = base_plus_ext(name)
    assert split_name(name) == split == (None if key is None else (key, suffix.lower()))
