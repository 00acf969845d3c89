"""Verifying a ShardSet: every byte is read, every photo decoded, and every number compared with the manifest.

Of a ShardSet of features, every feature is read in place of decoding, and must be a finite number.

``ShardSet.open`` looks at names and sizes only; this is what to run after copying a ShardSet, or before trusting one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from pvtcap.errors import ShardError
from pvtcap.featureformat import check_finite
from pvtcap.photo import BadPhoto, decode_photo
from pvtcap.processes import map_in_order
from pvtcap.shardfiles import file_size
from pvtcap.shardfolder import SKIPPED
from pvtcap.shardformat import Foreign
from pvtcap.shardset import (
    MANIFEST,
    Manifest,
    Sample,
    ShardEntry,
    ShardIndex,
    ShardReader,
    ShardSet,
    SkippedItem,
    parse_json,
    sha256_file,
)
from pvtcap.tarwalk import open_tar, split_name, walk_tar


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong: in which file, with which sample (empty when it is the whole file's), and what."""

    shard: str
    key: str
    problem: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What verifying found. ``bytes_read`` counts the tars that were read to their last byte."""

    num_shards: int
    num_samples: int
    bytes_read: int
    problems: list[Problem]


@dataclass(frozen=True, slots=True)
class ShardFindings:
    """What reading one shard showed, with what has to be compared across shards."""

    problems: list[Problem]
    keys: list[str]
    image_ids: list[int | str]
    bytes_read: int = 0


def verify(
    path: str | Path, processes: int = 1, progress: Callable[[int], object] = lambda done: None
) -> list[Problem]:
    """All that is wrong with the ShardSet in ``path``; an empty list when it is whole. See ``inspect``."""
    return inspect(path, processes, progress).problems


def inspect(
    path: str | Path, processes: int = 1, progress: Callable[[int], object] = lambda done: None
) -> Verification:
    """Read the ShardSet in the folder or at the URL ``path`` to its last byte, in so many processes.

    A remote one comes through the cache, and its checksums are compared as it comes. ``progress`` is called with the
    number of samples just read. Raises ShardError when there is no manifest to verify against, or it is damaged;
    everything else that is wrong is a Problem.
    """
    shardset = ShardSet.at(path)
    manifest = shardset.manifest
    shards = (shardset.only(shard) for shard in range(len(manifest.shards)))
    with closing(map_in_order(verify_shard, shards, min(processes, len(manifest.shards)))) as findings:
        problems, bytes_read = _collect(findings, manifest, progress)
    problems += _verify_totals(shardset)
    return Verification(len(manifest.shards), manifest.num_samples, bytes_read, problems)


def verify_shard(shardset: ShardSet) -> ShardFindings:
    """Read the first shard of ``shardset`` to its last byte."""
    entry = shardset.manifest.shards[0]
    try:
        with ExitStack() as held:
            if shardset.mirror is not None:  # its files are then below its path, and stay there
                for file in {entry.index, entry.texts, entry.tar}:
                    held.callback(os.close, shardset.open_file(file))
            return _verify_shard(shardset, entry)
    except ShardError as error:  # it cannot be fetched
        return ShardFindings([Problem(entry.file, "", str(error))], [], [])
    except OSError as error:  # a disk that gives its bytes no more, or a file that is not ours to read
        return ShardFindings([Problem(entry.file, "", f"cannot be read: {error.strerror or error}")], [], [])


def _verify_shard(shardset: ShardSet, entry: ShardEntry) -> ShardFindings:
    tar = shardset.path / entry.file
    if (size := file_size(tar)) is None:
        return ShardFindings([Problem(entry.file, "", "the tar is missing")], [], [])
    problems: list[Problem] = []
    bytes_read = 0
    if size != entry.size_bytes:
        what = "truncated" if size < entry.size_bytes else "too long"
        problems.append(Problem(entry.file, "", f"{what}: {size:,} bytes; wanted {entry.size_bytes:,}"))
    else:
        if sha256_file(tar) != entry.sha256:
            problems.append(Problem(entry.file, "", "sha256 is not the manifest's: the bytes have changed"))
        bytes_read = size
    if entry.foreign is not None:
        problems += _verify_texts(shardset.path / entry.texts_file, entry.foreign)
    try:
        index = shardset.load_index(0)
    except ShardError as error:
        return ShardFindings([*problems, Problem(entry.index_file, "", str(error))], [], [], bytes_read)
    problems += _verify_members(tar, entry, index)
    if entry.foreign is not None and file_size(shardset.path / entry.texts_file) is None:
        return ShardFindings(problems, index.keys, [], bytes_read)
    samples, unreadable = _read_samples(shardset)
    if not unreadable and (count := sum(len(sample.captions) for sample in samples)) != entry.num_captions:
        problems.append(Problem(entry.file, "", f"{count:,} captions; wanted {entry.num_captions:,}"))
    return ShardFindings(problems + unreadable, index.keys, [sample.image_id for sample in samples], bytes_read)


def _verify_members(tar: Path, entry: ShardEntry, index: ShardIndex) -> list[Problem]:
    """Compare the index with the members as a walk over the tar, and so WebDataset, finds them."""
    try:
        descriptor = open_tar(tar)
        try:
            members = {(member.offset, member.size): member.name for member in walk_tar(descriptor, tar)}
        finally:
            os.close(descriptor)
    except (ShardError, OSError) as error:
        return [Problem(tar.name, "", str(error))]
    problems = []
    prefix = entry.foreign.key_prefix if entry.foreign else ""
    spans = {"photo": index.photos} | ({} if entry.foreign else {"text": index.texts})
    for what, column in spans.items():
        for key, span in zip(index.keys, column, strict=True):
            name = members.get(span, "nothing")
            if _key(name) != key.removeprefix(prefix):
                problems.append(Problem(tar.name, key, f"the index places its {what} where the tar has {name}"))
    # Of a tar that pvtcap did not write, not everything need be in the index.
    unknown = set() if entry.foreign else set(map(_key, members.values())) - set(index.keys)
    return problems + [Problem(tar.name, key, "in the tar, but not in the index") for key in sorted(unknown)]


def _key(name: str) -> str:
    named = split_name(name)
    return name if named is None else named[0]


def _verify_texts(texts: Path, foreign: Foreign) -> list[Problem]:
    if (size := file_size(texts)) is None:
        return [Problem(texts.name, "", "the file of texts is missing")]
    if size != foreign.texts_size_bytes:
        return [Problem(texts.name, "", f"{size:,} bytes; wanted {foreign.texts_size_bytes:,}")]
    if sha256_file(texts) != foreign.texts_sha256:
        return [Problem(texts.name, "", "sha256 is not the manifest's: the bytes have changed")]
    return []


def _read_samples(shardset: ShardSet) -> tuple[list[Sample], list[Problem]]:
    """Read and decode every sample by its place in the index; the samples come back without their photos."""
    samples: list[Sample] = []
    problems: list[Problem] = []
    entry, features = shardset.manifest.shards[0], shardset.manifest.features
    with ShardReader(shardset) as reader:
        for number in range(entry.num_samples):
            key = reader.key(0, number)
            try:
                sample = reader.read(0, number)
                if features is None:
                    size = decode_photo(sample.photo)
                else:
                    check_finite(sample.photo, features, reader.where(0, number))
                    size = sample.width, sample.height  # of the photo, which is elsewhere
            except BadPhoto as error:
                problems.append(Problem(entry.file, key, f"{error.reason}: {error.detail}"))
            except ShardError as error:
                problems.append(Problem(entry.file, key, str(error)))
            else:
                samples.append(sample._replace(photo=b""))
                if size != (sample.width, sample.height):
                    said = f"{sample.width} x {sample.height}"
                    problems.append(
                        Problem(entry.file, key, f"the photo is {size[0]} x {size[1]}, its text says {said}")
                    )
    return samples, problems


def _collect(
    findings: Iterable[ShardFindings], manifest: Manifest, progress: Callable[[int], object]
) -> tuple[list[Problem], int]:
    """All shards' problems and bytes read, with what only their comparison shows."""
    problems: list[Problem] = []
    bytes_read = 0
    seen: dict[tuple[str, str], str] = {}
    for entry, found in zip(manifest.shards, findings, strict=True):
        problems += found.problems
        bytes_read += found.bytes_read
        names = [("key", key) for key in found.keys] + [("image_id", str(image_id)) for image_id in found.image_ids]
        for kind, name in names:
            if (first := seen.setdefault((kind, name), entry.file)) != entry.file:
                problems.append(Problem(entry.file, name, f"the same {kind} is in {first}"))
        for kind, name in sorted(pair for pair, times in Counter(names).items() if times > 1):
            problems.append(Problem(entry.file, name, f"the same {kind} more than once"))
        progress(entry.num_samples)
    return problems, bytes_read


