"""pytest tests/test_remote.py: real servers on loopback, HTTP with faults, moto's S3, an emulator of gs."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from conftest import build_shapes
from shardserver import ShardServer
from test_shardindex import img2dataset, index, samples, write_tar

from pvtcap.errors import ShardError
from pvtcap.remote import Retries, fetch, fetch_bytes, file_url, is_remote, shown
from pvtcap.shardcache import ShardCache
from pvtcap.shardcommands import COMMANDS
from pvtcap.shardset import Sample, ShardReader, ShardSet
from pvtcap.shardverify import verify

QUICK = Retries(tries=3, first_wait_s=0.01, max_wait_s=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 3 MB, and a small one."""
    path = tmp_path_factory.mktemp("served")
    (path / "big").write_bytes(random.Random(0).randbytes(3_000_000))
    (path / "small").write_bytes(b"small")
    return path


@pytest.fixture
def server(folder: Path) -> Iterator[ShardServer]:
    with ShardServer(folder) as running:
        yield running


def get(url: str, raw: bytes, size_bytes: int | None = None) -> bytes:
    """Fetch what should be ``raw``."""
    found = bytearray(len(raw))

    def store(offset: int, block: bytes) -> None:
        found[offset : offset + len(block)] = block

    size = len(raw) if size_bytes is None else size_bytes
    fetch(url, store, size_bytes=size, sha256=hashlib.sha256(raw).hexdigest(), retries=QUICK)
    return bytes(found)


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
    """A ShardSet of ours, and a foreign one whose tars share keys; five shards each."""
    root = tmp_path_factory.mktemp("sets")
    for number in range(5):
        write_tar(root / f"foreign/{number}.tar", img2dataset(0, 3 + number))
    index(root / "foreign")
    return {"ours": build_shapes(root / "ours", "train", 23, 5), "foreign": root / "foreign"}


def read_all(shardset: ShardSet, seed: int) -> dict[tuple[int, int], Sample]:
    """All samples, read in an order of chance by a reader that keeps two shards open."""
    places = [(shard, number) for shard, size in enumerate(shardset.sizes) for number in range(size)]
    random.Random(seed).shuffle(places)
    with ShardReader(shardset, max_open=2) as reader:
        return {place: reader.read(*place) for place in places}


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


S3 = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """moto's S3 server, found through AWS' own variable, with a bucket."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {**S3, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_s3(s3: None, sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    for name, path in sets.items():
        for file in path.iterdir():
            s3fs.S3FileSystem().put_file(str(file), f"bucket/{name}/{file.name}")
    cache = ShardCache(tmp_path / "cache", 10_000_000, 5.0, QUICK)
    for name, path in sets.items():
        remote = ShardSet.open(f"s3://bucket/{name}", cache)
        found = read_all(remote, 0)
        assert [found[place] for place in sorted(found)] == samples(path)
    raw = random.Random(0).randbytes(40_000_000)  # three ranges
    s3fs.S3FileSystem().pipe_file("bucket/big", raw)
    assert get("s3://bucket/big", raw) == raw
    with pytest.raises(ShardError, match=r"it has 40,000,000 bytes, the manifest says 40,000,001\. Copy it"):
        get("s3://bucket/big", raw, 40_000_001)
    for nowhere in ("s3://bucket/nothing", "s3://no-bucket/ours"):
        with pytest.raises(ShardError, match=f"^{nowhere}/manifest.json: cannot be fetched: there is no such file"):
            ShardSet.open(nowhere, cache)
    s3fs.S3FileSystem.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ShardError, match=r"no credentials: .*AWS_ENDPOINT_URL; a public bucket needs FSSPEC_S3_ANON"):
        ShardSet.open("s3://bucket/ours", cache)


GS = {
    "FSSPEC_GS_TOKEN": "anon",
    # Otherwise gcsfs asks, by gRPC, for the kind of bucket: no emulator answers that, and each file takes a minute.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
}


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """gcsfs' file system class, without what it knew of another server, and with credentials for none."""
    for name, value in GS.items():
        monkeypatch.setenv(name, value)
    import gcsfs

    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # fsspec has read its variables before
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield gcsfs.GCSFileSystem
    gcsfs.GCSFileSystem.clear_instance_cache()


@contextmanager
def emulator(folder: Path, port: int = 0) -> Iterator[int]:
    """Google's storage, as far as gcp-storage-emulator has it, over what lies in ``folder``; yields its port."""
    from gcp_storage_emulator.server import create_server

    with create_server("127.0.0.1", port, data_dir=str(folder)) as server:
        yield server._api._httpd.server_port  # nothing public tells which port it was given


