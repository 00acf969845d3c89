"""Reading and writing the files of a ShardSet: sizes, checksums, JSON that is all there or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pvtcap.errors import ShardError
from pvtcap.shardformat import FORMAT, MANIFEST, Manifest


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
