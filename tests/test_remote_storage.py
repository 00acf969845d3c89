"""pytest tests/test_remote_storage.py: object storage on loopback, moto's S3 and an emulator of gs."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import random
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
from remotesets import QUICK, get, read_all, write_files, write_sets
from shardserver import ShardServer
from test_shardindex import samples

from pvtcap.errors import ShardError
from pvtcap.remote import fetch
from pvtcap.shardcache import ShardCache
from pvtcap.shardset import ShardSet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("served"))


@pytest.fixture
def server(folder: Path) -> Iterator[ShardServer]:
    with ShardServer(folder) as running:
        yield running


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_sets(tmp_path_factory.mktemp("sets"))


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


def serves_sets_and_files(url: str, filesystem: Any, sets: dict[str, Path], cache: ShardCache) -> None:
    """A bucket at ``url``, which is filled through ``filesystem``."""
    for name, path in sets.items():
        for file in path.iterdir():
            filesystem.put_file(str(file), f"bucket/{name}/{file.name}")
    for name, path in sets.items():
        found = read_all(ShardSet.open(f"{url}/{name}", cache), 0)
        assert [found[place] for place in sorted(found)] == samples(path)
    raw = random.Random(0).randbytes(40_000_000)  # three ranges
    filesystem.pipe_file("bucket/big", raw)
    assert get(f"{url}/big", raw) == raw
    with pytest.raises(ShardError, match=r"it has 40,000,000 bytes, the manifest says 40,000,001\. Copy it"):
        get(f"{url}/big", raw, 40_000_001)
    for nowhere in (f"{url}/nothing", f"{url.replace('bucket', 'no-bucket')}/ours"):
        with pytest.raises(ShardError, match=f"^{nowhere}/manifest.json: cannot be fetched: there is no such file"):
            ShardSet.open(nowhere, cache)


def test_s3(s3: None, sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    cache = ShardCache(tmp_path / "cache", 10_000_000, 5.0, QUICK)
    serves_sets_and_files("s3://bucket", s3fs.S3FileSystem(), sets, cache)
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
    cache = ShardCache(tmp_path / "cache", 10_000_000, 5.0, QUICK)
    serves_sets_and_files("gs://bucket", gs(), sets, cache)
    gs().pipe_file("bucket/small", b"small")
    assert get("gcs://bucket/small", b"small") == b"small"


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
