"""A ShardSet: a folder of plain WebDataset tars with a byte-offset index beside each, and a manifest written last.

    flickr8k-train/
        flickr8k-train-000000.tar           KEY.jpg and KEY.json, one pair a sample
        flickr8k-train-000000.index.json    where each member's bytes lie in that tar
        skipped.jsonl                       what the build left out, one line each, with the reason
        manifest.json                       its existence means that the build is complete

``KEY.json`` is ``{image_id, captions, width, height, source}``: a photo is stored once with all its captions.
This module reads; ``shardwriter`` writes, ``shardverify`` reads every byte. Example::

    shardset = ShardSet.open(Path("data/flickr8k-train"))
    with ShardReader(shardset) as reader:
        sample = reader.read(shard=0, index=17)
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pvtcap.errors import ShardError

FORMAT = "pvtcap-shardset/1"
MANIFEST = "manifest.json"

# Narrower than pydantic's: a damaged manifest may hold a number of a thousand digits.
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
PositiveInt = Annotated[int, Field(ge=1, lt=2**63)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ShardEntry(_Record):
    """One shard, as the manifest knows it. Sizes are in bytes."""

    file: str = Field(pattern=r"^[^/\\]+\.tar$")
    num_samples: NonNegativeInt
    num_captions: NonNegativeInt
    size_bytes: NonNegativeInt
    sha256: str
    index_sha256: str

    @property
    def index_file(self) -> str:
        return index_name(self.file)


class Manifest(_Record):
    """What a complete ShardSet says of itself; ``build`` is the builder's name and options."""

    format: str
    name: str
    num_samples: NonNegativeInt
    num_captions: NonNegativeInt
    shards: list[ShardEntry]
    skipped: dict[str, PositiveInt] = {}
    build: dict[str, Any] = {}


class SkippedItem(_Record):
    """Something that a build left out: which, why in two or three words that can be counted, and the details."""

    key: str
    reason: str
    detail: str = ""


class ShardIndex(_Record):
    """Where the members of one shard lie: ``photos`` and ``texts`` are [offset, size] in bytes, aligned with ``keys``.

    The rest lets an interrupted build go on behind its last finished shard, without reading it: ``candidates`` is the
    range [start, stop) of the build's input that this shard used up, ``skipped`` what was left out of it,
    ``photo_digests`` (only where duplicates are dropped) the photos it holds.
    """

    keys: list[str]
    photos: list[tuple[NonNegativeInt, PositiveInt]]
    texts: list[tuple[NonNegativeInt, PositiveInt]]
    num_captions: NonNegativeInt
    candidates: tuple[NonNegativeInt, NonNegativeInt] = (0, 0)
    last_candidate: str = ""
    skipped: list[SkippedItem] = []
    tar_sha256: str = ""
    photo_digests: list[str] = []

    @classmethod
    def of_nothing(cls, candidates: tuple[int, int], last_candidate: str, skipped: list[SkippedItem]) -> Self:
        """What stands for a stretch of the input that gave no sample."""
        return cls(
            keys=[],
            photos=[],
            texts=[],
            num_captions=0,
            candidates=candidates,
            last_candidate=last_candidate,
            skipped=skipped,
        )


class _Text(BaseModel):
    """The content of KEY.json. Unknown members are allowed: other tools may add theirs."""

    image_id: int | str
    captions: list[str] = Field(min_length=1)
    width: PositiveInt
    height: PositiveInt
    source: str = ""


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
        raw = _read(path)
        if hashlib.sha256(raw).hexdigest() != entry.index_sha256:
            raise ShardError("the index is not the one in the manifest (sha256 differs)", where=path)
        index = parse_json(ShardIndex, raw, path)
        if not len(index.keys) == len(index.photos) == len(index.texts) == entry.num_samples:
            raise ShardError("wrong number of samples", where=path, got=len(index.keys), wanted=entry.num_samples)
        return index

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


