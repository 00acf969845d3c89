"""pytest tests/test_remote.py: HTTP with faults, on loopback; test_remote_storage.py has s3 and gs."""

from __future__ import annotations

import itertools
import json
import pickle
import random
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from remotesets import QUICK, get, read_all, write_files, write_sets
from shardserver import ShardServer
from test_shardindex import samples

from pvtcap.errors import ShardError
from pvtcap.remote import fetch_bytes, file_url, is_remote, shown
from pvtcap.shardcache import ShardCache
from pvtcap.shardcommands import COMMANDS
from pvtcap.shardset import ShardSet
from pvtcap.shardverify import verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("served"))


@pytest.fixture
def server(folder: Path) -> Iterator[ShardServer]:
    with ShardServer(folder) as running:
        yield running


@pytest.mark.parametrize("fault", ["500", "429", "busy", "reset", "cut", "flip", "short"])
@pytest.mark.parametrize("ranges", [True, False])
def test_what_goes_wrong_once_is_mended(server: ShardServer, folder: Path, fault: str, ranges: bool) -> None:
    raw = (folder / "big").read_bytes()
    server.ranges = ranges
    server.faults["big"] = iter([fault])
    assert get(file_url(server.url, "big"), raw) == raw
    assert len(server.asked["big"]) == 2
    assert server.asked["big"][0] == ""
    if fault != "reset":  # with which what had come may be lost
        assert bool(server.asked["big"][1]) == (fault in ("cut", "short"))


