"""One file from http(s), s3, gs or whatever else fsspec opens, checked against its sha256 while it comes.

    fetch("s3://bucket/coco-train/coco-train-000000.tar", store, size_bytes=…, sha256=…)

What may pass (a reset, a time-out, 429, 500, …) is tried again with growing pauses, from the byte that was reached
where the other side can do that. Credentials and options are those of fsspec and of the packages below it: for s3
``AWS_PROFILE``, ``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL`` (MinIO, Ceph, R2, …) and ``~/.aws``; for anything
``FSSPEC_S3_ANON=true``, ``FSSPEC_HTTP='{"headers": {"Authorization": "Bearer …"}}'`` and their like, or
``~/.config/fsspec/*.json``. A proxy: ``FSSPEC_HTTP='{"client_kwargs": {"trust_env": true}}'``. A private certificate
authority: ``SSL_CERT_FILE``, for s3 ``AWS_CA_BUNDLE``.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from pvtcap.certificates import OPENSSL_VARIABLE, refused
from pvtcap.errors import ShardError

_BLOCK_BYTES = 256 << 10  # of a stream; lost when it breaks off
_RANGE_BYTES = 16 << 20  # of an object store: a request each
_MOST_BYTES = 1 << 30  # of a file whose size nobody told: a manifest, an index
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S = 30.0, 60.0  # to a connection; without a byte
_WORTH_RETRYING = frozenset({408, 425, 429, 500, 502, 503, 504})
_WORDS = {
    "ClientPayloadError": "the connection was closed before its end",
    "ClientConnectorError": "cannot connect",
    "EndpointConnectionError": "cannot connect",
    "SocketTimeoutError": "timed out",
    "ConnectionTimeoutError": "cannot connect: timed out",
    "ServerDisconnectedError": "the server closed the connection",
}
_PACKAGES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # of pvtcap's extras
_CA_VARIABLES = {"s3": "AWS_CA_BUNDLE", "s3a": "AWS_CA_BUNDLE"}  # of the others it is OpenSSL's own

Store = Callable[[int, bytes], object]


@dataclass(frozen=True)
class Retries:
    """``tries`` in a row without a byte more; the pauses double from the first to the longest, give or take a half."""

    tries: int = 7
    first_wait_s: float = 0.5
    max_wait_s: float = 30.0

    def wait_s(self, failures: int, asked_s: float) -> float:
        """The pause after so many failures in a row; a server's own wish (Retry-After) counts if it is longer."""
        doubled = self.first_wait_s * 2.0 ** (failures - 1)
        # Ranks that failed together should not come back together.
        return min(max(doubled, asked_s), self.max_wait_s) * random.uniform(0.5, 1.5)


DEFAULT_RETRIES = Retries()


class _Broken(Exception):
    """A transfer that ended too early: why, and whether it may go better after ``wait_s``."""

    def __init__(self, why: str, *, wait_s: float | None = 0.0, do: str | None = None) -> None:
        super().__init__(why)
        self.why, self.wait_s, self.do = why, wait_s, do


def is_remote(location: object) -> bool:
    """Whether a ShardSet's location is a URL of something that is not on this machine's own disks."""
    return isinstance(location, str) and "://" in location and not location.startswith("file://")


def file_url(location: str, name: str) -> str:
    """The URL of a file in the folder ``location``; a query (a token, say) stays at the end."""
    if _is_http(location):
        parts = urlsplit(location)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
    folder, chained, rest = location.partition("::")  # zip://folder::s3://bucket/set.zip, zip://::set.zip
    folder = folder if folder.endswith("://") else f"{folder.rstrip('/')}/"
    return f"{folder}{name}{chained}{rest}"


def shown(url: str) -> str:
    """The URL without what may be secret: a password, a token in the query."""
    if not _is_http(url):
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def fetch_bytes(url: str, *, sha256: str | None = None, retries: Retries = DEFAULT_RETRIES) -> bytes:
    """A small file whose size is not known, such as a manifest. Raises ShardError as ``fetch`` does."""
    raw = bytearray()

    def store(offset: int, block: bytes) -> None:
        raw[offset:] = block

    fetch(url, store, sha256=sha256, retries=retries)
    return bytes(raw)


