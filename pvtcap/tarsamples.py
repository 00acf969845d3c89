"""The samples of one tar that pvtcap did not write: its index and its texts, while it stays as it is.

    00000.tar ──▶ 00000.index.json, 00000.texts.jsonl       ForeignIndex; a line a sample, in the form of Text

Members are grouped as WebDataset groups them: neighbours whose names agree up to the first dot of the base name. Of a
group, KEY.jpg, .jpeg, .png or .webp is the photo; its captions are KEY.txt (and KEY.0.txt, KEY.1.txt, …), each one
caption, and what KEY.json has as "captions", "caption" or "text". Other members are left alone, and counted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from pvtcap.candidate import clean_caption
from pvtcap.errors import ShardError
from pvtcap.photo import BadPhoto, decode_photo, photo_size
from pvtcap.photosource import MAX_PHOTO_BYTES
from pvtcap.shardformat import Foreign, ForeignIndex, index_name, texts_name
from pvtcap.shardset import ShardEntry, SkippedItem, write_json
from pvtcap.tarwalk import Content, Member, open_tar, split_name, walk_tar

MAX_TEXT_BYTES = 1 << 20  # of all texts of a sample together
MAX_NAME = 1024  # characters

_PHOTOS = frozenset({"jpg", "jpeg", "png", "webp"})
_CAPTION = re.compile(r"(\d+\.)?txt")
_MOST_KINDS = 50  # of members left alone that are counted by name: a tar may have as many as members


@dataclass(frozen=True)
class TarFindings:
    """What indexing one tar gave. ``entry`` is None when nothing of it can be used: the last of ``skipped`` says why.

    ``key_hashes`` (uint64) tell keys of different tars apart in little memory; ``left_alone`` counts members by suffix.
    """

    entry: ShardEntry | None
    key_hashes: np.ndarray[Any, np.dtype[np.uint64]]
    skipped: list[SkippedItem]
    left_alone: Counter[str]


def index_tar(tar: Path, out: Path, source: str, decode: bool) -> TarFindings:
    """Write the index and the texts of ``tar`` to folder ``out``; with ``decode`` every photo is decoded in full.

    Memory does not grow with the members' sizes. Raises OSError when ``out`` cannot be written.
    """
    texts, descriptor = out / texts_name(tar.name), -1
    partial = texts.with_name(texts.name + ".partial")
    work = _TarIndex(tar.stem, source, decode)
    try:
        descriptor = open_tar(tar)
        before = os.fstat(descriptor)
        with partial.open("wb") as file:
            for group in work.groups(walk_tar(descriptor, tar)):
                work.add(descriptor, group, file)
            file.flush()
            os.fsync(file.fileno())
        with open(descriptor, "rb", closefd=False) as whole:
            sha256 = hashlib.file_digest(whole, "sha256").hexdigest()
        after = os.fstat(descriptor)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise ShardError("it changed while it was being indexed", where=tar)
        if not work.keys:
            raise ShardError("no sample in it", where=tar)
    except ShardError as error:
        partial.unlink(missing_ok=True)
        return work.findings(None, SkippedItem(key=tar.name, reason="unusable tar", detail=str(error)))
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    partial.replace(texts)
    return work.findings(work.write_index(out / index_name(tar.name), tar.name, before.st_size, sha256))


@dataclass
class _Group:
    """Neighbouring members of one key; ``suffixes`` are all of them, the photo's and the texts' included."""

    key: str
    suffixes: Counter[str] = field(default_factory=Counter)
    photos: list[Member] = field(default_factory=list)
    captions: list[Member] = field(default_factory=list)
    tables: list[Member] = field(default_factory=list)

    def add(self, suffix: str, member: Member) -> None:
        self.suffixes[suffix] += 1
        if suffix in _PHOTOS:
            self.photos.append(member)
        elif suffix == "json":
            self.tables.append(member)
        elif _CAPTION.fullmatch(suffix):
            self.captions.append(member)


class _Unusable(Exception):
    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail


class _TarIndex:
    def __init__(self, stem: str, source: str, decode: bool) -> None:
        self.stem, self.source, self.decode = stem, source, decode
        self.keys: dict[str, None] = {}
        self.photos: list[tuple[int, int]] = []
        self.texts: list[tuple[int, int]] = []
        self.headers: list[int] = []
        self.num_captions = 0
        self.texts_sha256 = hashlib.sha256()
        self.texts_size = 0
        self.seen: set[str] = set()
        self.skipped: list[SkippedItem] = []
        self.left_alone: Counter[str] = Counter()

    def groups(self, members: Iterable[Member]) -> Iterator[_Group]:
        group: _Group | None = None
        for member in members:
            named = split_name(member.name)
            if member.kind == "folder":
                continue
            if problem := _name_problem(member):
                self._skip(member.name, *problem)
            elif named is None:
                self._leave_alone("without a key")
            else:
                key, suffix = named
                if group is None or group.key != key:
                    if group is not None:
                        yield group
                    group = _Group(key)
                group.add(suffix, member)
        if group is not None:
            yield group

    def add(self, descriptor: int, group: _Group, texts: IO[bytes]) -> None:
        """Store the group as a sample, or note why it is none."""
        used = len(group.photos) + len(group.captions) + len(group.tables)
        if used < group.suffixes.total():
            for suffix in group.suffixes:
                if suffix not in _PHOTOS and suffix != "json" and not _CAPTION.fullmatch(suffix):
                    self._leave_alone(f".{suffix}", group.suffixes[suffix])
        if not used:
            return
        try:
            captions, photo, size = self._sample(descriptor, group)
        except (_Unusable, BadPhoto) as error:
            self._skip(group.key, error.reason, error.detail)
            return
        text = {"image_id": group.key, "captions": captions, "width": size[0], "height": size[1], "source": self.source}
        line = json.dumps(text, ensure_ascii=False).encode()
        self.keys[group.key] = None
        self.photos.append((photo.offset, photo.size))
        self.headers.append(photo.header_crc)
        self.texts.append((self.texts_size, len(line)))
        self.num_captions += len(captions)
        texts.write(line + b"\n")
        self.texts_sha256.update(line + b"\n")
        self.texts_size += len(line) + 1

    def write_index(self, path: Path, tar_name: str, tar_size: int, sha256: str) -> ShardEntry:
        index = ForeignIndex(
            keys=list(self.keys),
            photos=self.photos,
            texts=self.texts,
            num_captions=self.num_captions,
            skipped=self.skipped,
            headers=self.headers,
        )
        write_json(path, index.model_dump(mode="json"))
        foreign = Foreign(texts_size_bytes=self.texts_size, texts_sha256=self.texts_sha256.hexdigest())
        return ShardEntry(
            file=tar_name,
            num_samples=len(self.keys),
            num_captions=self.num_captions,
            size_bytes=tar_size,
            sha256=sha256,
            index_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            foreign=foreign,
        )

    def findings(self, entry: ShardEntry | None, *last: SkippedItem) -> TarFindings:
        digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in self.keys)
        return TarFindings(entry, np.frombuffer(digests, np.uint64), [*self.skipped, *last], self.left_alone)

    def _sample(self, descriptor: int, group: _Group) -> tuple[list[str], Member, tuple[int, int]]:
        if group.key in self.seen:
            raise _Unusable("duplicate key", "its members do not stand together")
        self.seen.add(group.key)
        if twice := [suffix for suffix, times in group.suffixes.items() if times > 1]:
            raise _Unusable("duplicate member", f"{group.key}.{twice[0]}")
        if len(group.photos) != 1:
            found = ", ".join(member.name for member in group.photos)
            raise _Unusable("several photos", found) if found else _Unusable("missing photo")
        captions = self._captions(descriptor, group)
        [photo] = group.photos
        if photo.size == 0:
            raise _Unusable("empty photo")
        if photo.size > MAX_PHOTO_BYTES:
            raise BadPhoto("photo too large (bytes)", f"{photo.size:,}; wanted at most {MAX_PHOTO_BYTES:,}")
        with closing(Content(descriptor, photo)) as content:
            size = photo_size(cast(IO[bytes], content))
            if self.decode:
                content.seek(0)
                decode_photo(content.read())
        return captions, photo, size

    def _captions(self, descriptor: int, group: _Group) -> list[str]:
        """All captions of the group, cleaned, each once. A KEY.json without any is no harm if KEY.txt has one."""
        if sum(member.size for member in group.captions) > MAX_TEXT_BYTES:
            raise _Unusable("text too large", f"wanted at most {MAX_TEXT_BYTES:,} bytes")
        captions = [_decoded(Content(descriptor, member).read()) for member in group.captions]
        for table in group.tables:
            try:
                captions += _captions_in(descriptor, table)
            except _Unusable:
                if not any(caption.strip() for caption in captions):
                    raise
                self._leave_alone(".json that is too large or damaged")
        cleaned = dict.fromkeys(filter(None, map(clean_caption, captions)))
        if not cleaned:
            raise _Unusable("no caption")
        return list(cleaned)

    def _skip(self, name: str, reason: str, detail: str = "") -> None:
        key = f"{self.stem}/{name}" if name.isprintable() else f"{self.stem}/{name!a}"
        self.skipped.append(SkippedItem(key=key[:MAX_NAME], reason=reason, detail=_printable(detail)[:MAX_NAME]))

    def _leave_alone(self, kind: str, times: int = 1) -> None:
        known = kind in self.left_alone or len(self.left_alone) < _MOST_KINDS
        self.left_alone[kind[:40] if known else "others"] += times


def _name_problem(member: Member) -> tuple[str, str] | None:
    """Why a member cannot belong to a sample, as a reason and a detail."""
    if len(member.name) > MAX_NAME:
        return "name too long", f"{len(member.name):,} characters; wanted at most {MAX_NAME:,}"
    if not member.name.isprintable():
        return "unprintable name", "it has control characters, or is not UTF-8"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "name outside the folder", ""
    return None if member.kind == "file" else ("not a plain file", member.kind)


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unusable("text is not UTF-8", str(error)) from None


def _captions_in(descriptor: int, table: Member) -> list[str]:
    """What KEY.json holds of captions."""
    if table.size > MAX_TEXT_BYTES:
        raise _Unusable("text too large", f"{table.size:,} bytes; wanted at most {MAX_TEXT_BYTES:,}")
    text = _decoded(Content(descriptor, table).read())
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Unusable("damaged text", str(error)) from None
    for name in ("captions", "caption", "text") if isinstance(content, dict) else ():
        found = content.get(name)
        if isinstance(found, str):
            return [found]
        if found and isinstance(found, list) and all(isinstance(caption, str) for caption in found):
            return found
    return []


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)
