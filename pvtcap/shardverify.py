"""Verifying a ShardSet: every byte is read, every photo decoded, and every number compared with the manifest.

``ShardSet.open`` looks at names and sizes only; this is what to run after copying a ShardSet, or before trusting one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from pvtcap.errors import ShardError
from pvtcap.photo import BadPhoto, decode_photo
from pvtcap.shardfolder import SKIPPED
from pvtcap.shardset import (
    MANIFEST,
    Foreign,
    Manifest,
    Sample,
    ShardEntry,
    ShardIndex,
    ShardReader,
    ShardSet,
    SkippedItem,
    parse_json,
    read_manifest,
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
class ShardFindings:
    """What reading one shard showed, with what has to be compared across shards."""

    problems: list[Problem]
    keys: list[str]
    image_ids: list[int | str]


def verify(path: Path, processes: int = 1, progress: Callable[[int], object] = lambda done: None) -> list[Problem]:
    """All that is wrong with the ShardSet in ``path``; an empty list when it is whole.

    ``progress`` is called with the number of samples just read. Raises ShardError when there is no manifest to verify
    against.
    """
    manifest = read_manifest(path)
    check = partial(verify_shard, path, manifest)
    shards = range(len(manifest.shards))
    if processes <= 1:
        problems = _collect(map(check, shards), manifest, progress)
    else:
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            problems = _collect(pool.map(check, shards), manifest, progress)
    return problems + _verify_totals(path, manifest)


def verify_shard(path: Path, manifest: Manifest, shard: int) -> ShardFindings:
    """Read one shard to its last byte."""
    entry = manifest.shards[shard]
    tar = path / entry.file
    if not tar.is_file():
        return ShardFindings([Problem(entry.file, "", "the tar is missing")], [], [])
    problems: list[Problem] = []
    if (size := tar.stat().st_size) != entry.size_bytes:
        what = "truncated" if size < entry.size_bytes else "too long"
        problems.append(Problem(entry.file, "", f"{what}: {size:,} bytes; wanted {entry.size_bytes:,}"))
    elif sha256_file(tar) != entry.sha256:
        problems.append(Problem(entry.file, "", "sha256 is not the manifest's: the bytes have changed"))
    if entry.foreign is not None:
        problems += _verify_texts(path / entry.texts_file, entry.foreign)
    shardset = ShardSet(path, manifest)
    try:
        index = shardset.load_index(shard)
    except ShardError as error:
        return ShardFindings([*problems, Problem(entry.index_file, "", str(error))], [], [])
    problems += _verify_members(tar, entry, index)
    if entry.foreign is not None and not (path / entry.texts_file).is_file():
        return ShardFindings(problems, index.keys, [])
    samples, unreadable = _read_samples(shardset, shard)
    if not unreadable and (count := sum(len(sample.captions) for sample in samples)) != entry.num_captions:
        problems.append(Problem(entry.file, "", f"{count:,} captions; wanted {entry.num_captions:,}"))
    return ShardFindings(problems + unreadable, index.keys, [sample.image_id for sample in samples])


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
    if not texts.is_file():
        return [Problem(texts.name, "", "the file of texts is missing")]
    if (size := texts.stat().st_size) != foreign.texts_size_bytes:
        return [Problem(texts.name, "", f"{size:,} bytes; wanted {foreign.texts_size_bytes:,}")]
    if sha256_file(texts) != foreign.texts_sha256:
        return [Problem(texts.name, "", "sha256 is not the manifest's: the bytes have changed")]
    return []


def _read_samples(shardset: ShardSet, shard: int) -> tuple[list[Sample], list[Problem]]:
    """Read and decode every sample by its place in the index; the samples come back without their photos."""
    samples: list[Sample] = []
    problems: list[Problem] = []
    entry = shardset.manifest.shards[shard]
    with ShardReader(shardset) as reader:
        for number in range(entry.num_samples):
            key = reader.key(shard, number)
            try:
                sample = reader.read(shard, number)
                size = decode_photo(sample.photo)
            except BadPhoto as error:
                problems.append(Problem(entry.file, key, f"{error.reason}: {error.detail}"))
            except ShardError as error:
                problems.append(Problem(entry.file, key, str(error)))
            else:
                samples.append(replace(sample, photo=b""))
                if size != (sample.width, sample.height):
                    said = f"{sample.width} x {sample.height}"
                    problems.append(
                        Problem(entry.file, key, f"the photo is {size[0]} x {size[1]}, its text says {said}")
                    )
    return samples, problems


def _collect(findings: Iterable[ShardFindings], manifest: Manifest, progress: Callable[[int], object]) -> list[Problem]:
    problems: list[Problem] = []
    seen: dict[tuple[str, str], str] = {}
    for entry, found in zip(manifest.shards, findings, strict=True):
        problems += found.problems
        names = [("key", key) for key in found.keys] + [("image_id", str(image_id)) for image_id in found.image_ids]
        for kind, name in names:
            if (first := seen.setdefault((kind, name), entry.file)) != entry.file:
                problems.append(Problem(entry.file, name, f"the same {kind} is in {first}"))
        for kind, name in sorted(pair for pair, times in Counter(names).items() if times > 1):
            problems.append(Problem(entry.file, name, f"the same {kind} more than once"))
        progress(entry.num_samples)
    return problems


def _verify_totals(path: Path, manifest: Manifest) -> list[Problem]:
    """Compare the manifest's totals with its shards, with skipped.jsonl, and with the tars in the folder."""
    problems: list[Problem] = []
    for what in ("num_samples", "num_captions"):
        total, wanted = sum(getattr(entry, what) for entry in manifest.shards), getattr(manifest, what)
        if total != wanted:
            problems.append(
                Problem(MANIFEST, "", f"the shards' {what} add up to {total:,}; the manifest says {wanted:,}")
            )
    skipped = path / SKIPPED
    items: list[SkippedItem] = []
    try:
        lines = skipped.read_bytes().splitlines() if skipped.exists() else []
        items = [parse_json(SkippedItem, line, skipped) for line in lines]
    except ShardError as error:
        problems.append(Problem(SKIPPED, "", str(error)))
    else:
        if (reasons := Counter(item.reason for item in items)) != manifest.skipped:
            problems.append(Problem(SKIPPED, "", f"it counts {dict(reasons)}; the manifest says {manifest.skipped}"))
    named = {entry.file for entry in manifest.shards} | {item.key for item in items}
    for stray in sorted(file.name for file in path.glob("*.tar") if not {file.name, ascii(file.name)} & named):
        problems.append(Problem(stray, "", "a tar that the manifest does not name"))
    return problems