@pytest.fixture
def gs(gcs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An emulator with a bucket, found through the variable that Google's own clients read."""
    with emulator(tmp_path / "stored") as port:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        gcs().mkdir("bucket")
        yield gcs


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # gcsfs does, where a test fills the bucket
def test_gs(gs: Any, sets: dict[str, Path], tmp_path: Path) -> None:
    for name, path in sets.items():
        for file in path.iterdir():
            gs().put_file(str(file), f"bucket/{name}/{file.name}")
    cache = ShardCache(tmp_path / "cache", 10_000_000, 5.0, QUICK)
    for name, path in sets.items():
        remote = ShardSet.open(f"gs://bucket/{name}", cache)
        found = read_all(remote, 0)
        assert [found[place] for place in sorted(found)] == samples(path)
    raw = random.Random(0).randbytes(40_000_000)  # three ranges
    gs().pipe_file("bucket/big", raw)
    assert get("gs://bucket/big", raw) == get("gcs://bucket/big", raw) == raw
    with pytest.raises(ShardError, match=r"it has 40,000,000 bytes, the manifest says 40,000,001\. Copy it"):
        get("gs://bucket/big", raw, 40_000_001)
    for nowhere in ("gs://bucket/nothing", "gs://no-bucket/ours"):
        with pytest.raises(ShardError, match=f"^{nowhere}/manifest.json: cannot be fetched: there is no such file"):
            ShardSet.open(nowhere, cache)


def run_on_gs(cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command as a user has it, which finds the server where this process does."""
    environment = {**os.environ, **GS, "XDG_CACHE_HOME": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pvtcap", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_gs_as_a_user_has_it(gs: Any, sets: dict[str, Path], tmp_path: Path) -> None:
    for file in sets["ours"].iterdir():
        gs().put_file(str(file), f"bucket/ours/{file.name}")
    done = run_on_gs(tmp_path, "shards", "verify", "gs://bucket/ours", "--processes", "2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["num_samples"] == 23


@pytest.mark.parametrize("fault", ["404", "403", "401"])
def test_a_refusal_of_gs_is_one_line_without_what_gcsfs_logs(
    gcs: Any, server: ShardServer, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
    server.faults["manifest.json"] = itertools.repeat(fault)
    done = run_on_gs(tmp_path, "shards", "info", "gs://bucket")
    assert done.returncode == 2
    assert done.stderr.startswith("pvtcap: error: gs://bucket/manifest.json: cannot be fetched: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # gcsfs does, where a test fills the bucket
def test_gs_goes_on_when_it_is_back(
    gcs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: dict[str, Path]
) -> None:
    raw = random.Random(0).randbytes(3_000_000)
    monkeypatch.setattr("pvtcap.remote._RANGE_BYTES", 1_000_000)
    found = bytearray(len(raw))
    with ExitStack() as running:
        first = ExitStack()
        port = first.enter_context(emulator(tmp_path / "stored"))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        gcs().mkdir("bucket")
        gcs().pipe_file("bucket/big", raw)
        back = threading.Timer(0.5, lambda: running.enter_context(emulator(tmp_path / "stored", port)))

        def store(offset: int, block: bytes) -> None:
            found[offset : offset + len(block)] = block
            if offset == 1_000_000:
                first.close()
                back.start()

        fetch("gs://bucket/big", store, size_bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest(), retries=QUICK)
        back.join()
    assert found == raw


@pytest.mark.parametrize(
    ("fault", "times", "says"),
    [
        ("404", 1, "there is no such file"),
        ("403", 1, "access refused: Forbidden: .*Check GOOGLE_APPLICATION_CREDENTIALS; .* needs FSSPEC_GS_TOKEN=anon"),
        ("401", 1, "access refused: HTTP 401. Check GOOGLE_APPLICATION_CREDENTIALS"),
        ("400", 1, "HTTP 400"),
        ("503", 18, "HTTP 503; got 3 failures in a row"),  # gcsfs itself asks six times
        ("cut", 18, "the connection was closed before its end; got 3 failures in a row"),
        ("flip", 2, "not the manifest's.*damaged, or of another build"),
    ],
)
def test_what_stays_wrong_with_gs_is_one_line(
    gcs: Any, server: ShardServer, folder: Path, fault: str, times: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=lambda wait_s: asyncio.sleep(0)))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
    server.faults["big"] = itertools.repeat(fault)
    with pytest.raises(ShardError, match=says) as raised:
        get("gs://bucket/big", (folder / "big").read_bytes())
    assert str(raised.value).startswith("gs://bucket/big: ")
    assert "\n" not in str(raised.value)
    assert len(server.asked["big"]) == times


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
