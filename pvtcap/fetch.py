"""Fetching photos by URL, many at a time, from a network full of dead links.

    async with Fetcher(FetchOptions()) as fetcher:
        raw = await fetcher.fetch("https://example.org/cat.jpg")      # or FetchFailed, with a reason to count

What may pass (a reset, 429, 500, …) is tried again with growing pauses; a host never has more than ``per_host``
requests at once; and no URL, name or redirect leads to a private address, because addresses are checked after DNS and
it is the checked ones that are connected to.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import socket
import ssl
import zlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from pvtcap import __version__
from pvtcap.addresses import Network, is_allowed
from pvtcap.certificates import knows_authorities, refused
from pvtcap.errors import ShardError
from pvtcap.photo import BadPhoto
from pvtcap.robots import forbidding_directive

PROJECT_PAGE = "https://pypi.org/project/pvtcap"
NO_NETWORK = frozenset({"no network", "DNS out of order"})  # what every URL ends with when this machine is offline
_WORTH_RETRYING = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_DNS_THREADS = 64  # getaddrinfo blocks for seconds on a dead name
_REMEMBERED_DEAD_NAMES = 100_000


@dataclass(frozen=True)
class FetchOptions:
    """How to fetch. ``timeout_s`` is for one request, from connecting to its last byte; ``retries`` come on top.

    A pause that a server asks for (Retry-After) is kept up to ``max_wait_s``; a longer one ends the photo.
    ``allowed_networks`` are private networks that may be connected to all the same.
    """

    connections: int = 256
    per_host: int = 8
    timeout_s: float = 20.0
    connect_timeout_s: float = 10.0
    retries: int = 2
    first_wait_s: float = 0.5
    max_wait_s: float = 30.0
    max_bytes: int = 50_000_000
    max_redirects: int = 5
    contact: str = PROJECT_PAGE
    honour_noai: bool = True
    allowed_networks: tuple[Network, ...] = ()


class FetchFailed(BadPhoto):
    """A photo that did not come. ``wait_s`` is set when another try may help: pause at least so long before it."""

    def __init__(self, reason: str, detail: str = "", wait_s: float | None = None) -> None:
        super().__init__(reason, detail)
        self.wait_s = wait_s

    def __reduce__(self) -> tuple[object, ...]:
        return FetchFailed, (self.reason, self.detail, self.wait_s)


@dataclass
class _Host:
    slots: asyncio.Semaphore
    users: int = 0
    not_before: float = 0.0  # on the event loop's clock: 429 and 503 hold up all requests to the host


class Fetcher:
    """Fetches within the limits of ``options``; for one event loop."""

    def __init__(self, options: FetchOptions) -> None:
        self.options = options
        self.may_start = asyncio.Event()  # cleared by who cannot take more bytes for the moment
        self.may_start.set()
        self._slots = asyncio.Semaphore(options.connections)
        self._hosts: dict[str, _Host] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(_DNS_THREADS, "dns"))
        connector = aiohttp.TCPConnector(
            limit=0,  # the two kinds of slots limit
            resolver=_CheckingResolver(self.options.allowed_networks),
            ttl_dns_cache=300,
            keepalive_timeout=2,  # thousands of hosts: idle connections would use up the open files
        )
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.options.connect_timeout_s)
        session = aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            headers={
                "User-Agent": f"pvtcap/{__version__} (image captioning dataset builder; +{self.options.contact})",
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            },
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._session = await self._stack.enter_async_context(session)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def fetch(self, url: str) -> bytes:
        """The bytes that ``url`` leads to. Raises FetchFailed, and ShardError when this machine is at its limits."""
        for attempt in itertools.count():
            try:
                return await self._follow(_parsed(url))
            except FetchFailed as error:
                if error.wait_s is None or attempt == self.options.retries:
                    raise
                wait_s = max(error.wait_s, self.options.first_wait_s * 2**attempt)
                if wait_s > self.options.max_wait_s:
                    raise
            await asyncio.sleep(wait_s)
        raise AssertionError("unreachable")

    async def _follow(self, url: URL) -> bytes:
        for _ in range(self.options.max_redirects + 1):
            assert url.host is not None
            async with self._host(url.host) as host, self._slots:
                await self.may_start.wait()
                found = await self._get(url, host)
            if isinstance(found, bytes):
                return found
            url = found
        raise FetchFailed("too many redirects", f"more than {self.options.max_redirects}")

    @asynccontextmanager
    async def _host(self, name: str) -> AsyncIterator[_Host]:
        host = self._hosts.setdefault(name, _Host(asyncio.Semaphore(self.options.per_host)))
        host.users += 1
        try:
            async with host.slots:
                while (wait_s := host.not_before - asyncio.get_running_loop().time()) > 0:
                    await asyncio.sleep(wait_s)
                yield host
        finally:
            host.users -= 1
            self._forget(name)

    def _forget(self, name: str) -> None:
        """Drop a host that nobody waits for, once it may be asked again: there are hundreds of thousands."""
        host, loop = self._hosts.get(name), asyncio.get_running_loop()
        if host is not None and not host.users:
            if host.not_before > loop.time():
                loop.call_at(host.not_before, self._forget, name)
            else:
                del self._hosts[name]

    async def _get(self, url: URL, host: _Host) -> bytes | URL:
        """The body, or where a redirect leads."""
        assert url.host is not None
        try:
            if not is_allowed(url.host, self.options.allowed_networks):  # a name passes: the resolver checks it
                raise _AddressRefused(url.host)
            async with (
                asyncio.timeout(self.options.timeout_s),
                self._session.get(url, allow_redirects=False) as response,
            ):
                if response.status in _REDIRECTS and (location := response.headers.get("Location")):
                    return _parsed(location, url)
                self._check(response, host)
                return await self._body(response)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise _failure(error) from error

    def _check(self, response: aiohttp.ClientResponse, host: _Host) -> None:
        if response.status != 200:
            wait_s = None
            if response.status in _WORTH_RETRYING:
                wait_s = _retry_after_s(response.headers.get("Retry-After"))
                if response.status in (429, 503) and wait_s <= self.options.max_wait_s:
                    host.not_before = asyncio.get_running_loop().time() + wait_s
            raise FetchFailed(f"HTTP {response.status}", response.reason or "", wait_s)
        if self.options.honour_noai and (directive := forbidding_directive(response.headers)):
            raise FetchFailed("refused by its site", directive)
        if (response.content_length or 0) > self.options.max_bytes:
            raise self._too_large()

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", "", "gzip", "x-gzip", "deflate"):
            raise FetchFailed("unknown Content-Encoding", encoding)
        unzip = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding not in ("identity", "") else None
        parts: list[bytes] = []
        room = self.options.max_bytes
        try:
            async for chunk in response.content.iter_any():
                # Never more than one byte above the limit, whatever a few bytes may unfold to.
                parts.append(unzip.decompress(chunk, room + 1) if unzip else chunk)
                room -= len(parts[-1])
                if room < 0:
                    raise self._too_large()
        except zlib.error as error:
            raise FetchFailed("damaged download", str(error)) from error
        return b"".join(parts)

    def _too_large(self) -> FetchFailed:
        return FetchFailed("download too large", f"more than {self.options.max_bytes:,} bytes")


class _AddressRefused(OSError):
    pass


@dataclass
class _CheckingResolver(AbstractResolver):
    """The system's resolver; gives only addresses that may be connected to, and remembers names that do not exist."""

    networks: tuple[Network, ...]
    _dead: dict[str, socket.gaierror] = field(default_factory=dict)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        if host in self._dead:
            raise self._dead[host]
        try:
            found = await aiohttp.ThreadedResolver().resolve(host, port, family)
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN:
                if len(self._dead) == _REMEMBERED_DEAD_NAMES:
                    self._dead.clear()
                self._dead[host] = error
            raise
        if allowed := [address for address in found if is_allowed(address["host"], self.networks)]:
            return allowed
        raise _AddressRefused(f"{host} is {', '.join(address['host'] for address in found)}")

    async def close(self) -> None:
        pass