class ShardReader:
    """Random access to samples by (shard, index); keeps files open. One a process: offsets are not shared."""

    def __init__(self, shardset: ShardSet) -> None:
        self.shardset = shardset
        self._open: dict[int, tuple[int, ShardIndex]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def key(self, shard: int, index: int) -> str:
        return self._shard(shard)[1].keys[index]

    def where(self, shard: int, index: int) -> str:
        """How an error names a sample."""
        return f"{self.shardset.path / self.shardset.manifest.shards[shard].file}, sample {self.key(shard, index)}"

    def read(self, shard: int, index: int) -> Sample:
        """One sample; the photo's bytes as stored. Raises ShardError on a short read or a damaged text member."""
        text = self.read_text(shard, index)
        descriptor, table = self._shard(shard)
        photo = self._bytes(descriptor, table.photos[index], shard, index)
        return Sample(text.key, text.image_id, text.captions, photo, text.width, text.height, text.source)

    def read_text(self, shard: int, index: int) -> Sample:
        """The sample with an empty ``photo``."""
        descriptor, table = self._shard(shard)
        raw = self._bytes(descriptor, table.texts[index], shard, index)
        text = parse_json(_Text, raw, self.where(shard, index))
        return Sample(table.keys[index], text.image_id, tuple(text.captions), b"", text.width, text.height, text.source)

    def _shard(self, shard: int) -> tuple[int, ShardIndex]:
        if shard not in self._open:
            if len(self._open) >= 64:  # far below the usual 1,024 open files, far above what a shuffle window needs
                os.close(self._open.pop(next(iter(self._open)))[0])
            index = self.shardset.load_index(shard)
            path = self.shardset.path / self.shardset.manifest.shards[shard].file
            try:
                self._open[shard] = os.open(path, os.O_RDONLY), index
            except OSError as error:
                raise ShardError(f"cannot open the shard: {error.strerror}", where=path) from error
        return self._open[shard]

    def _bytes(self, descriptor: int, span: tuple[int, int], shard: int, index: int) -> bytes:
        offset, size = span
        # A damaged index may ask for more than memory holds, at an offset that the system cannot even be asked for.
        there = max(0, min(size, os.fstat(descriptor).st_size - offset))
        raw = os.pread(descriptor, there, offset) if there else b""
        if len(raw) != size:
            raise ShardError("truncated tar", where=self.where(shard, index), got=f"{len(raw)} bytes", wanted=size)
        return raw


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
    manifest = parse_json(Manifest, _read(manifest_path), manifest_path)
    if manifest.format != FORMAT:
        raise ShardError("unknown format", where=manifest_path, got=manifest.format, wanted=FORMAT)
    return manifest


def index_name(tar_name: str) -> str:
    """The index file that belongs to a tar."""
    return tar_name.removesuffix(".tar") + ".index.json"


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


M = TypeVar("M", bound=BaseModel)


def parse_json(model: type[M], raw: bytes, where: object) -> M:
    """Validate JSON bytes as ``model``; ShardError names the first thing wrong with it."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ShardError(
            f"not a valid {model.__name__.strip('_')}: {place} {first['msg']}".replace(":  ", ": "), where=where
        ) from None


def write_json(path: Path, content: dict[str, Any] | list[Any]) -> None:
    """Write JSON under a temporary name, flush it to disk, and rename: readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def file_size(path: Path) -> int | None:
    """A file's size in bytes; None when there is no such file, or can be none of that name."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ShardError(f"cannot read: {error.strerror}", where=path) from error


def _check_size(path: Path, wanted: int) -> None:
    if (size := file_size(path)) is None:
        raise ShardError("a shard named in the manifest is missing", where=path, do="Copy it back or build it again.")
    if size != wanted:
        what = "truncated tar" if size < wanted else "a tar larger than its manifest says"
        raise ShardError(what, where=path, got=f"{size:,} bytes", wanted=f"{wanted:,}", do="Copy or build it again.")