def test_many_cuts_are_gone_on_from_where_they_were(
    server: ShardServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pvtcap.remote._BLOCK_BYTES", 16 << 10)  # little is lost at a cut
    raw = (folder / "big").read_bytes()
    server.faults["big"] = iter(["cut", "500", "cut", "500", "cut", "500"])  # never more than two without a byte more
    assert get(file_url(server.url, "big"), raw) == raw
    starts = [int(asked[6:-1] or 0) for asked in server.asked["big"]]
    assert starts == sorted(starts)
    assert starts[0] < starts[1] < starts[3] < starts[5]


def test_a_server_that_falls_silent_is_left(server: ShardServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvtcap.remote._READ_TIMEOUT_S", 0.5)
    server.faults["big"] = iter(["hold"])
    raw = (folder / "big").read_bytes()
    assert get(file_url(server.url, "big"), raw) == raw
    assert server.asked["big"][1] > "bytes=1"


@pytest.mark.parametrize(
    ("fault", "times", "says"),
    [
        ("404", 1, r"there is no such file\. Is it the folder of a complete ShardSet"),
        ("403", 1, r"access refused: HTTP 403\. Check the URL and the credentials"),
        ("401", 1, "access refused: HTTP 401"),
        ("400", 1, "HTTP 400"),
        ("500", 3, "HTTP 500; got 3 failures in a row.* goes on with what the cache has"),
        ("flip", 2, "not the manifest's.*got sha256 [0-9a-f]{64}; wanted [0-9a-f]{64}.*damaged, or of another build"),
    ],
)
def test_what_stays_wrong_is_one_line(server: ShardServer, folder: Path, fault: str, times: int, says: str) -> None:
    server.faults["big"] = itertools.repeat(fault)
    with pytest.raises(ShardError, match=says) as raised:
        get(file_url(server.url, "big"), (folder / "big").read_bytes())
    assert str(raised.value).startswith(f"{server.url}/big: ")
    assert "\n" not in str(raised.value)
    assert len(server.asked["big"]) == times


def test_a_file_that_ends_too_early_at_its_source(server: ShardServer, folder: Path) -> None:
    with pytest.raises(ShardError, match="shorter than the manifest says"):
        get(file_url(server.url, "big"), (folder / "big").read_bytes(), 3_000_001)
    server.ranges = False
    with pytest.raises(ShardError, match="ended after 3,000,000 of 3,000,001 bytes"):
        get(file_url(server.url, "big"), (folder / "big").read_bytes(), 3_000_001)


def test_a_file_that_is_longer_has_the_bytes_that_were_asked_for(server: ShardServer, folder: Path) -> None:
    raw = (folder / "big").read_bytes()[:1_000_000]
    assert get(file_url(server.url, "big"), raw) == raw


def test_nobody_there(folder: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/set/big"
        with pytest.raises(ShardError, match="cannot be fetched: cannot connect; got 3 failures in a row"):
            fetch_bytes(url, retries=QUICK)
    with pytest.raises(ShardError, match="cannot be fetched"):
        fetch_bytes("http://no-such-host.invalid/set/big", retries=QUICK)
    with pytest.raises(ShardError, match=r"unknown protocol nosuch://.*http, https, s3, gs"):
        fetch_bytes("nosuch://bucket/set/big", retries=QUICK)


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails, as where it is not installed
    # What was imported before is kept here; fsspec.registry itself is a view of it.
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(ShardError, match=rf"package for {scheme}:// is missing\. pip install 'pvtcap\[{scheme}\]'"):
        fetch_bytes(f"{scheme}://bucket/set/big", retries=QUICK)


def test_urls_and_their_secrets(server: ShardServer) -> None:
    assert file_url("s3://bucket/a/", "x.tar") == "s3://bucket/a/x.tar"
    assert file_url("zip://::a.zip", "x.tar") == "zip://x.tar::a.zip"
    assert file_url("zip://a::s3://bucket/a.zip", "x.tar") == "zip://a/x.tar::s3://bucket/a.zip"
    assert shown("https://me:secret@host:1/a/x.tar?token=secret") == "https://host:1/a/x.tar"
    assert [is_remote(word) for word in ("s3://x", "http://x", "file:///x", "data/x", Path("s3://x"))] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert fetch_bytes(file_url(f"{server.url}?token=secret", "small"), retries=QUICK) == b"small"
    assert server.queries == {"token=secret"}
    with pytest.raises(ShardError) as raised:
        fetch_bytes(file_url(f"{server.url}?token=secret", "missing"), retries=QUICK)
    assert "secret" not in str(raised.value)


def test_options_are_those_of_fsspec(server: ShardServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What FSSPEC_HTTP='{"headers": …}' or ~/.config/fsspec/x.json sets when fsspec is imported.
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"Authorization": "Bearer x"}})
    server.faults["big"] = iter(["cut"])
    raw = (folder / "big").read_bytes()
    assert get(file_url(server.url, "big"), raw) == raw
    assert server.tokens == {"Bearer x"}
    assert server.asked["big"][1]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.mark.parametrize("name", ["ours", "foreign"])
@pytest.mark.parametrize("seed", range(3))
def test_a_remote_set_gives_the_samples_of_the_local_one(
    sets: dict[str, Path], tmp_path: Path, name: str, seed: int
) -> None:
    local = ShardSet.open(sets[name])
    wanted = samples(sets[name])
    chance = random.Random(seed)
    with ShardServer(sets[name], ranges=bool(seed % 2)) as server:
        for file in sets[name].iterdir():
            # Nothing says what the manifest's bytes should be.
            kinds = ["500", "cut", "reset", ""] + ["flip"] * (file.name != "manifest.json")
            server.faults[file.name] = iter([chance.choice(kinds)])
        sizes = [entry.size_bytes for entry in local.manifest.shards]
        cache = ShardCache(tmp_path / "cache", (2 + seed) * max(sizes) + 40_000, 5.0, QUICK)
        remote = pickle.loads(pickle.dumps(ShardSet.open(f"{server.url}/", cache)))
        assert (remote.manifest, remote.location) == (local.manifest, server.url)
        assert {path.name for path in remote.path.iterdir()} == {"manifest.json"}
        found = read_all(remote, seed)
        assert [found[place] for place in sorted(found)] == wanted
        assert list(remote.keys()) == list(local.keys())
        assert list(remote.captions()) == list(local.captions())
        assert read_all(remote, seed + 1) == found


def test_whatever_fsspec_opens(sets: dict[str, Path], tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "set"), "zip", sets["ours"])
    remote = ShardSet.open(f"zip://::{archive}", ShardCache(tmp_path / "cache", 10_000_000, 5.0, QUICK))
    assert list(read_all(remote, 0).values()) == list(read_all(ShardSet.open(sets["ours"]), 0).values())


@pytest.mark.parametrize("name", ["ours", "foreign"])
def test_info_and_verify_of_a_url(
    sets: dict[str, Path],
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "1"))
    with ShardServer(sets[name]) as server:
        for command, processes in (("info", 1), ("verify", 2 if name == "ours" else 1)):
            said = []
            for place in (str(sets[name]), server.url):
                COMMANDS[command]([place, "--json", "--processes", str(processes)])
                said.append(json.loads(capsys.readouterr().out))
            assert [one.pop("path") for one in said] == [str(sets[name]), server.url]
            assert said[0] == said[1]
        tar = ShardSet.open(sets[name]).manifest.shards[1].file
        server.faults[tar] = itertools.repeat("flip")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "2"))
        [problem] = verify(server.url)
        assert problem.shard == tar
        assert "its bytes are not the manifest's" in problem.problem
        server.faults["manifest.json"] = itertools.repeat("403")
        says = f"^{server.url}/manifest.json: cannot be fetched: access refused"
        with pytest.raises(ShardError, match=says):
            COMMANDS["verify"]([server.url])
