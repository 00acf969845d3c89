"""Walking over the headers of a tar that may be damaged or hostile, in bounded memory.

    for member in walk_tar(descriptor, where): ...        Member(name, kind, offset, size, header_crc)
    Content(descriptor, member).read(32)                  its first bytes

Python's tarfile reads whatever an extension header claims into memory, and takes a damaged header for the end. This
reads blocks of 512 bytes by their place, members' content never, and raises a ShardError where the tar is not whole.
On whole tars it sees what tarfile sees, and so what WebDataset sees.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pvtcap.errors import ShardError
from pvtcap.shardformat import HEADER_BYTES as BLOCK
from pvtcap.shardformat import header_crc

MAX_EXTENSION_BYTES = 1 << 20  # of a PAX or GNU header: names and dates need some hundred bytes

_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_KINDS = {
    b"0": "file", b"\0": "file", b"7": "file", b"1": "hard link", b"2": "symbolic link", b"3": "character device",
    b"4": "block device", b"5": "folder", b"6": "FIFO", b"S": "sparse file",
}  # fmt: skip
_WITHOUT_CONTENT = ("hard link", "symbolic link", "character device", "block device", "folder", "FIFO")
_RECORD = re.compile(rb"(\d{1,7}) ([^=\0]+)=")
_NUMBERS = ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345))
_BEHIND_END = 24 * BLOCK  # a tar ends with two empty blocks, and is filled up with others to a multiple of 20
_GLOBAL, _EXTENDED, _LONG_NAME, _LONG_LINK = b"g", b"xX", b"L", b"K"


@dataclass(frozen=True, slots=True)
class Member:
    """One member: ``kind`` is "file" or what it is instead; its content is ``size`` bytes from ``offset``.

    ``header_crc`` is that of the 512 bytes before the content. A name that is no UTF-8 has surrogates.
    """

    name: str
    kind: str
    offset: int
    size: int
    header_crc: int


def open_tar(path: Path) -> int:
    """A descriptor of a tar. Raises ShardError for what is no plain file, and for a compressed one with a hint."""
    try:
        # O_NONBLOCK: a FIFO of that name would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ShardError(f"cannot open the tar: {error.strerror}", where=path) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ShardError("not a plain file", where=path)
        start = os.pread(descriptor, 8, 0)
        for magic, command in _COMPRESSED.items():
            if start.startswith(magic):
                raise ShardError("a compressed tar has no byte offsets", where=path, do=f"Unpack it: {command} FILE.")
    except ShardError:
        os.close(descriptor)
        raise
    return descriptor


def walk_tar(descriptor: int, where: object) -> Iterator[Member]:
    """All members in order, links and folders too. Raises ShardError where the tar is damaged or cut off."""
    return _Walk(descriptor, where).members()


class _Walk:
    def __init__(self, descriptor: int, where: object) -> None:
        self.descriptor, self.where = descriptor, where
        self.size = os.fstat(descriptor).st_size
        self.at = 0

    def members(self) -> Iterator[Member]:
        extension: dict[str, str] = {}
        extended = False
        while (header := self._block()).count(0) < BLOCK:
            self._check(header)
            self.at += BLOCK
            content = self.at
            kind, size = header[156:157], self._number(header[124:136])
            if size < 0:
                self._fail("a damaged header")
            extended = kind in _EXTENDED + _GLOBAL + _LONG_NAME + _LONG_LINK
            if extended:
                self._extend(extension, kind, self._payload(size))
                continue
            yield self._member(header, content, size, extension)
            extension = {}
        if extended:
            self._fail("a header without its member")
        if os.pread(self.descriptor, _BEHIND_END, self.at).strip(b"\0"):
            self._fail("it goes on behind its end; two tars joined, perhaps, of which nothing reads the second")

    def _member(self, header: bytes, offset: int, size: int, extension: dict[str, str]) -> Member:
        name = extension["path"].rstrip("/") if "path" in extension else _name(header)
        kind = _KINDS.get(header[156:157], f"member of type {header[156:157]!r}")
        if header[156:157] == b"\0" and _text(header[:100]).endswith("/"):
            kind = "folder"  # as before POSIX
        elif kind == "file" and "sparse" in extension:
            kind = "sparse file"
        elif kind == "sparse file" and header[482]:
            while self._block()[504]:  # its map goes on in blocks that its size does not count
                self.at += BLOCK
            offset = self.at = self.at + BLOCK
        if "size" in extension:
            size = self._decimal(extension["size"])
        if kind not in _WITHOUT_CONTENT:
            self._skip(size)
        return Member(name, kind, offset, size, header_crc(header, size))

    def _extend(self, extension: dict[str, str], kind: bytes, payload: bytes) -> None:
        """Note what a PAX or GNU header says of the next member."""
        if kind == _LONG_LINK:
            return
        said = {"path": _text(payload)} if kind == _LONG_NAME else dict(self._records(payload))
        if kind == _GLOBAL:
            if said:
                self._fail("a global header that gives all members one name or size")
        elif said.keys() & extension.keys() & {"path", "size"}:
            self._fail("two names or sizes for one member")
        else:
            extension |= said

    def _records(self, payload: bytes) -> Iterator[tuple[str, str]]:
        """Those of the PAX records (``LENGTH KEYWORD=VALUE\\n``) that matter here; any others are forgotten."""
        at = 0
        while found := _RECORD.match(payload, at):
            stop = at + int(found[1])
            if not found.end() < stop <= len(payload):
                self._fail("a damaged PAX header")
            if found[2] in (b"path", b"size"):
                yield found[2].decode(), payload[found.end() : stop - 1].decode("utf-8", "surrogateescape")
            elif found[2].startswith(b"GNU.sparse."):
                yield "sparse", ""
            at = stop
        if payload[at:].strip(b"\0"):
            self._fail("a damaged PAX header")

    def _payload(self, size: int) -> bytes:
        if size > MAX_EXTENSION_BYTES:
            self._fail(f"a header that claims {size:,} bytes; wanted at most {MAX_EXTENSION_BYTES:,}")
        start = self.at
        self._skip(size)
        return os.pread(self.descriptor, size, start)

    def _skip(self, size: int) -> None:
        if self.at + size > self.size:
            self._fail(f"cut off: a member of {size:,} bytes; wanted at most {self.size - self.at:,}")
        self.at += -(-size // BLOCK) * BLOCK

    def _block(self) -> bytes:
        block = os.pread(self.descriptor, BLOCK, self.at)
        if len(block) < BLOCK:
            self._fail("cut off: it does not end with a block of zeros")
        return block

    def _check(self, header: bytes) -> None:
        """Compare the header with its sum, its own field counted as spaces; some old tars add up signed bytes."""
        rest = header[:148] + b" " * 8 + header[156:]
        if self._number(header[148:156]) not in (sum(rest), sum(struct.unpack("512b", rest))):
            self._fail("a damaged header")
        for start, stop in _NUMBERS:  # of no use here, but tarfile takes an odd one for the end of the tar
            self._number(header[start:stop])

    def _number(self, field: bytes) -> int:
        """Octal digits, or binary behind a first byte of 128, or of 255 where it is negative."""
        if field[0] in (0o200, 0o377):
            return int.from_bytes(field[1:], "big", signed=field[0] == 0o377)
        digits = field.partition(b"\0")[0].strip()
        if re.fullmatch(rb"[0-7]*", digits) is None:
            self._fail("a damaged header")
        return int(digits or b"0", 8)

    def _decimal(self, text: str) -> int:
        if re.fullmatch(r"[0-9]{1,19}", text) is None:
            self._fail("a damaged PAX header")
        return int(text)

    def _fail(self, what: str) -> NoReturn:
        raise ShardError(f"not a readable tar: {what}", where=f"{self.where}, byte {self.at:,}")


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    prefix, name = _text(header[345:500]), _text(header[:100])
    return f"{prefix}/{name}" if prefix and header[156:157] not in b"LKS" else name


class Content(io.RawIOBase):
    """The content of a member as a file, read as far as it is asked for."""

    def __init__(self, descriptor: int, member: Member) -> None:
        self.descriptor, self.member, self.at = descriptor, member, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.member.size}[whence]
        self.at = max(0, start + offset)
        return self.at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.member.size - self.at)
        wanted = left if size is None or size < 0 else min(size, left)
        content = os.pread(self.descriptor, wanted, self.member.offset + self.at) if wanted else b""
        self.at += len(content)
        return content


def split_name(name: str) -> tuple[str, str] | None:
    """A member's key, up to the first dot of its base name, and the rest; None where WebDataset sees no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, rest = base.partition(".")
    return (folder + slash + stem, rest.lower()) if stem and dot else None
