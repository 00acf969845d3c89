"""pytest tests/test_readahead.py: shards fetched before they are needed, from a real server."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import build_shapes
from remotesets import QUICK
from shardserver import ShardServer

from pvtcap.errors import ShardError
from pvtcap.readahead import ReadAhead
from pvtcap.shardcache import ShardCache
from pvtcap.shardset import ShardReader, ShardSet


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight shards of the same size."""
    return build_shapes(tmp_path_factory.mktemp("shards") / "train", "train", 32, 4)


@pytest.fixture
def server(shards: Path) -> Iterator[ShardServer]:
    with ShardServer(shards) as running:
        yield running


def opened(server: ShardServer, folder: Path, max_bytes: int = 10_000_000, wait_s: float = 0.0) -> ShardSet:
    return ShardSet.open(server.url, ShardCache(folder, max_bytes, wait_s, QUICK))


def fetched(server: ShardServer) -> list[int]:
    """The shards in the order in which they were asked for."""
    return [int(name[-10:-4]) for name in server.asked if name.endswith(".tar")]


def tars(shardset: ShardSet) -> set[int]:
    return {int(path.name[-10:-4]) for path in shardset.path.glob("*.tar")}


def until(condition: Callable[[], object]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def test_it_fetches_in_order_and_stays_within_its_bound(server: ShardServer, tmp_path: Path) -> None:
    shardset = opened(server, tmp_path)
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    asked: list[int] = []

    def needs() -> Iterator[tuple[int, int]]:
        for at, shard in enumerate(itertools.cycle(order)):
            asked.append(at)
            yield at, shard

    size = shardset.manifest.shards[0].size_bytes
    with ReadAhead(shardset, needs(), max_bytes=3 * size) as ahead:
        for reached in range(-1, 7):
            ahead.reached(reached)
            until(lambda last=reached + 4: len(asked) > last)  # type: ignore[misc]
            assert len(asked) == reached + 5  # three are there, and the next waits
            assert tars(shardset) == set(order[: reached + 4])
    assert fetched(server) == order
    until(lambda: not ahead._thread.is_alive())


def test_what_it_has_fetched_stays_until_its_step(server: ShardServer, tmp_path: Path) -> None:
    small = sum(path.stat().st_size for path in server.folder.iterdir() if path.suffix != ".tar")
    sizes = [entry.size_bytes for entry in ShardSet.open(server.folder).manifest.shards]
    shardset = opened(server, tmp_path, 4 * max(sizes) + small)
    with ReadAhead(shardset, [(10, 0), (11, 1), (12, 2)], max_bytes=10_000_000) as ahead:
        until(lambda: tars(shardset) == {0, 1, 2})
        until(lambda: len(ahead._ahead) == 3)
        with ShardReader(shardset, max_open=1) as reader:
            for shard in range(3, 8):
                reader.read(shard, 0)
            assert {0, 1, 2} < tars(shardset)
            ahead.reached(11)
            for shard in range(3, 8):
                reader.read(shard, 0)
        assert 2 in tars(shardset)
        assert not {0, 1} & tars(shardset)


def test_without_room_it_waits_and_does_not_hold_up_who_needs_the_shard(server: ShardServer, tmp_path: Path) -> None:
    entries = ShardSet.open(server.folder).manifest.shards
    small = sum((server.folder / name).stat().st_size for name in ("manifest.json", entries[2].index_file))
    shardset = opened(server, tmp_path, small + sum(entry.size_bytes for entry in entries[:3]) - 1, 120.0)
    entries = shardset.manifest.shards
    held = [shardset.open_file(entries[shard].tar) for shard in (0, 1)]
    with ReadAhead(shardset, [(5, 2)], max_bytes=10_000_000) as ahead:
        until(lambda: (shardset.path / entries[2].index_file).exists())
        ahead.reached(1)
        assert tars(shardset) == {0, 1}
        os.close(held.pop())
        with ShardReader(shardset) as reader:
            reader.read(2, 0)  # itself, or what the thread has fetched
        assert 2 in tars(shardset)
    os.close(held.pop())


def test_an_error_is_raised_at_the_next_look(server: ShardServer, tmp_path: Path) -> None:
    shardset = opened(server, tmp_path)
    server.faults[shardset.manifest.shards[1].file] = itertools.repeat("403")
    with ReadAhead(shardset, [(0, 0), (1, 1), (2, 2)], max_bytes=10_000_000) as ahead:
        until(lambda: not ahead._thread.is_alive())
        assert tars(shardset) == {0}
        for _ in range(2):
            with pytest.raises(ShardError, match=r"train-000001\.tar: cannot be fetched: access refused: HTTP 403"):
                ahead.reached(0)


def test_it_is_closed_in_mid_download(server: ShardServer, tmp_path: Path) -> None:
    shardset = opened(server, tmp_path)
    server.faults[shardset.manifest.shards[0].file] = iter(["hold"])
    with ReadAhead(shardset, [(0, 0)], max_bytes=10_000_000) as ahead:
        assert server.half_sent.wait(60)
        ahead._closed = True
        server.go.set()
    until(lambda: not ahead._thread.is_alive())
    assert tars(shardset) <= {0}
    assert not list(shardset.path.glob("*.partial"))


def test_a_folder_needs_none(shards: Path) -> None:
    def none() -> Iterator[tuple[int, int]]:
        raise AssertionError("asked for")
        yield

    with ReadAhead(ShardSet.open(shards), none(), max_bytes=1) as ahead:
        ahead.reached(5)
