"""An HTTP server on loopback that serves a folder and misbehaves as it is told, file by file, answer by answer.

    with ShardServer(folder) as server:
        server.faults["x.tar"] = iter(["500", "cut"])     # the third answer is right

500, 403, 404, …: that status. busy: 503 with Retry-After. reset and cut: half of the answer, then RST or FIN. flip: one
byte is another. short: the last byte is missing, and not announced. hold: half of the answer, then nothing until
``server.go`` is set. ``server.asked`` has the Range header ("" without one) of each request for a file.
"""

from __future__ import annotations

import re
import socket
import struct
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, Self


class ShardServer:
    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        self.folder, self.ranges = folder, ranges
        self.faults: dict[str, Iterator[str]] = {}
        self.asked: dict[str, list[str]] = defaultdict(list)
        self.queries: set[str] = set()
        self.tokens: set[str | None] = set()
        self.go = Event()
        self.half_sent = Event()

    def __enter__(self) -> Self:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *words: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/set"
        return self

    def __exit__(self, *exc: object) -> None:
        self.go.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path, _, query = handler.path.partition("?")
        name = path.rpartition("/")[2]
        asked = handler.headers.get("Range", "")
        self.asked[name].append(asked)
        self.queries.add(query)
        self.tokens.add(handler.headers.get("Authorization"))
        fault = next(self.faults.get(name, iter(())), "")
        if fault.isdigit() or not (self.folder / name).is_file():
            return self.refuse(handler, int(fault or 404))
        if fault == "busy":
            return self.refuse(handler, 503, ("Retry-After", "0"))
        body = bytearray((self.folder / name).read_bytes())
        if fault == "flip":
            body[len(body) // 2] ^= 1
        if fault == "short":
            del body[-1]
        start = int(asked[6:-1]) if self.ranges and re.fullmatch(r"bytes=\d+-", asked) else 0
        if start and start >= len(body):
            return self.refuse(handler, 416)
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        return self.send(handler, bytes(body[start:]), fault)

    def refuse(self, handler: BaseHTTPRequestHandler, status: int, *headers: tuple[str, str]) -> None:
        handler.send_response(status)
        for header in (("Content-Length", "0"), *headers):
            handler.send_header(*header)
        handler.end_headers()

    def send(self, handler: BaseHTTPRequestHandler, body: bytes, fault: str) -> None:
        half = len(body) // 2
        try:
            if fault in ("reset", "cut", "hold"):
                handler.wfile.write(body[:half])
                handler.wfile.flush()
                self.half_sent.set()
                if fault == "hold":
                    self.go.wait()
                    handler.wfile.write(body[half:])
                elif fault == "reset":  # SO_LINGER of 0 seconds: closing sends RST instead of FIN
                    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    handler.connection.close()
            else:
                handler.wfile.write(body)
        except OSError:
            pass  # the client has gone
