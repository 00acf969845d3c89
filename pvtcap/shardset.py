"""A ShardSet: a folder of plain WebDataset tars with a byte-offset index beside each, and a manifest written last.

    flickr8k-train/
        flickr8k-train-000000.tar           KEY.jpg and KEY.json, one pair a sample
        flickr8k-train-000000.index.json    where each member's bytes lie in that tar
        skipped.jsonl                       what the build left out, one line each, with the reason
        manifest.json                       its existence means that the build is complete

``KEY.json`` is ``{image_id, captions, width, height, source}``: a photo is stored once with all its captions. Tars of
another's (``pvtcap shards index``) stay as they are; their texts lie in ``*.texts.jsonl`` beside them.
This module reads; ``shardwriter`` and ``shardindex`` write, ``shardverify`` reads every byte. Example::

    shardset = ShardSet.open(Path("data/flickr8k-train"))
    with ShardReader(shardset) as reader:
        sample = reader.read(shard=0, index=17)
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self

from pvtcap.errors import ShardError
from pvtcap.shardformat import (
    FORMAT,
    HEADER_BYTES,
    MANIFEST,
    Foreign,
    ForeignIndex,
    Manifest,
    ShardEntry,
    ShardIndex,
    SkippedItem,
    Text,
    file_size,
    header_crc,
    index_name,
    parse_json,
    read_file,
    sha256_file,
    texts_name,
    write_json,
)

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Foreign",
    "ForeignIndex",
    "Manifest",
    "Sample",
    "ShardEntry",
    "ShardIndex",
    "ShardReader",
    "ShardSet",
    "SkippedItem",
    "file_size",
    "index_name",
    "parse_json",
    "read_manifest",
    "sha256_file",
    "texts_name",
    "write_json",
]


@dataclass(frozen=True, slots=True)
class Sample:
    """A photo (encoded, as stored) with all its captions. ``width`` and ``height`` are in pixels."""

    key: str
    image_id: int | str
    captions: tuple[str, ...]
    photo: bytes
    width: int
    height: int
    source: str = ""


@dataclass(frozen=True)
class ShardSet:
    """A complete ShardSet, checked as far as names and sizes go; ``verify`` reads every byte."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a ShardSet; raises ShardError when it is missing, incomplete, or a tar has not the size it should."""
        manifest = read_manifest(path)
        for entry in manifest.shards:
            _check_size(path / entry.file, entry.size_bytes)
            if entry.foreign is not None:
                _check_size(path / entry.texts_file, entry.foreign.texts_size_bytes)
        if twice := [file for file, times in Counter(entry.file for entry in manifest.shards).items() if times > 1]:
            raise ShardError("a shard is named twice", where=path / MANIFEST, got=twice[0])
        if sum(entry.num_samples for entry in manifest.shards) != manifest.num_samples:
            raise ShardError(
                "the shards' sample counts do not add up", where=path / MANIFEST, wanted=manifest.num_samples
            )
        if manifest.num_samples == 0:
            raise ShardError("a ShardSet without samples", where=path)
        return cls(path, manifest)

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
        return type(self)(self.path, self.manifest.model_copy(update={"shards": [self.manifest.shards[shard]]}))

    def load_index(self, shard: int) -> ShardIndex:
        """The index of one shard, its checksum and lengths checked."""
        entry = self.manifest.shards[shard]
        path = self.path / entry.index_file
        if file_size(path) is None:
            raise ShardError("a shard's index is missing", where=path, do="Build the shards again.")
        raw = read_file(path)
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

    def keys(self) -> Iterator[str]:
        """All keys in storage order."""
        for shard in range(len(self.manifest.shards)):
            yield from self.load_index(shard).keys

    def captions(self) -> Iterator[tuple[str, ...]]:
        """All samples' captions in storage order, without reading a photo."""
        with ShardReader(self) as reader:
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
    """Random access to samples by (shard, index); keeps files open. One a process: offsets are not shared.

    What it promises of a tar that has changed since it was indexed: a sample is read only from behind the very tar
    header that belongs to its key, with its size. A photo's own bytes have no checksum of their own: ``verify``
    compares those.
    """

    def __init__(self, shardset: ShardSet) -> None:
        self.shardset = shardset
        self._open: dict[int, _OpenShard] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for shard in self._open.values():
            shard.close()
        self._open.clear()

    def key(self, shard: int, index: int) -> str:
        return self._shard(shard).index.keys[index]

    def where(self, shard: int, index: int) -> str:
        """How an error names a sample."""
        return f"{self.shardset.path}/{self.shardset.manifest.shards[shard].file}, sample {self.key(shard, index)}"

    def number(self, shard: int, index: int) -> str:
        """The same, known before anything of the shard has been read."""
        return f"{self.shardset.path}/{self.shardset.manifest.shards[shard].file}, sample number {index}"

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
            photo = self._member(opened.tar, span, ".jpg", shard, index)
        return Sample(text.key, text.image_id, text.captions, photo, text.width, text.height, text.source)

    def read_text(self, shard: int, index: int) -> Sample:
        """The sample with an empty ``photo``."""
        opened = self._shard(shard)
        key, span = opened.index.keys[index], opened.index.texts[index]
        foreign = opened.entry.foreign
        if foreign is None:
            text = parse_json(Text, self._member(opened.texts, span, ".json", shard, index), self.where(shard, index))
            image_id = text.image_id
        else:
            line = self._bytes(opened.texts, *span, foreign.texts_size_bytes, shard, index)
            text = parse_json(Text, line, self.where(shard, index))
            image_id = f"{foreign.key_prefix}{text.image_id}"
            if image_id != key:
                self._not_the_indexed(shard, index)
        return Sample(key, image_id, tuple(text.captions), b"", text.width, text.height, text.source)

    def _shard(self, shard: int) -> _OpenShard:
        if shard not in self._open:
            if len(self._open) >= 64:  # far below the usual 1,024 open files, far above what a shuffle window needs
                self._open.pop(next(iter(self._open))).close()
            entry, index = self.shardset.manifest.shards[shard], self.shardset.load_index(shard)
            tar = _descriptor(self.shardset.path / entry.file)
            try:
                texts = tar if entry.foreign is None else _descriptor(self.shardset.path / entry.texts_file)
            except ShardError:
                os.close(tar)
                raise
            self._open[shard] = _OpenShard(entry, tar, texts, index)
        return self._open[shard]

    def _member(self, tar: int, span: tuple[int, int], suffix: str, shard: int, index: int) -> bytes:
        """A member of a tar of ours, whose header says nothing but its name and its size."""
        header, content = self._with_header(tar, span, shard, index)
        name = f"{self.key(shard, index)}{suffix}".encode("utf-8", "replace")
        if header[:100].rstrip(b"\0") != name or header[124:136] != b"%011o\0" % span[1]:
            self._not_the_indexed(shard, index)
        return content

    def _with_header(self, tar: int, span: tuple[int, int], shard: int, index: int) -> tuple[bytes, bytes]:
        # One read: the header costs 512 bytes more and no call.
        limit = self.shardset.manifest.shards[shard].size_bytes
        raw = self._bytes(tar, span[0] - HEADER_BYTES, span[1] + HEADER_BYTES, limit, shard, index)
        return raw[:HEADER_BYTES], raw[HEADER_BYTES:]

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


