"""One shard being written: a tar, and the index that says where its members lie and that it is finished."""

from __future__ import annotations

import hashlib
import os
import tarfile
from contextlib import suppress
from pathlib import Path

from pvtcap.candidate import Prepared
from pvtcap.shardformat import index_name
from pvtcap.shardset import ShardEntry, ShardIndex, SkippedItem, sha256_file, write_json


class ShardTar:
    """Plain USTAR, no times, no owners, so that the same samples are the same bytes.

    It is written as ``.tar.partial``; ``finish`` flushes it to disk, renames it and then writes the index.
    """

    def __init__(self, path: Path, with_digests: bool = False, photo_suffix: str = ".jpg") -> None:
        self.path, self._with_digests, self._photo_suffix = path, with_digests, photo_suffix
        self._partial = path.with_name(path.name + ".partial")
        self._file = self._partial.open("wb")
        self._sha256 = hashlib.sha256()
        self._offset = 0
        self._keys: list[str] = []
        self._photos: list[tuple[int, int]] = []
        self._texts: list[tuple[int, int]] = []
        self._digests: list[str] = []
        self._num_captions = 0

    @property
    def num_samples(self) -> int:
        return len(self._keys)

    def size_with(self, sample: Prepared) -> int:
        """The finished tar's size in bytes if ``sample`` were its last."""
        return tar_size(self._offset + 2 * tarfile.BLOCKSIZE + padded(len(sample.photo)) + padded(len(sample.text)))

    def add(self, sample: Prepared) -> None:
        self._photos.append(self._write_member(sample.key + self._photo_suffix, sample.photo))
        self._texts.append(self._write_member(f"{sample.key}.json", sample.text))
        self._keys.append(sample.key)
        if self._with_digests:
            self._digests.append(photo_digest(sample.photo))
        self._num_captions += sample.num_captions

    def finish(self, candidates: tuple[int, int], last_candidate: str, skipped: list[SkippedItem]) -> ShardEntry:
        """Close the tar, rename it, write its index: from here on the shard is finished."""
        self._write(bytes(tar_size(self._offset) - self._offset))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self.path)
        index = ShardIndex(
            keys=self._keys,
            photos=self._photos,
            texts=self._texts,
            num_captions=self._num_captions,
            candidates=candidates,
            last_candidate=last_candidate,
            skipped=skipped,
            tar_sha256=self._sha256.hexdigest(),
            photo_digests=self._digests,
        )
        write_json(self.path.with_name(index_name(self.path.name)), index.model_dump(mode="json"))
        return shard_entry(self.path, index)

    def abandon(self) -> None:
        with suppress(OSError):  # a full disk is told of once more when the buffer is flushed
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def _write_member(self, name: str, content: bytes) -> tuple[int, int]:
        header = tarfile.TarInfo(name)
        header.size = len(content)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        span = self._offset, len(content)
        self._write(content + bytes(padded(len(content)) - len(content)))
        return span

    def _write(self, block: bytes) -> None:
        self._file.write(block)
        self._sha256.update(block)
        self._offset += len(block)


def photo_digest(photo: bytes) -> str:
    """Tells photos apart: 64 bits of sha256, so ten million photos meet by chance once in 400,000 such sets."""
    return hashlib.sha256(photo).hexdigest()[:16]


def shard_entry(tar: Path, index: ShardIndex) -> ShardEntry:
    """What the manifest says of a finished shard."""
    return ShardEntry(
        file=tar.name,
        num_samples=len(index.keys),
        num_captions=index.num_captions,
        size_bytes=tar.stat().st_size,
        sha256=index.tar_sha256,
        index_sha256=sha256_file(tar.with_name(index_name(tar.name))),
    )


def padded(size: int) -> int:
    """``size`` in whole tar blocks, in bytes."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def tar_size(members: int) -> int:
    """The size of a whole tar whose last member ends at ``members`` bytes: two empty blocks, and a record filled."""
    return -(-(padded(members) + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
