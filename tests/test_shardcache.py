"""pytest tests/test_shardcache.py: several processes and one cache, kills, limits, a full disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from remotesets import QUICK
from shardserver import ShardServer
from test_full_disk import make_room, small

from pvtcap import filelock, shardcache
from pvtcap.errors import ShardError
from pvtcap.shardcache import Mirror, NoRoom, ShardCache, default_folder
from pvtcap.shardfiles import file_size, sha256_file
from pvtcap.shardformat import ShardFile

__all__ = ["small"]  # the fixture

SIZE = 100_000  # of a file
# words: CACHE MAX_BYTES MIRROR URL FILES(json) SEED COUNT: hold files of chance, one or two at a time, and check them.
READERS = """
import hashlib, json, os, random, sys
from pathlib import Path
from pvtcap.remote import Retries
from pvtcap.shardcache import Mirror, ShardCache
from pvtcap.shardformat import ShardFile
folder, limit, path, url, files, seed, count = sys.argv[1:]
mirror = Mirror(ShardCache(Path(folder), int(limit), 120.0, Retries(5, 0.01, 0.1)), url, Path(path))
files = [ShardFile(*file) for file in json.loads(files)]
chance = random.Random(int(seed))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(count)):
    file = chance.choice(files)
    descriptor = mirror.hold(file)
    raw = os.pread(descriptor, file.size_bytes + 1, 0)
    assert hashlib.sha256(raw).hexdigest() == file.sha256, file
    assert (mirror.path / file.name).stat().st_ino == os.fstat(descriptor).st_ino
    os.close(descriptor)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight files of 100 kB, and a manifest of nothing: the cache does not read it."""
    folder = tmp_path_factory.mktemp("served")
    for number in range(8):
        (folder / f"{number}.tar").write_bytes(random.Random(number).randbytes(SIZE))
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def server(served: Path) -> Iterator[ShardServer]:
    with ShardServer(served) as running:
        yield running


@pytest.fixture
def files(served: Path) -> list[ShardFile]:
    return [ShardFile(f"{number}.tar", SIZE, sha256_file(served / f"{number}.tar")) for number in range(8)]


def mirror_at(server: ShardServer, folder: Path, room_for: float, wait_s: float = 0.0) -> Mirror:
    return Mirror.open(server.url, ShardCache(folder, int(room_for * SIZE) + 2, wait_s, QUICK))


def reader(mirror: Mirror, files: list[ShardFile], seed: int = 0, count: int = 1) -> subprocess.Popen[str]:
    words = [mirror.cache.folder, mirror.cache.max_bytes, mirror.path, mirror.url, json.dumps(files), seed, count]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", READERS, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def ended(*processes: subprocess.Popen[str]) -> list[int]:
    codes = []
    for process in processes:
        process.communicate(timeout=300)
        codes.append(process.returncode)
    return codes


def names(mirror: Mirror) -> set[str]:
    return {path.name for path in mirror.path.iterdir()} - {"manifest.json"}


def used_bytes(mirror: Mirror) -> int:
    return sum(size for path in mirror.path.iterdir() if (size := file_size(path)) is not None)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to that")


def test_what_two_processes_want_is_fetched_once(server: ShardServer, files: list[ShardFile], tmp_path: Path) -> None:
    mirror = mirror_at(server, tmp_path / "cache", 8)
    server.faults["0.tar"] = iter(["hold"])
    readers = [reader(mirror, files[:1]) for _ in range(3)]
    go(*readers)
    assert server.half_sent.wait(120)
    assert names(mirror) == {"0.tar.lock", "0.tar.partial"}
    server.go.set()
    assert ended(*readers) == [0, 0, 0]
    assert server.asked["0.tar"] == [""]
    assert names(mirror) == {"0.tar"}


@pytest.mark.parametrize("after", ["the same file", "others", "opening"])
def test_a_killed_download_is_made_good(
    server: ShardServer, files: list[ShardFile], tmp_path: Path, after: str
) -> None:
    mirror = mirror_at(server, tmp_path / "cache", 2)
    server.faults["0.tar"] = iter(["hold"])
    killed = reader(mirror, files[:1])
    go(killed)
    assert server.half_sent.wait(120)
    killed.send_signal(signal.SIGKILL)
    assert ended(killed) == [-signal.SIGKILL]
    assert names(mirror) == {"0.tar.lock", "0.tar.partial"}
    if after == "opening":
        mirror_at(server, tmp_path / "cache", 2)
    wanted = {"the same file": files[:1], "others": files[1:3], "opening": []}[after]
    for file in wanted:
        os.close(mirror.hold(file))
        assert sha256_file(mirror.path / file.name) == file.sha256
    assert names(mirror) == {file.name for file in wanted}


def test_the_limit_holds_while_many_read(server: ShardServer, files: list[ShardFile], tmp_path: Path) -> None:
    mirror = mirror_at(server, tmp_path / "cache", 3)
    readers = [reader(mirror, files, seed, 40) for seed in range(4)]
    go(*readers)
    most = 0
    while any(process.poll() is None for process in readers):
        with filelock.locked(mirror.cache.folder / shardcache.LEDGER):
            most = max(most, used_bytes(mirror))
        time.sleep(0.01)
    assert ended(*readers) == [0, 0, 0, 0]
    assert 2 * SIZE < most <= mirror.cache.max_bytes
    assert not any(name.endswith((".lock", ".partial")) for name in names(mirror))


def test_the_least_recently_used_goes_first(server: ShardServer, files: list[ShardFile], tmp_path: Path) -> None:
    mirror = mirror_at(server, tmp_path / "cache", 3)
    for number in (0, 1, 2, 0, 3):
        os.close(mirror.hold(files[number]))
    assert names(mirror) == {"0.tar", "2.tar", "3.tar"}
    held = mirror.hold(files[2])
    for number in (4, 5, 6):
        os.close(mirror.hold(files[number]))
    assert "2.tar" in names(mirror)
    os.close(held)
    assert len(server.asked["0.tar"]) == 1


def test_no_room_is_one_line_that_names_what_to_change(
    server: ShardServer, files: list[ShardFile], tmp_path: Path
) -> None:
    mirror = mirror_at(server, tmp_path / "cache", 2)
    held = [mirror.hold(file) for file in files[:2]]
    says = r"no room .* got 2 files of 0.0002 GB in use \((0.tar, 1.tar|1.tar, 0.tar)\); wanted 0.0001 GB more"
    with pytest.raises(NoRoom, match=says) as raised:
        mirror.hold(files[2])
    for key in ("data.cache_gb", "data.lanes", "data.shuffle_window_shards"):
        assert key in str(raised.value)
    assert names(mirror) == {"0.tar", "1.tar"}
    waiting = reader(
        Mirror(ShardCache(mirror.cache.folder, mirror.cache.max_bytes, 300), mirror.url, mirror.path), files[2:3]
    )
    go(waiting)
    until(lambda: "2.tar.lock" in names(mirror))
    os.close(held.pop())
    assert ended(waiting) == [0]
    assert names(mirror) == {"0.tar", "2.tar"}
    os.close(held.pop())
    with pytest.raises(ShardError, match=r"larger than the whole cache; got .*Raise data\.cache_gb"):
        Mirror(ShardCache(mirror.cache.folder, SIZE - 1), mirror.url, mirror.path).hold(files[3])


def test_a_file_that_is_evicted_while_it_is_opened_is_fetched_again(
    server: ShardServer, files: list[ShardFile], tmp_path: Path
) -> None:
    mirror = mirror_at(server, tmp_path / "cache", 8)
    errors: list[BaseException] = []
    stop = threading.Event()

    def evict() -> None:
        while not stop.is_set():
            for file in files[:2]:
                filelock.unlink_unused(mirror.path / file.name)

    def read(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(2000):
                if len(server.asked["0.tar"]) > 8:  # evicted often enough
                    break
                file = chance.choice(files[:2])
                descriptor = mirror.hold(file)
                assert (mirror.path / file.name).stat().st_ino == os.fstat(descriptor).st_ino
                assert os.fstat(descriptor).st_size == SIZE
                os.close(descriptor)
        except BaseException as error:
            errors.append(error)
            raise

    evictor = threading.Thread(target=evict)
    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in (evictor, *readers):
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    evictor.join()
    assert errors == []


def test_a_damaged_ledger_or_file_is_put_right(server: ShardServer, files: list[ShardFile], tmp_path: Path) -> None:
    mirror = mirror_at(server, tmp_path / "cache", 3)
    for number, ledger in enumerate(("", "nonsense", "99999999999999", "0")):
        (mirror.cache.folder / shardcache.LEDGER).write_text(ledger)
        os.close(mirror.hold(files[number]))
    os.truncate(mirror.path / "3.tar", 5)
    os.close(mirror.hold(files[3]))
    assert sha256_file(mirror.path / "3.tar") == files[3].sha256


def test_a_failed_fetch_leaves_nothing(server: ShardServer, files: list[ShardFile], tmp_path: Path) -> None:
    mirror = mirror_at(server, tmp_path / "cache", 8)
    for fault in (["404"], ["flip", "flip"], ["cut", "403"]):
        server.faults["0.tar"] = iter(fault)
        with pytest.raises(ShardError):
            mirror.hold(files[0])
        assert names(mirror) == set()

    def stop() -> None:
        if server.asked["1.tar"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mirror.hold(files[1], watch=stop)
    assert names(mirror) == set()


def test_a_full_disk_is_one_line_and_the_other_shards_stay(
    server: ShardServer, files: list[ShardFile], small: Path
) -> None:
    mirror = mirror_at(server, small / "cache", 8)  # of files, on a disk for fewer than four
    held = [mirror.hold(file) for file in files[:3]]
    asked = len(server.asked["3.tar"])
    with pytest.raises(ShardError, match=r"no space left on the disk of the cache\. Make room, set data\.cache_gb"):
        mirror.hold(files[3])
    assert len(server.asked["3.tar"]) == asked  # it was seen before
    assert names(mirror) == {"0.tar", "1.tar", "2.tar"}
    for file in files[:3]:
        assert sha256_file(mirror.path / file.name) == file.sha256
    make_room(small)
    held += [mirror.hold(files[3])]
    for descriptor in held:
        os.close(descriptor)
    assert sha256_file(mirror.path / "3.tar") == files[3].sha256


def test_a_folder_that_cannot_be_used_is_one_line(server: ShardServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match=r"cannot use the cache: (File exists|Not a directory)\. Set data\.cache_dir"):
        mirror_at(server, tmp_path / "file", 8)


def test_nothing_else_is_ever_removed(server: ShardServer, files: list[ShardFile], tmp_path: Path) -> None:
    shutil.copytree(server.folder, tmp_path / "cache" / "mine")
    mirror = mirror_at(server, tmp_path / "cache", 1)
    for file in files:
        os.close(mirror.hold(file))
    assert len(names(mirror)) == 1
    assert len(list((tmp_path / "cache" / "mine").iterdir())) == 9


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "pvtcap" / "shards"
    assert ShardCache.of(None, 1.5) == ShardCache(tmp_path / "pvtcap" / "shards", 1_500_000_000)
    for unset in ("", "relative"):  # the XDG specification: to be ignored
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_folder() == Path.home() / ".cache" / "pvtcap" / "shards"