def read_manifest(path: Path) -> Manifest:
    """The manifest of the ShardSet in folder ``path``. Raises ShardError when it is missing or not of this format."""
    if not path.is_dir():
        raise ShardError("no such shard folder", where=path, do="Build one with 'pvtcap shards BUILDER --out DIR'.")
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise ShardError(
            f"shard folder without a {MANIFEST}",
            where=path,
            do="Its build did not finish: run the same 'pvtcap shards' command again and it goes on.",
        )
    manifest = parse_json(Manifest, read_file(manifest_path), manifest_path)
    if manifest.format != FORMAT:
        raise ShardError("unknown format", where=manifest_path, got=manifest.format, wanted=FORMAT)
    return manifest


def _check_size(path: Path, wanted: int) -> None:
    if (size := file_size(path)) is None:
        raise ShardError("a shard named in the manifest is missing", where=path, do="Copy it back or build it again.")
    if size != wanted:
        kind = "tar" if path.suffix == ".tar" else "file of texts"
        what = f"truncated {kind}" if size < wanted else f"a {kind} larger than its manifest says"
        raise ShardError(what, where=path, got=f"{size:,} bytes", wanted=f"{wanted:,}", do="Copy or build it again.")


def _descriptor(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ShardError(f"cannot open the shard: {error.strerror}", where=path) from error
