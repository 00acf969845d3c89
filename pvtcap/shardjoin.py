"""pvtcap shards join PART [PART ...] --out OUT: one ShardSet of several, the parts of an array job for example.

Nothing is copied: OUT gets hard links to the parts' tars and indexes (symbolic links where it lies on another
filesystem), one skipped.jsonl and one manifest, in the order of the parts. Parts that --part I/N built must all be
there. The parts stay as they are; with hard links they may be removed afterwards.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from pvtcap.errors import ShardError
from pvtcap.shardfolder import SKIPPED
from pvtcap.shardset import FORMAT, MANIFEST, Manifest, ShardEntry, ShardReader, ShardSet, write_json


def run(words: list[str]) -> None:
    """The command with its words; says what was joined."""
    parser = argparse.ArgumentParser(
        "pvtcap shards join", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", type=Path, nargs="+", metavar="PART", help="a ShardSet's folder")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="a new folder")
    args = parser.parse_args(words)
    manifest, num_repeated = join(args.parts, args.out)
    console = Console(highlight=False, markup=False)
    shards, samples = len(manifest.shards), manifest.num_samples
    console.print(f"{args.out}: {samples:,} samples in {shards:,} shards of {len(args.parts):,} parts")
    if num_repeated:
        console.print(f"{num_repeated:,} photos are in more than one part: duplicates are dropped within a part only.")


def join(parts: Sequence[Path], out: Path) -> tuple[Manifest, int]:
    """Join ``parts`` in ``out``; the manifest, and how many photos are there more than once as far as that is known.

    Everything is made in a folder beside ``out`` that becomes ``out`` in one step. Raises ShardError when ``out``
    exists, a part is not complete or not there, has other features than the first, or two parts have a tar's name, a
    key or an image_id in common.
    """
    if out.exists():
        raise ShardError("the folder is there already", where=out, do="Give --out a new folder.")
    shardsets = [ShardSet.open(part) for part in parts]
    _check_parts(shardsets)
    _check_features(shardsets)
    _check_names(shardsets)
    num_repeated = _check_keys(shardsets)
    manifest = _joined(shardsets, out.resolve().name)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir(parents=True)
        for shardset in shardsets:
            for entry in shardset.manifest.shards:
                for name in _files(entry):
                    _link(shardset.path / name, partial / name)
        with (partial / SKIPPED).open("wb") as joined:
            for shardset in shardsets:
                if (skipped := shardset.path / SKIPPED).exists():
                    with skipped.open("rb") as lines:
                        shutil.copyfileobj(lines, joined)
        write_json(partial / MANIFEST, manifest.model_dump(mode="json"))
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ShardError(f"cannot join: {error.strerror or error}", where=out) from error
    return manifest, num_repeated


def _joined(shardsets: Sequence[ShardSet], name: str) -> Manifest:
    manifests = [shardset.manifest for shardset in shardsets]
    return Manifest(
        format=FORMAT,
        name=name,
        num_samples=sum(manifest.num_samples for manifest in manifests),
        num_captions=sum(manifest.num_captions for manifest in manifests),
        shards=[entry for manifest in manifests for entry in manifest.shards],
        skipped=dict(sorted(sum((Counter(manifest.skipped) for manifest in manifests), Counter[str]()).items())),
        build={"builder": "join", "parts": [{"name": each.name, **each.build} for each in manifests]},
        features=manifests[0].features,
    )


def _check_parts(shardsets: Sequence[ShardSet]) -> None:
    """Where the ShardSets say that they are parts I/N, each of the N has to be there once."""
    found = [(shardset, str(shardset.manifest.build.get("part", "1/1"))) for shardset in shardsets]
    numbers: dict[int, Path] = {}
    totals = {part.partition("/")[2] for _, part in found}
    if totals == {"1"}:
        return
    if len(totals) > 1:
        raise ShardError("parts of different builds", got=", ".join(sorted({part for _, part in found})))
    total = int(totals.pop())
    for shardset, part in found:
        number = int(re.split("/", part)[0])
        if number in numbers:
            raise ShardError(f"part {part} is there twice", where=shardset.path, got=numbers[number])
        numbers[number] = shardset.path
    if missing := sorted(set(range(1, total + 1)) - numbers.keys()):
        raise ShardError(
            "parts are missing",
            got=f"{len(numbers)} of {total}",
            wanted=", ".join(f"{number}/{total}" for number in missing[:5]),
            do="Build them, and name them too.",
        )


def _check_features(shardsets: Sequence[ShardSet]) -> None:
    """All have photos, or the same features."""
    first, *others = ({} if (found := each.manifest.features) is None else found.model_dump() for each in shardsets)
    for shardset, other in zip(shardsets[1:], others, strict=True):
        if not first or not other:
            kinds = ["features" if each else "photos" for each in (other, first)]
        else:
            kinds = [
                ", ".join(f"{key}={a[key]}" for key in a if a[key] != b[key])
                for a, b in ((other, first), (first, other))
            ]
        if other != first:
            raise ShardError("parts of different features", where=shardset.path, got=kinds[0], wanted=kinds[1])


def _check_names(shardsets: Sequence[ShardSet]) -> None:
    seen: dict[str, Path] = {}
    for shardset in shardsets:
        for entry in shardset.manifest.shards:
            if (first := seen.setdefault(entry.file, shardset.path)) != shardset.path:
                raise ShardError(
                    f"{entry.file} is in two parts",
                    where=shardset.path,
                    got=first,
                    do="A ShardSet's tars have the name of its folder: build each in a folder of another name.",
                )


def _check_keys(shardsets: Sequence[ShardSet]) -> int:
    """Raises ShardError for a key or image_id in two places; gives the number of photos that are in more than one."""
    keys, image_ids, photos = [], [], []
    for shardset in shardsets:
        with ShardReader(shardset) as reader:
            for shard, size in enumerate(shardset.sizes):
                index = shardset.load_index(shard)
                keys.append(_hashes(index.keys))
                image_ids.append(_hashes([str(reader.read_text(shard, number).image_id) for number in range(size)]))
                photos.append(np.array([int(digest, 16) for digest in index.photo_digests], dtype=np.uint64))
    for what, hashes in (("key", keys), ("image_id", image_ids)):
        if repeated := _repeated(hashes):
            shard = next(number for number, column in enumerate(hashes) if repeated & set(column.tolist()))
            entries = [(each.path, entry.file) for each in shardsets for entry in each.manifest.shards]
            path, file = entries[shard]
            raise ShardError(
                f"{len(repeated):,} {what}s are there twice, the first in this shard",
                where=path / file,
                do="Only ShardSets of different photos can be one.",
            )
    return len(_repeated(photos))


def _hashes(names: Sequence[str]) -> NDArray[np.uint64]:
    """64 bits of each name: millions of names as such would not fit into memory."""
    digests = b"".join(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, dtype=np.uint64)


def _repeated(columns: Sequence[NDArray[np.uint64]]) -> set[int]:
    values, times = np.unique(np.concatenate(columns), return_counts=True)
    return set(values[times > 1].tolist())


def _files(entry: ShardEntry) -> list[str]:
    return [entry.file, entry.index_file] + ([] if entry.foreign is None else [entry.texts_file])


def _link(source: Path, target: Path) -> None:
    source = source.resolve()  # the tars of an indexed ShardSet may be links themselves
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        target.symlink_to(source)