def fetch(
    url: str,
    store: Store,
    *,
    size_bytes: int | None = None,
    sha256: str | None = None,
    retries: Retries = DEFAULT_RETRIES,
    watch: Callable[[], object] = lambda: None,
) -> None:
    """Hand the file at ``url`` block by block to ``store(offset, block)``, which begins again at 0 if it must.

    ``watch`` is called between blocks, and may raise to end it. What ``store`` and ``watch`` raise passes through.
    Raises ShardError when the file cannot be had, when it is shorter than ``size_bytes``, and when its sha256 is
    another even after it was fetched a second time.
    """
    offset = best = failures = 0
    digest, wrong = hashlib.sha256(), ""
    while True:
        try:
            for at, block in _transfer(url, offset, size_bytes):
                if at == 0 and offset:  # the other side cannot go on in the middle
                    digest, offset = hashlib.sha256(), 0
                watch()
                store(at, block)
                digest.update(block)
                offset = at + len(block)
            if size_bytes is not None and offset < size_bytes:
                raise _Broken(f"it ended after {offset:,} of {size_bytes:,} bytes")
        except _Broken as broken:
            failures = 1 if offset > best else failures + 1
            best = max(best, offset)
            if broken.wait_s is None or failures >= retries.tries:
                raise _told(url, broken, failures) from broken.__cause__
            _pause(retries.wait_s(failures, broken.wait_s), watch)
            continue
        if sha256 is None or digest.hexdigest() == sha256:
            return
        if wrong:
            raise _wrong_bytes(url, digest.hexdigest(), sha256)
        wrong, digest, offset, best, failures = digest.hexdigest(), hashlib.sha256(), 0, 0, 0


def _pause(wait_s: float, watch: Callable[[], object]) -> None:
    end = time.monotonic() + wait_s
    while (left := end - time.monotonic()) > 0:
        watch()
        time.sleep(min(left, 0.2))


def _transfer(url: str, offset: int, size_bytes: int | None) -> Iterator[tuple[int, bytes]]:
    """(offset, block) from ``offset`` on, or from 0 where that is not possible; raises _Broken and nothing else."""
    blocks = (_stream if _is_http(url) else _ranges)(url, offset, size_bytes)
    while True:
        try:
            found = next(blocks, None)
        except _Broken:
            raise
        except Exception as error:
            raise _broken(url, error) from error
        if found is None:
            return
        yield found


def _stream(url: str, offset: int, size_bytes: int | None) -> Iterator[tuple[int, bytes]]:
    """Over HTTP: one answer, read as it comes, because not every server knows ranges."""
    import aiohttp
    import fsspec

    filesystem = fsspec.filesystem(urlsplit(url).scheme)
    limit = _MOST_BYTES if size_bytes is None else size_bytes
    headers = {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={offset}-"} if offset else {}
    options = {
        "block_size": 0,  # a stream
        "size": limit,  # or else fsspec asks for it first
        "headers": headers,
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_READ_TIMEOUT_S),
        "read_bufsize": _BLOCK_BYTES,
    }
    with filesystem.open(url, **options) as file:
        at = offset if file.r.status == 206 else 0
        while at < limit and (block := file.read(min(_BLOCK_BYTES, limit - at))):
            yield at, block
            at += len(block)
    if size_bytes is None and at == limit:
        raise _Broken(f"it is larger than {limit:,} bytes", wait_s=None)


def _ranges(url: str, offset: int, size_bytes: int | None) -> Iterator[tuple[int, bytes]]:
    """From an object store, or anything that fsspec opens: range by range."""
    import fsspec

    _quiet("gcsfs")  # writes tracebacks to stderr of what it raises as well
    filesystem, path = fsspec.core.url_to_fs(url)
    if size_bytes is None:
        yield 0, filesystem.cat_file(path)
        return
    for start in range(offset, size_bytes, _RANGE_BYTES):
        end = min(start + _RANGE_BYTES, size_bytes)
        block = filesystem.cat_file(path, start=start, end=end)
        yield start, block
        if len(block) < end - start:
            do = "Copy it there again."
            raise _Broken(f"it has {start + len(block):,} bytes, the manifest says {size_bytes:,}", wait_s=None, do=do)


