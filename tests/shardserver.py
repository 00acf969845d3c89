"""An HTTP server on loopback that serves a folder and misbehaves as it is told, file by file, answer by answer.

    with ShardServer(folder) as server:
        server.faults["x.tar"] = iter(["500", "cut"])     # the third answer is right

500, 403, 404, …: that status. busy: 503 with Retry-After. reset and cut: half of the answer, then RST or FIN. flip: one
byte is another. short: the last byte is missing, and not announced. hold: half of the answer, then nothing until
``server.go`` is set. ``server.asked`` has the Range header ("" without one) of each request for a file, and
``server.connections`` counts those that were made, also where no request came of them. With ``tls`` it is https.
What it serves may be asked for as gcsfs does: .../o/NAME?alt=media, with ranges that have an end.
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, Self


class ShardServer:
    def __init__(self, folder: Path, *, ranges: bool = True, tls: ssl.SSLContext | None = None) -> None:
        self.folder, self.ranges, self.tls = folder, ranges, tls
        self.faults: dict[str, Iterator[str]] = {}
        self.asked: dict[str, list[str]] = defaultdict(list)
        self.queries: set[str] = set()
        self.tokens: set[str | None] = set()
        self.go = Event()
        self.half_sent = Event()
        self.connections = 0

    def __enter__(self) -> Self:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *words: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def get_request(self) -> tuple[socket.socket, Any]:
                outer.connections += 1
                return super().get_request()

        self._server = Server(("127.0.0.1", 0), Handler)
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(self._server.socket, server_side=True)
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"http{'s' if self.tls else ''}://127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{self.address}/set"
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
        given = re.fullmatch(r"bytes=(\d+)-(\d*)", asked) if self.ranges else None
        start = int(given[1]) if given else 0
        end = min(int(given[2]) + 1, len(body)) if given and given[2] else len(body)
        if start and start >= len(body):
            return self.refuse(handler, 416)
        handler.send_response(206 if given else 200)
        handler.send_header("Content-Length", str(end - start))
        handler.end_headers()
        return self.send(handler, bytes(body[start:end]), fault)

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
