"""ShardSets and files that tests serve from somewhere, and fetch."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from conftest import build_shapes
from test_shardindex import img2dataset, index, write_tar

from pvtcap.remote import Retries, fetch
from pvtcap.shardset import Sample, ShardReader, ShardSet

QUICK = Retries(tries=3, first_wait_s=0.01, max_wait_s=0.05)


def write_files(path: Path) -> Path:
    """A file of 3 MB, and a small one."""
    (path / "big").write_bytes(random.Random(0).randbytes(3_000_000))
    (path / "small").write_bytes(b"small")
    return path


def write_sets(root: Path) -> dict[str, Path]:
    """A ShardSet of ours, and a foreign one whose tars share keys; five shards each."""
    for number in range(5):
        write_tar(root / f"foreign/{number}.tar", img2dataset(0, 3 + number))
    index(root / "foreign")
    return {"ours": build_shapes(root / "ours", "train", 23, 5), "foreign": root / "foreign"}


def get(url: str, raw: bytes, size_bytes: int | None = None) -> bytes:
    """Fetch what should be ``raw``."""
    found = bytearray(len(raw))

    def store(offset: int, block: bytes) -> None:
        found[offset : offset + len(block)] = block

    size = len(raw) if size_bytes is None else size_bytes
    fetch(url, store, size_bytes=size, sha256=hashlib.sha256(raw).hexdigest(), retries=QUICK)
    return bytes(found)


def read_all(shardset: ShardSet, seed: int) -> dict[tuple[int, int], Sample]:
    """All samples, read in an order of chance by a reader that keeps two shards open."""
    places = [(shard, number) for shard, size in enumerate(shardset.sizes) for number in range(size)]
    random.Random(seed).shuffle(places)
    with ShardReader(shardset, max_open=2) as reader:
        return {place: reader.read(*place) for place in places}