def _quiet(name: str) -> None:
    """Keep a library's log off stderr, unless who runs us wants it."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())


def _broken(url: str, error: Exception) -> _Broken:
    """What went wrong, in words, and whether another try may help. fsspec's parts raise whatever they like."""
    detail = " ".join(str(error).split()).replace(url, shown(url)) or type(error).__name__
    scheme = urlsplit(url).scheme
    if (refusal := refused(error, _CA_VARIABLES.get(scheme, OPENSSL_VARIABLE))) is not None:
        return _Broken(refusal.why, wait_s=None, do=refusal.do)
    cause: object = getattr(error, "os_error", error)
    status = getattr(error, "status", None) or getattr(error, "code", None)
    name = type(error).__name__
    if isinstance(cause, ssl.SSLError) or name == "SSLError":  # botocore's
        return _Broken(f"TLS: {detail}", wait_s=None, do="Does that port speak TLS? If not, it is http://.")
    match cause:
        case FileNotFoundError():
            do = "Is it the folder of a complete ShardSet, the one with manifest.json?"
            return _Broken("there is no such file", wait_s=None, do=do)
        case PermissionError():
            return _Broken(f"access refused: {detail}", wait_s=None, do=_credentials(scheme))
        case ImportError():
            do = f"pip install 'pvtcap[{_PACKAGES[scheme]}]'" if scheme in _PACKAGES else detail
            return _Broken(f"a package for {scheme}:// is missing", wait_s=None, do=do)
        case socket.gaierror() if cause.errno != socket.EAI_AGAIN:
            return _Broken(f"no such host: {urlsplit(url).hostname}", wait_s=None, do="Is the URL right?")
        case OSError() if detail.startswith("Forbidden:"):  # gcsfs' way to say 403
            return _Broken(f"access refused: {detail}", wait_s=None, do=_credentials(scheme))
        case ValueError() if "rotocol not known" in detail:
            do = "http, https, s3, gs and what else fsspec opens are known."
            return _Broken(f"unknown protocol {scheme}://", wait_s=None, do=do)
    if name.endswith("CredentialsError"):
        return _Broken(f"no credentials: {detail}", wait_s=None, do=_credentials(scheme))
    if status in (401, 403):
        return _Broken(f"access refused: HTTP {status}", wait_s=None, do=_credentials(scheme))
    if status == 416:
        return _Broken("it is shorter than the manifest says", wait_s=None, do="Copy it there again.")
    if isinstance(status, int) and status >= 400:
        wait_s = _retry_after_s(error) if status in _WORTH_RETRYING else None
        return _Broken(f"HTTP {status}", wait_s=wait_s)
    return _Broken(_WORDS.get(name) or (name if name == detail else f"{name}: {detail}"))


def _retry_after_s(error: Exception) -> float:
    """Seconds of a Retry-After; a date, which few servers send, counts as nothing."""
    value = (getattr(error, "headers", None) or {}).get("Retry-After", "")
    return float(value) if re.fullmatch(r"\d{1,9}", value) else 0.0


def _credentials(scheme: str) -> str:
    if scheme in ("s3", "s3a"):
        return "Check AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL; a public bucket needs FSSPEC_S3_ANON=true."
    if scheme in ("gs", "gcs"):
        return "Check GOOGLE_APPLICATION_CREDENTIALS; a public bucket needs FSSPEC_GS_TOKEN=anon."
    return "Check the URL and the credentials for it."


def _told(url: str, broken: _Broken, failures: int) -> ShardError:
    if broken.wait_s is None:
        return ShardError(f"cannot be fetched: {broken.why}", where=shown(url), do=broken.do)
    return ShardError(
        f"cannot be fetched: {broken.why}",
        where=shown(url),
        got=f"{failures} failures in a row",
        do="Is the server well, and the network? Started again, it goes on with what the cache has.",
    )


def _wrong_bytes(url: str, got: str, wanted: str) -> ShardError:
    return ShardError(
        "its bytes are not the manifest's, and were not when fetched a second time",
        where=shown(url),
        got=f"sha256 {got}",
        wanted=wanted,
        do="The copy there is damaged, or of another build: copy it there again.",
    )


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))