def _parsed(url: str, base: URL | None = None) -> URL:
    try:
        parsed = URL(url.strip()) if base is None else base.join(URL(url.strip()))
    except ValueError as error:
        raise FetchFailed("not a URL", str(error)) from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise FetchFailed("not a URL", "" if base is None else f"redirected to {url[:200]}")
    return parsed


def _retry_after_s(value: str | None) -> float:
    """Seconds of a Retry-After header, which holds a number or a date; 0 when there is none, or none that is valid."""
    if value is None:
        return 0.0
    try:
        return float(value)
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (at - datetime.now(at.tzinfo)).total_seconds())


def _failure(error: Exception) -> FetchFailed:
    """What went wrong, in words that can be counted, and whether another try may help."""
    detail = str(error) or type(error).__name__
    if (refusal := refused(error)) is not None:
        if not knows_authorities():
            raise ShardError("no photo can come over https", got=refusal.why, do=refusal.do)
        return FetchFailed("certificate", refusal.why)
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
        raise ShardError("too many open files", got=detail, do="Give fewer --connections, or raise 'ulimit -n'.")
    match cause:
        case _AddressRefused():
            return FetchFailed("private address", str(cause))
        case socket.gaierror():
            again = cause.errno == socket.EAI_AGAIN
            return FetchFailed("DNS out of order" if again else "DNS", str(cause), 0.0 if again else None)
        case aiohttp.ConnectionTimeoutError():
            return FetchFailed("cannot connect", "timed out")
        case TimeoutError():
            return FetchFailed("timed out", "", 0.0)
        case ssl.SSLError():
            return FetchFailed("TLS", detail)
        case aiohttp.ClientPayloadError():
            return FetchFailed("truncated download", "the connection was closed before its end", 0.0)
        case aiohttp.ServerDisconnectedError() | OSError(errno=errno.ECONNRESET | errno.EPIPE):
            return FetchFailed("connection reset", detail, 0.0)
        case OSError(errno=errno.ENETUNREACH | errno.ENETDOWN):
            return FetchFailed("no network", detail, 0.0)
        case OSError():
            return FetchFailed("cannot connect", str(cause))
        case aiohttp.InvalidURL():
            return FetchFailed("not a URL", detail)
        case _:
            return FetchFailed("not HTTP", detail)
