"""A ShardSet: a folder of plain WebDataset tars with a byte-offset index beside each, and a manifest written last.

    flickr8k-train/
        flickr8k-train-000000.tar           KEY.jpg and KEY.json, one pair a sample
        flickr8k-train-000000.index.json    where each member's bytes lie in that tar
        skipped.jsonl                       what the build left out, one line each, with the reason
        manifest.json                       its existence means that the build is complete

``KEY.json`` is ``{image_id, captions, width, height, source}``: a photo is stored once with all its captions. Tars of
another's (``pvtcap shards index``) stay as they are; their texts lie in ``*.texts.jsonl`` beside them.
A ShardSet may also lie at a URL (http, s3, gs, …): its files then come into a cache one by one, when they are needed.
This module reads; ``shardwriter`` and ``shardindex`` write, ``shardverify`` reads every byte. Example::

    shardset = ShardSet.open("data/flickr8k-train")     # or s3://bucket/flickr8k-train
    with ShardReader(shardset) as reader:
        sample = reader.read(shard=0, index=17)
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, Self

from pvtcap.errors import ShardError
from pvtcap.remote import file_url, is_remote, shown
from pvtcap.shardcache import Mirror, ShardCache
from pvtcap.shardfiles import (
    check_size,
    file_size,
    open_file,
    parse_json,
    parse_manifest,
    read_file,
    read_manifest,
    sha256_file,
    write_json,
)
from pvtcap.shardformat import (
    FORMAT,
    HEADER_BYTES,
    MANIFEST,
    ForeignIndex,
    Manifest,
    Sample,
    ShardEntry,
    ShardFile,
    ShardIndex,
    SkippedItem,
    Text,
    header_crc,
)

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Manifest",
    "Sample",
    "ShardEntry",
    "ShardIndex",
    "ShardReader",
    "ShardSet",
    "SkippedItem",
    "parse_json",
    "read_manifest",
    "sha256_file",
    "write_json",
]


@dataclass(frozen=True)
class ShardSet:
    """A complete ShardSet, checked as far as names and sizes go; ``verify`` reads every byte."""

    path: Path  # of a remote one: where the cache has what was fetched of it
    manifest: Manifest
    mirror: Mirror | None = None

    @classmethod
    def open(cls, location: str | Path, cache: ShardCache | None = None) -> Self:
        """Open a ShardSet in a folder or at a URL; of that, its manifest is fetched, into ``cache`` or the default one.

        Raises ShardError when it is missing, incomplete, or (in a folder) a tar has not the size it should.
        """
        shardset = cls.at(location, cache)
        manifest, where = shardset.manifest, f"{shardset.location}/{MANIFEST}"
        for entry in manifest.shards if shardset.mirror is None else ():
            check_size(shardset.path / entry.file, entry.size_bytes)
            if entry.foreign is not None:
                check_size(shardset.path / entry.texts_file, entry.foreign.texts_size_bytes)
        if twice := [file for file, times in Counter(entry.file for entry in manifest.shards).items() if times > 1]:
            raise ShardError("a shard is named twice", where=where, got=twice[0])
        if sum(entry.num_samples for entry in manifest.shards) != manifest.num_samples:
            raise ShardError("the shards' sample counts do not add up", where=where, wanted=manifest.num_samples)
        if manifest.num_samples == 0:
            raise ShardError("a ShardSet without samples", where=shardset.location)
        return shardset

    @classmethod
    def at(cls, location: str | Path, cache: ShardCache | None = None) -> Self:
        """As ``open``, but of all that, only the manifest's form is looked at."""
        if not is_remote(location):
            path = Path(str(location).removeprefix("file://"))
            return cls(path, read_manifest(path))
        mirror = Mirror.open(str(location), cache or ShardCache.of())
        manifest = parse_manifest(read_file(mirror.path / MANIFEST), shown(file_url(mirror.url, MANIFEST)))
        return cls(mirror.path, manifest, mirror)

    @property
    def location(self) -> str:
        """The folder or the URL, as an error names it."""
        return str(self.path) if self.mirror is None else shown(self.mirror.url)

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    @property
    def num_captions(self) -> int:
        return self.manifest.num_captions

    @property
    def sizes(self) -> list[int]:
        """Samples in each shard, in storage order."""
        return [entry.num_samples for entry in self.manifest.shards]

    def only(self, shard: int) -> Self:
        """This ShardSet with one shard, as number 0: what a worker is sent, as small as if there were no others."""
        return replace(self, manifest=self.manifest.model_copy(update={"shards": [self.manifest.shards[shard]]}))

    def load_index(self, shard: int) -> ShardIndex:
        """The index of one shard, its checksum and lengths checked."""
        entry = self.manifest.shards[shard]
        path = self.path / entry.index_file
        if self.mirror is None and file_size(path) is None:
            raise ShardError("a shard's index is missing", where=path, do="Build the shards again.")
        with os.fdopen(self.open_file(entry.index), "rb") as file:
            raw = file.read()
        if hashlib.sha256(raw).hexdigest() != entry.index_sha256:
            raise ShardError("the index is not the one in the manifest (sha256 differs)", where=path)
        index = parse_json(ShardIndex if entry.foreign is None else ForeignIndex, raw, path)
        lengths = {len(index.keys), len(index.photos), len(index.texts)}
        lengths |= {len(index.headers)} if isinstance(index, ForeignIndex) else set()
        if lengths != {entry.num_samples}:
            raise ShardError("wrong number of samples", where=path, got=len(index.keys), wanted=entry.num_samples)
        if entry.foreign is None or not entry.foreign.key_prefix:
            return index
        return index.model_copy(update={"keys": [entry.foreign.key_prefix + key for key in index.keys]})

    def open_file(
        self, file: ShardFile, wait_s: float | None = None, watch: Callable[[], object] = lambda: None
    ) -> int:
        """A descriptor of one of the ShardSet's files. A remote one is fetched if need be, and stays in the cache until
        this is closed; for ``wait_s`` and ``watch`` see ``Mirror.hold``.
        """
        if self.mirror is None:
            return open_file(self.path / file.name)
        return self.mirror.hold(file, wait_s, watch)

    def keys(self) -> Iterator[str]:
        """All keys in storage order."""
        for shard in range(len(self.manifest.shards)):
            yield from self.load_index(shard).keys

    def captions(self) -> Iterator[tuple[str, ...]]:
        """All samples' captions in storage order, without reading a photo."""
        with ShardReader(self, max_open=1) as reader:
            for shard, size in enumerate(self.sizes):
                for index in range(size):
                    yield reader.read_text(shard, index).captions