def _verify_totals(shardset: ShardSet) -> list[Problem]:
    """Compare the manifest's totals with its shards, and in a folder with skipped.jsonl and the tars that are there."""
    path, manifest = shardset.path, shardset.manifest
    problems: list[Problem] = []
    for what in ("num_samples", "num_captions"):
        total, wanted = sum(getattr(entry, what) for entry in manifest.shards), getattr(manifest, what)
        if total != wanted:
            problems.append(
                Problem(MANIFEST, "", f"the shards' {what} add up to {total:,}; the manifest says {wanted:,}")
            )
    if not manifest.num_samples:
        problems.append(Problem(MANIFEST, "", "no samples"))
    named = Counter(entry.file for entry in manifest.shards)
    for name, times in named.items():
        if times > 1:
            problems.append(Problem(MANIFEST, "", f"it names {name} {times} times"))
    if shardset.mirror is not None:
        return problems  # the manifest has no checksum of skipped.jsonl, and what else is there cannot be known
    skipped = path / SKIPPED
    items: list[SkippedItem] = []
    try:
        lines = skipped.read_bytes().splitlines() if skipped.exists() else []
        items = [parse_json(SkippedItem, line, skipped) for line in lines]
    except (ShardError, OSError) as error:
        problems.append(Problem(SKIPPED, "", str(error)))
    else:
        if (reasons := Counter(item.reason for item in items)) != manifest.skipped:
            problems.append(Problem(SKIPPED, "", f"it counts {dict(reasons)}; the manifest says {manifest.skipped}"))
    known = named.keys() | {item.key for item in items}
    for stray in sorted(file.name for file in path.glob("*.tar") if not {file.name, ascii(file.name)} & known):
        problems.append(Problem(stray, "", "a tar that the manifest does not name"))
    return problems
