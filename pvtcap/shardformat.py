"""What a ShardSet's JSON files say: the manifest, the indexes, the texts; how they are read and written.

A tar that pvtcap wrote holds its texts, in the form of ``Text``. For a tar of another's (``pvtcap shards index``) they
lie beside it, a line a sample in that same form, and the manifest's entry of it has a ``foreign``.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)

from pvtcap.errors import ShardError

FORMAT = "pvtcap-shardset/1"
MANIFEST = "manifest.json"
MAX_FILE_BYTES = 230  # of a tar's name: with .texts.jsonl.partial it is still one
HEADER_BYTES = 512  # what stands before each member of a tar

# Narrower than pydantic's: a damaged manifest may hold a number of a thousand digits.
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
PositiveInt = Annotated[int, Field(ge=1, lt=2**63)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ShardFile(NamedTuple):
    """A file of a shard, and what the manifest knows of it."""

    name: str
    size_bytes: int | None
    sha256: str


class Foreign(_Record):
    """What ``shards index`` adds of a tar that pvtcap did not write.

    ``key_prefix`` stands before each key of the index, and is empty unless tars of the ShardSet share keys.
    """

    texts_size_bytes: NonNegativeInt
    texts_sha256: str
    key_prefix: str = ""


class ShardEntry(_Record):
    """One shard, as the manifest knows it. Sizes are in bytes."""

    file: str = Field(pattern=r"^[^/\\]+\.tar$")
    num_samples: NonNegativeInt
    num_captions: NonNegativeInt
    size_bytes: NonNegativeInt
    sha256: str
    index_sha256: str
    foreign: Foreign | None = None

    @field_validator("file")
    @classmethod
    def _short_enough(cls, file: str) -> str:
        if len(file.encode()) > MAX_FILE_BYTES:
            raise ValueError("too long for the name of a file")
        return file

    @property
    def index_file(self) -> str:
        return index_name(self.file)

    @property
    def texts_file(self) -> str:
        return texts_name(self.file)

    @property
    def tar(self) -> ShardFile:
        return ShardFile(self.file, self.size_bytes, self.sha256)

    @property
    def index(self) -> ShardFile:
        return ShardFile(self.index_file, None, self.index_sha256)

    @property
    def texts(self) -> ShardFile:
        """Where the texts lie: in the tar itself, or beside a foreign one."""
        if self.foreign is None:
            return self.tar
        return ShardFile(self.texts_file, self.foreign.texts_size_bytes, self.foreign.texts_sha256)

    @model_serializer(mode="wrap")
    def _as_ever_unless_foreign(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A ShardSet that pvtcap builds is the same bytes as before there were others.
        return {name: value for name, value in dump(self).items() if name != "foreign" or value is not None}


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


class ForeignIndex(ShardIndex):
    """Of a foreign tar: ``texts`` lie in its file of texts, ``headers`` are the ``header_crc`` of the photos."""

    headers: list[NonNegativeInt]


class Text(BaseModel):
    """The content of KEY.json, or of a line of texts. Unknown members are allowed: other tools may add theirs."""

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


def header_crc(header: bytes, size: int) -> int:
    """CRC-32 of the block before a member of a tar and of the member's size, which may stand elsewhere."""
    return zlib.crc32(b"%d" % size, zlib.crc32(header))


def index_name(tar_name: str) -> str:
    """The index file that belongs to a tar."""
    return tar_name.removesuffix(".tar") + ".index.json"


def texts_name(tar_name: str) -> str:
    """The file of texts that belongs to a foreign tar."""
    return tar_name.removesuffix(".tar") + ".texts.jsonl"


def file_size(path: Path) -> int | None:
    """A file's size in bytes; None when there is no such file, or can be none of that name."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def read_file(path: Path) -> bytes:
    """A file's content. Raises ShardError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ShardError(f"cannot read: {error.strerror}", where=path) from error


def open_file(path: Path) -> int:
    """A file's descriptor, for reading. Raises ShardError."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ShardError(f"cannot open the shard: {error.strerror}", where=path) from error


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
            f"not a valid {model.__name__}: {place} {first['msg']}".replace(":  ", ": "), where=where
        ) from None


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
    return parse_manifest(read_file(manifest_path), manifest_path)


def parse_manifest(raw: bytes, where: object) -> Manifest:
    """A manifest's content. Raises ShardError when it is not of this format."""
    manifest = parse_json(Manifest, raw, where)
    if manifest.format != FORMAT:
        raise ShardError("unknown format", where=where, got=manifest.format, wanted=FORMAT)
    return manifest


def check_size(path: Path, wanted: int) -> None:
    """Raises ShardError unless there is a file of this size."""
    if (size := file_size(path)) is None:
        raise ShardError("a shard named in the manifest is missing", where=path, do="Copy it back or build it again.")
    if size != wanted:
        kind = "tar" if path.suffix == ".tar" else "file of texts"
        what = f"truncated {kind}" if size < wanted else f"a {kind} larger than its manifest says"
        raise ShardError(what, where=path, got=f"{size:,} bytes", wanted=f"{wanted:,}", do="Copy or build it again.")


def write_json(path: Path, content: dict[str, Any] | list[Any]) -> None:
    """Write JSON under a temporary name, flush it to disk, and rename: readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # a folder that cannot be written to has none
            partial.unlink(missing_ok=True)
        raise