@dataclass(frozen=True, slots=True)
class _OpenShard:
    """The descriptors of a tar and of where its texts lie (the same one, unless it is foreign), and its index."""

    entry: ShardEntry
    tar: int
    texts: int
    index: ShardIndex

    def close(self) -> None:
        for descriptor in {self.tar, self.texts}:
            os.close(descriptor)


class ShardReader:
    """Random access to samples by (shard, index). One a process: offsets are not shared.

    The ``max_open`` shards used last stay open, and so in the cache if they are remote: no more than are really needed
    at a time should be.

    What it promises of a tar that has changed since it was indexed: a sample is read only from behind the very tar
    header that belongs to its key, with its size. A photo's own bytes have no checksum of their own: ``verify``
    compares those.
    """

    # 64 is far below the usual 1,024 open files, and far above what a shuffle window needs.
    def __init__(self, shardset: ShardSet, max_open: int = 64) -> None:
        self.shardset, self.max_open = shardset, max_open
        self._open: dict[int, _OpenShard] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()  # a shard that nobody reads any more must not stay in the cache

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.shardset, self.max_open)  # descriptors mean nothing in another process

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def key(self, shard: int, index: int) -> str:
        return self._shard(shard).index.keys[index]

    def where(self, shard: int, index: int) -> str:
        """How an error names a sample."""
        return f"{self.shardset.location}/{self.shardset.manifest.shards[shard].file}, sample {self.key(shard, index)}"

    def number(self, shard: int, index: int) -> str:
        """The same, known before anything of the shard has been read."""
        return f"{self.shardset.location}/{self.shardset.manifest.shards[shard].file}, sample number {index}"

    def read(self, shard: int, index: int) -> Sample:
        """One sample; the photo's bytes as stored. Raises ShardError on a short read or a damaged text member."""
        text = self.read_text(shard, index)
        opened = self._shard(shard)
        span = opened.index.photos[index]
        if isinstance(opened.index, ForeignIndex):
            header, photo = self._with_header(opened.tar, span, shard, index)
            if header_crc(header, span[1]) != opened.index.headers[index]:
                self._not_the_indexed(shard, index)
        else:
            photo = self._member(opened.tar, span, self.shardset.manifest.photo_suffix, shard, index)
        return text._replace(photo=photo)

    def read_text(self, shard: int, index: int) -> Sample:
        """The sample with an empty ``photo``."""
        opened = self._shard(shard)
        key, span = opened.index.keys[index], opened.index.texts[index]
        foreign = opened.entry.foreign
        if foreign is None:
            text = parse_json(Text, self.read_json(shard, index), self.where(shard, index))
            image_id = text.image_id
        else:
            line = self._bytes(opened.texts, *span, foreign.texts_size_bytes, shard, index)
            text = parse_json(Text, line, self.where(shard, index))
            image_id = f"{foreign.key_prefix}{text.image_id}"
            if image_id != key:
                self._not_the_indexed(shard, index)
        return Sample(key, image_id, tuple(text.captions), b"", text.width, text.height, text.source)

    def read_json(self, shard: int, index: int) -> bytes:
        """The sample's KEY.json, as stored: not of a foreign tar."""
        opened = self._shard(shard)
        return self._member(opened.texts, opened.index.texts[index], ".json", shard, index)

    def _shard(self, shard: int) -> _OpenShard:
        if (opened := self._open.pop(shard, None)) is None:
            while len(self._open) >= self.max_open:
                self._open.pop(next(iter(self._open))).close()
            opened = self._opened(shard)
        self._open[shard] = opened  # the last: the first is the one that was not used for longest
        return opened

    def _opened(self, shard: int) -> _OpenShard:
        entry, index = self.shardset.manifest.shards[shard], self.shardset.load_index(shard)
        tar = self.shardset.open_file(entry.tar)
        try:
            texts = tar if entry.foreign is None else self.shardset.open_file(entry.texts)
        except BaseException:
            os.close(tar)
            raise
        return _OpenShard(entry, tar, texts, index)

    def _member(self, tar: int, span: tuple[int, int], suffix: str, shard: int, index: int) -> bytes:
        """A member of a tar of ours, whose header says nothing but its name and its size."""
        header, content = self._with_header(tar, span, shard, index)
        name = f"{self.key(shard, index)}{suffix}".encode("utf-8", "replace")
        if header[:100].rstrip(b"\0") != name or header[124:136] != b"%011o\0" % span[1]:
            self._not_the_indexed(shard, index)
        return content

    def _with_header(self, tar: int, span: tuple[int, int], shard: int, index: int) -> tuple[bytes, bytes]:
        # Two calls take less than one and cutting its bytes: a large photo is not copied.
        limit = self.shardset.manifest.shards[shard].size_bytes
        header = self._bytes(tar, span[0] - HEADER_BYTES, HEADER_BYTES, limit, shard, index)
        return header, self._bytes(tar, *span, limit, shard, index)

    def _bytes(self, descriptor: int, offset: int, size: int, limit: int, shard: int, index: int) -> bytes:
        # The limit is asked first: pread takes the memory for ``size`` bytes before it reads any.
        if not 0 <= offset <= offset + size <= limit:
            raise ShardError(
                "the index points outside the file",
                where=self.where(shard, index),
                got=f"{size:,} bytes at {offset:,}",
                wanted=f"within {limit:,}",
            )
        raw = os.pread(descriptor, size, offset)
        if len(raw) != size:
            raise ShardError("truncated tar", where=self.where(shard, index), got=f"{len(raw)} bytes", wanted=size)
        return raw

    def _not_the_indexed(self, shard: int, index: int) -> NoReturn:
        raise ShardError(
            "the index points at something else: the tar has changed since it was indexed",
            where=self.where(shard, index),
            do="Copy it again, or build or index the shards again.",
        )
