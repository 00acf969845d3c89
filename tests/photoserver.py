"""An HTTP server that serves photos and misbehaves on request, on loopback: ``python photoserver.py FOLDER PORTFILE``.

The path says how: /ok/NAME, /missing, /forbidden, /busy/NAME (429 with Retry-After, then fine), /always-busy,
/shaky/NAME (500, then fine), /broken, /drip, /reset, /short/NAME (Content-Length larger than the body), /cut/NAME
(half a photo), /html, /bomb (gzip), /gzip/NAME, /huge-png, /endless, /loop, /metadata, /file, /hop/N/NAME
(N redirects), /noai/NAME, /tdm/NAME, /slow/NAME, /garbage. /asked tells how often each path was asked for.
Written on bare sockets, because a proper server refuses to misbehave.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import struct
import sys
import zlib
from collections import Counter
from functools import cache
from pathlib import Path


@cache
def huge_png(side: int) -> bytes:
    """A valid PNG of side × side black pixels, one bit each: 400 megapixels are a few dozen kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze = zlib.compressobj(1)
    row = bytes(1 + side // 8)
    data = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@cache
def gzip_bomb(size: int) -> bytes:
    squeeze = zlib.compressobj(1, wbits=zlib.MAX_WBITS | 16)
    return b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(size >> 20)) + squeeze.flush()


class PhotoServer:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.open_now = self.most_open = 0

    async def start(self) -> asyncio.Server:
        return await asyncio.start_server(self.serve, "127.0.0.1", 0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (line := await reader.readline()).strip():
                headers = {}
                while header := (await reader.readline()).decode("latin-1").strip():
                    name, _, value = header.partition(":")
                    headers[name.lower()] = value.strip()
                self.agents.add(headers.get("user-agent", ""))
                path = line.decode("latin-1").split()[1]
                self.asked[path] += 1
                self.open_now += 1
                self.most_open = max(self.most_open, self.open_now)
                try:
                    await self.answer(path, writer)
                finally:
                    self.open_now -= 1
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, ValueError):
            pass  # the client has gone: some of the tests are about that
        finally:
            writer.close()

    async def answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        kind, _, rest = path.lstrip("/").partition("/")
        name = rest.partition("?")[0]
        first_time = self.asked[path] == 1
        match kind:
            case "ok":
                self.send(writer, "200 OK", self.photo(name))
            case "missing":
                self.send(writer, "404 Not Found", b"gone")
            case "forbidden":
                self.send(writer, "403 Forbidden", b"no")
            case "busy" if first_time:
                self.send(writer, "429 Too Many Requests", b"", "Retry-After: 1")
            case "always-busy":
                self.send(writer, "429 Too Many Requests", b"", "Retry-After: 3600")
            case "shaky" if first_time:
                self.send(writer, "500 Internal Server Error", b"oops")
            case "busy" | "shaky":
                self.send(writer, "200 OK", self.photo(name))
            case "broken":
                self.send(writer, "500 Internal Server Error", b"oops")
            case "drip":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                for _ in range(600):
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.1)
            case "reset":
                socket = writer.get_extra_info("socket")
                # SO_LINGER of 0 seconds: closing sends RST instead of FIN.
                socket.setsockopt(1, 13, struct.pack("ii", 1, 0))
                writer.transport.abort()
            case "short":
                photo = self.photo(name)
                writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(photo) + 1000}\r\n\r\n".encode() + photo)
                writer.close()
            case "cut":
                photo = self.photo(name)
                self.send(writer, "200 OK", photo[: len(photo) // 2])
            case "html":
                self.send(writer, "200 OK", b"<html><body>It has moved</body></html>", "Content-Type: image/jpeg")
            case "bomb":
                self.send(writer, "200 OK", gzip_bomb(100 << 20), "Content-Encoding: gzip")
            case "gzip":
                self.send(writer, "200 OK", gzip.compress(self.photo(name)), "Content-Encoding: gzip")
            case "huge-png":
                self.send(writer, "200 OK", huge_png(20_000))
            case "endless":
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                while True:
                    writer.write(bytes(1 << 16))
                    await writer.drain()
            case "loop":
                self.send(writer, "302 Found", b"", f"Location: /loop/{int(name or 0) + 1}")
            case "metadata":
                self.send(writer, "302 Found", b"", "Location: http://169.254.169.254/latest/meta-data/")
            case "file":
                self.send(writer, "302 Found", b"", "Location: file:///etc/passwd")
            case "hop":
                left, _, name = name.partition("/")
                to = f"/hop/{int(left) - 1}/{name}" if int(left) > 1 else f"/ok/{name}"
                self.send(writer, "301 Moved Permanently", b"", f"Location: {to}")
            case "noai":
                self.send(writer, "200 OK", self.photo(name), "X-Robots-Tag: noai, noimageai")
            case "tdm":
                self.send(writer, "200 OK", self.photo(name), "TDM-Reservation: 1")
            case "slow":
                await asyncio.sleep(0.3)
                self.send(writer, "200 OK", self.photo(name))
            case "garbage":
                writer.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
                writer.close()
            case "asked":
                self.send(writer, "200 OK", json.dumps(self.asked).encode())
            case _:
                self.send(writer, "404 Not Found", b"")

    def photo(self, name: str) -> bytes:
        return (self.folder / Path(name).name).read_bytes()

    def send(self, writer: asyncio.StreamWriter, status: str, body: bytes, *headers: str) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


async def _main(folder: Path, port_file: Path) -> None:
    async with await PhotoServer(folder).start() as server:
        partial = port_file.with_suffix(".partial")
        partial.write_text(str(server.sockets[0].getsockname()[1]))
        partial.replace(port_file)
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), Path(sys.argv[2])))
