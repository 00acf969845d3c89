"""pytest tests/test_certificates.py: https with an authority of our own, trusted and not; S3's endpoint, too."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pytest
import trustme
from conftest import ROOT, build_shapes
from PIL import Image
from remotesets import QUICK
from shardserver import ShardServer

from pvtcap.certificates import refused
from pvtcap.errors import ShardError
from pvtcap.remote import fetch_bytes, file_url
from pvtcap.shardcache import ShardCache
from pvtcap.shardset import ShardSet

NO_PATHS = ssl.DefaultVerifyPaths(None, None, "SSL_CERT_FILE", "", "SSL_CERT_DIR", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shapes(tmp_path_factory.mktemp("sets") / "set", "train", 7, 3)


def context(certificate: trustme.LeafCert) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(made)
    return made


@pytest.fixture
def server(folder: Path, authority: trustme.CA) -> Iterator[ShardServer]:
    with ShardServer(folder, tls=context(authority.issue_cert("127.0.0.1"))) as running:
        yield running


@pytest.fixture
def trusted(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust in this process: aiohttp has read SSL_CERT_FILE when it was imported."""
    made = ssl.create_default_context()
    authority.configure_trust(made)
    monkeypatch.setitem(fsspec.config.conf, "https", {"ssl": made})


def run(words: list[object], cache: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    """A command as a user has it, with an empty cache unless ``cache`` was used before."""
    given = {"XDG_CACHE_HOME": cache, "CUDA_VISIBLE_DEVICES": "", **variables}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SSL_CERT_")}
    environment = {**inherited, **{name: str(value) for name, value in given.items()}}
    command = [sys.executable, "-m", "pvtcap", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_set_of_a_private_authority_is_read_when_its_certificate_is_named(
    server: ShardServer, folder: Path, authority: trustme.CA, tmp_path: Path
) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    words = ["shards", "verify", server.url, "--processes", 2, "--json"]
    done = run(words, tmp_path / "cache", SSL_CERT_FILE=tmp_path / "ca.pem")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["num_samples"] == 7
    assert [len(server.asked[path.name]) for path in folder.glob("*.tar")] == [1, 1, 1]


@pytest.mark.parametrize("given", [None, "ca.pem"])
def test_an_authority_nobody_knows_is_one_line_that_says_what_to_do(
    server: ShardServer, tmp_path: Path, given: str | None
) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    variables = {"SSL_CERT_DIR": tmp_path} if given is None else {"SSL_CERT_FILE": tmp_path / given}
    done = run(["shards", "info", server.url], tmp_path / "cache", **variables)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    why = "cannot be fetched: its certificate is refused: unable to get local issuer certificate. "
    if given is None:
        do = "If it is of a private authority, set SSL_CERT_FILE to a file with that one's certificate (PEM)."
    else:
        do = f"SSL_CERT_FILE says {tmp_path / given}, and there is no such file."
    assert done.stderr == f"pvtcap: error: {server.url}/manifest.json: {why}{do}\n"
    assert server.connections == 1
    assert not server.asked


@pytest.mark.parametrize("fault", ["", "500", "busy", "reset", "cut", "flip", "short"])
def test_what_goes_wrong_once_is_mended_over_https_too(
    server: ShardServer, folder: Path, trusted: None, tmp_path: Path, fault: str
) -> None:
    server.faults = {path.name: iter([fault]) for path in folder.glob("*.tar")}
    remote = ShardSet.open(server.url, ShardCache(tmp_path / "cache", 10_000_000, 5.0, QUICK))
    local = ShardSet.open(folder)
    assert remote.manifest == local.manifest
    for entry in local.manifest.shards:
        descriptor = remote.open_file(entry.tar)
        assert os.pread(descriptor, entry.size_bytes + 1, 0) == (folder / entry.file).read_bytes()
        os.close(descriptor)
        assert len(server.asked[entry.file]) == 2 - (not fault)


@pytest.mark.parametrize(
    ("name", "age_days", "says"),
    [
        ("example.org", 0, "IP address mismatch, .* '127.0.0.1'. Use a name that the certificate has"),
        ("127.0.0.1", 800, "certificate has expired. Is this machine's clock right"),
    ],
)
def test_another_fault_of_a_certificate_is_not_put_down_to_its_authority(
    folder: Path, authority: trustme.CA, trusted: None, name: str, age_days: int, says: str
) -> None:
    end = datetime.now(UTC) - timedelta(days=age_days - 30)
    certificate = authority.issue_cert(name, not_before=end - timedelta(days=60), not_after=end)
    with ShardServer(folder, tls=context(certificate)) as server:
        with pytest.raises(ShardError, match=f"its certificate is refused: {says}"):
            fetch_bytes(f"{server.url}/manifest.json", retries=QUICK)
        assert server.connections == 1


def test_https_where_http_is_spoken(folder: Path) -> None:
    with ShardServer(folder) as server:
        url = file_url(server.url.replace("http:", "https:"), "manifest.json")
        with pytest.raises(ShardError, match=r"TLS: .*\. Does that port speak TLS\? If not, it is http://"):
            fetch_bytes(url, retries=QUICK)


@pytest.fixture
def s3_endpoint(authority: trustme.CA) -> Iterator[str]:
    """moto's S3 behind https, which its own ThreadedMotoServer has not."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app = DomainDispatcherApplication(create_backend_app)
    tls = context(authority.issue_cert("127.0.0.1"))
    server = make_server("127.0.0.1", 0, app, threaded=True, ssl_context=tls)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"https://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_s3_of_a_private_authority(
    s3_endpoint: str, authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    # botocore itself tries again what it takes for a bad connection.
    for name, value in {**keys, "AWS_ENDPOINT_URL": s3_endpoint, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ShardError, match=r"its certificate is refused: unable to get .* set AWS_CA_BUNDLE to a file"):
        fetch_bytes("s3://private/small", retries=QUICK)
    s3fs.S3FileSystem.clear_instance_cache()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    s3fs.S3FileSystem().mkdir("private")  # moto keeps what the process has stored
    s3fs.S3FileSystem().pipe_file("private/small", b"small")
    assert fetch_bytes("s3://private/small", retries=QUICK) == b"small"
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(ShardError, match=f"is not there. AWS_CA_BUNDLE says {tmp_path}/none.pem, and there is no such"):
        fetch_bytes("s3://private/small", retries=QUICK)
    s3fs.S3FileSystem.clear_instance_cache()


def test_photos_come_over_https_and_an_untrusted_one_is_counted(authority: trustme.CA, tmp_path: Path) -> None:
    Image.effect_noise((240, 180), 80).convert("RGB").save(tmp_path / "photo.jpg")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    ours, others = (context(one.issue_cert("127.0.0.1")) for one in (authority, trustme.CA()))
    with ShardServer(tmp_path, tls=ours) as server, ShardServer(tmp_path, tls=others) as stranger:
        rows = [f"a cat\t{server.url}/photo.jpg", f"a dog\t{stranger.url}/photo.jpg"]
        (tmp_path / "t.tsv").write_text("".join(f"{row}\n" for row in rows))
        words = ["shards", "conceptual-captions", "--tsv", tmp_path / "t.tsv", "--out", tmp_path / "cc"]
        words += ["--processes", 1, "--retries", 1, "--allow-private-addresses", "127.0.0.0/8"]
        done = run(words, tmp_path / "cache", SSL_CERT_FILE=tmp_path / "ca.pem")
        assert done.returncode == 0, done.stderr
        assert stranger.connections == 1
    built = ShardSet.open(tmp_path / "cc")
    assert (built.num_samples, built.manifest.skipped) == (1, {"certificate": 1})
    [line] = (tmp_path / "cc" / "skipped.jsonl").read_text().splitlines()
    assert "its certificate is refused: unable to get local issuer certificate" in line


@pytest.mark.parametrize("photos", [False, True])
def test_a_machine_without_any_authority_is_told_so(server: ShardServer, tmp_path: Path, photos: bool) -> None:
    (tmp_path / "empty").mkdir()
    # What OpenSSL was built to look for cannot be taken away from a test: a name of nothing does the same.
    variables = {"SSL_CERT_DIR": tmp_path / "empty", "SSL_CERT_FILE": tmp_path / "none.pem"}
    words = ["shards", "info", server.url]
    says = f"{server.url}/manifest.json: cannot be fetched: its certificate is refused: unable to get local issuer"
    if photos:
        (tmp_path / "t.tsv").write_text(f"a cat\t{server.url}/photo.jpg\n")
        words = ["shards", "conceptual-captions", "--tsv", tmp_path / "t.tsv", "--out", tmp_path / "cc"]
        words += ["--processes", 1, "--allow-private-addresses", "127.0.0.0/8"]
        says = "no photo can come over https; got its certificate is refused: unable to get local issuer"
    done = run(words, tmp_path / "cache", **variables)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"pvtcap: error: {says} certificate. SSL_CERT_FILE says {tmp_path}/none.pem, and")


def test_what_to_do_follows_from_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: NO_PATHS._replace(capath=str(tmp_path / "empty")))
    error = ssl.SSLCertVerificationError(1, "x")
    error.verify_code, error.verify_message = 20, "unknown."
    says = "This machine knows no authority at all: install ca-certificates, or set SSL_CERT_FILE."
    assert refused(error) == ("its certificate is refused: unknown", says)
    assert "private authority" in str(refused(error, "AWS_CA_BUNDLE"))
    error.verify_code = 23  # revoked
    assert refused(error) == ("its certificate is refused: unknown", None)
    assert refused(ssl.SSLError(1, "x")) is None
