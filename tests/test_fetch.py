"""pytest tests/test_fetch.py: a real server on loopback, well-behaved and not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import TypeVar

import pytest
from photoserver import PhotoServer
from PIL import Image

from pvtcap.fetch import PROJECT_PAGE, Fetcher, FetchFailed, FetchOptions

T = TypeVar("T")
LOOPBACK = (ip_network("127.0.0.0/8"),)
OPTIONS = FetchOptions(
    timeout_s=3.0, retries=2, first_wait_s=0.05, max_wait_s=2.0, max_bytes=10_000_000, allowed_networks=LOOPBACK
)


@pytest.fixture
def server(tmp_path: Path) -> PhotoServer:
    Image.effect_noise((80, 60), 80).convert("RGB").save(tmp_path / "a.jpg")
    return PhotoServer(tmp_path)


def visit(server: PhotoServer, task: Callable[[Fetcher, str], Awaitable[T]], options: FetchOptions = OPTIONS) -> T:
    """Run ``task`` with a Fetcher and the server's address."""

    async def run() -> T:
        async with await server.start() as listening, Fetcher(options) as fetcher:
            return await task(fetcher, f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")

    return asyncio.run(run())


def outcome(server: PhotoServer, path: str, options: FetchOptions = OPTIONS) -> bytes | tuple[str, str]:
    async def task(fetcher: Fetcher, address: str) -> bytes | tuple[str, str]:
        try:
            return await fetcher.fetch(address + path)
        except FetchFailed as error:
            return error.reason, error.detail

    return visit(server, task, options)


@pytest.mark.parametrize("path", ["/ok/a.jpg", "/busy/a.jpg", "/shaky/a.jpg", "/gzip/a.jpg", "/hop/3/a.jpg"])
def test_photos_that_come_in_the_end(server: PhotoServer, path: str) -> None:
    assert outcome(server, path) == (server.folder / "a.jpg").read_bytes()


@pytest.mark.parametrize(
    ("path", "reason", "times_asked"),
    [
        ("/missing", "HTTP 404", 1),
        ("/forbidden", "HTTP 403", 1),
        ("/always-busy", "HTTP 429", 1),  # it asks for an hour
        ("/broken", "HTTP 500", 3),
        ("/drip", "timed out", 3),
        ("/reset", "connection reset", 6),  # aiohttp itself asks once more
        ("/short/a.jpg", "truncated download", 3),
        ("/bomb", "download too large", 1),
        ("/endless", "download too large", 1),
        ("/loop/0", "too many redirects", 1),
        ("/metadata", "private address", 1),
        ("/file", "not a URL", 1),
        ("/noai/a.jpg", "refused by its site", 1),
        ("/tdm/a.jpg", "refused by its site", 1),
        ("/garbage", "not HTTP", 1),
    ],
)
def test_photos_that_do_not_come(server: PhotoServer, path: str, reason: str, times_asked: int) -> None:
    found = outcome(server, path)
    assert isinstance(found, tuple), "it was fetched"
    assert found[0] == reason
    assert server.asked[path] == times_asked


def test_a_site_may_be_disobeyed_on_purpose(server: PhotoServer) -> None:
    assert isinstance(outcome(server, "/noai/a.jpg", replace(OPTIONS, honour_noai=False)), bytes)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:{port}/ok/a.jpg", "private address"),
        ("http://localhost:{port}/ok/a.jpg", "private address"),  # a name: refused after DNS
        ("http://[::1]:{port}/ok/a.jpg", "private address"),
        ("http://[::ffff:127.0.0.1]:{port}/ok/a.jpg", "private address"),
        ("http://169.254.169.254/latest/meta-data/", "private address"),
        ("http://nobody.invalid/a.jpg", "DNS"),
        ("ftp://example.org/a.jpg", "not a URL"),
        ("//example.org/a.jpg", "not a URL"),
        ("http://[/a.jpg", "not a URL"),
        ("", "not a URL"),
    ],
)
def test_urls_that_are_not_followed(server: PhotoServer, url: str, reason: str) -> None:
    async def task(fetcher: Fetcher, address: str) -> str:
        with pytest.raises(FetchFailed) as caught:
            await fetcher.fetch(url.format(port=address.rpartition(":")[2]))
        return caught.value.reason

    found = visit(server, task, replace(OPTIONS, allowed_networks=(), retries=0))
    # Where there is no DNS server at all, a name that does not exist cannot be told from one that does.
    assert found == reason or (reason == "DNS" and found in ("DNS out of order", "timed out"))
    assert not server.asked


def test_other_ways_to_write_loopback_do_not_lead_there(server: PhotoServer) -> None:
    async def task(fetcher: Fetcher, address: str) -> None:
        port = address.rpartition(":")[2]
        for host in ("127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "127.0.0.1.", "LOCALHOST"):
            with pytest.raises(FetchFailed):
                await fetcher.fetch(f"http://{host}:{port}/ok/a.jpg")

    visit(server, task, replace(OPTIONS, allowed_networks=()))
    assert not server.asked


def test_nobody_listens_and_no_tls(server: PhotoServer) -> None:
    async def task(fetcher: Fetcher, address: str) -> list[str]:
        reasons = []
        for url in ("http://127.0.0.1:1/", address.replace("http:", "https:") + "/ok/a.jpg"):
            with pytest.raises(FetchFailed) as caught:
                await fetcher.fetch(url)
            reasons.append(caught.value.reason)
        return reasons

    refused, tls = visit(server, task)
    assert refused == "cannot connect"
    assert tls in ("TLS", "timed out", "cannot connect", "connection reset")


def test_a_host_is_never_asked_for_more_than_its_share(server: PhotoServer) -> None:
    async def task(fetcher: Fetcher, address: str) -> list[bytes]:
        return await asyncio.gather(*(fetcher.fetch(f"{address}/slow/a.jpg?{n}") for n in range(20)))

    assert len(visit(server, task, replace(OPTIONS, per_host=4, timeout_s=10))) == 20
    assert server.most_open == 4
    server.most_open = 0
    visit(server, task, replace(OPTIONS, connections=3, per_host=100, timeout_s=10))
    assert server.most_open == 3


def test_a_busy_host_is_left_alone_for_as_long_as_it_asks(server: PhotoServer) -> None:
    async def task(fetcher: Fetcher, address: str) -> float:
        started = time.monotonic()
        first = asyncio.create_task(fetcher.fetch(f"{address}/busy/a.jpg"))
        while not server.asked:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await fetcher.fetch(f"{address}/ok/a.jpg")
        waited = time.monotonic() - started
        await first
        return waited

    assert visit(server, task) > 0.9


def test_what_the_server_is_told(server: PhotoServer) -> None:
    outcome(server, "/ok/a.jpg")
    outcome(server, "/ok/a.jpg", replace(OPTIONS, contact="me@example.org"))
    assert [PROJECT_PAGE in agent for agent in sorted(server.agents)] == [True, False]
    assert any("me@example.org" in agent for agent in server.agents)


def test_nothing_is_fetched_while_there_is_no_room(server: PhotoServer) -> None:
    async def task(fetcher: Fetcher, address: str) -> bytes:
        fetcher.may_start.clear()
        fetching = asyncio.create_task(fetcher.fetch(f"{address}/ok/a.jpg"))
        await asyncio.sleep(0.2)
        assert not server.asked
        fetcher.may_start.set()
        return await fetching

    assert visit(server, task)
