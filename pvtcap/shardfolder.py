"""The out folder of a build: tars written one after the other, resumed after an interruption, complete at the end.

    building.json     what is being built: there from the first moment until the manifest is; resuming compares it
    NAME-000000.tar   written as .tar.partial, flushed, renamed; then its index, which says that the shard is finished
    NAME-skipped-000000.json    an index without a tar: a long stretch of the input that gave no sample (dead links)
    skipped.jsonl     then
    manifest.json     last

Whatever stops a build, finished shards stay and partial files mean nothing: the next run deletes them.
"""

from __future__ import annotations

import errno
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pvtcap.candidate import Prepared
from pvtcap.errors import ShardError
from pvtcap.shardformat import index_name
from pvtcap.shardset import FORMAT, MANIFEST, Manifest, ShardEntry, ShardIndex, SkippedItem, parse_json, write_json
from pvtcap.shardtar import ShardTar, photo_digest, shard_entry, tar_size

BUILDING = "building.json"
SKIPPED = "skipped.jsonl"
REPORT = "report.json"  # a builder may write one
_MOST_CANDIDATES = 10  # times samples_per_shard: where few photos can be had, shards are cut all the same


class ShardFolder:
    """Writes samples in the order of ``add``; behind the shards an interrupted build of the same kind has finished.

    A shard is cut before it has more than ``samples_per_shard`` samples or ``shard_bytes`` bytes; a single sample
    larger than that has a shard to itself. It is cut too when it has used up ten times as many candidates, so that
    an interruption never costs more than those, and memory holds what was left out of no more.
    """

    def __init__(
        self, path: Path, samples_per_shard: int, shard_bytes: int | None = None, drop_duplicates: bool = False
    ) -> None:
        self.path = path
        self.samples_per_shard, self.shard_bytes = samples_per_shard, shard_bytes
        self.drop_duplicates = drop_duplicates
        self.entries: list[ShardEntry] = []
        self.skipped: Counter[str] = Counter()  # by reason
        self.examples: dict[str, SkippedItem] = {}  # the first of each reason
        self.num_samples = 0
        self.num_candidates = 0
        self._next_candidate = 0  # the first that belongs to the shard now being written
        self._resumed_at = 0
        self._checks: dict[int, str] = {}
        self._tar: ShardTar | None = None
        self._indexes: list[Path] = []  # of finished shards and stretches, in order
        self._num_stretches = 0
        self._digests: set[str] = set()
        self._pending: list[SkippedItem] = []
        self._last_candidate = ""
        self._made_folder = False

    def start(self, fingerprint: dict[str, Any], overwrite: bool) -> Self:
        """Make the folder ready. Raises ShardError when it holds a ShardSet, another build or foreign files."""
        # Through JSON and back, so that it compares equal to what an earlier run wrote.
        fingerprint = json.loads(json.dumps(fingerprint, default=str))
        with _writing(self.path):
            if not self.path.exists():
                self.path.mkdir(parents=True)
                self._made_folder = True
            self._check_contents(fingerprint, overwrite)
            self._remove(self._partials())
            if (self.path / BUILDING).exists():
                self._find_finished()
            else:
                write_json(self.path / BUILDING, fingerprint)
        return self

    def wants(self, number: int, key: str) -> bool:
        """Whether candidate ``number`` is still to be prepared and added; to be asked of each one, in order.

        Raises ShardError when a candidate of a finished shard is not the one that the shard was built from.
        """
        if self._checks.get(number, key) != key:
            raise ShardError(
                "the input is not the one this build was begun with",
                where=self.path,
                got=f"candidate {number} is {key!r}",
                wanted=repr(self._checks[number]),
                do="Start anew with --overwrite.",
            )
        self.num_candidates = number + 1
        return number >= self._resumed_at

    def add(self, number: int, key: str, result: Prepared | SkippedItem) -> None:
        """Store candidate ``number``, or note that it is left out."""
        with _writing(self.path):
            if isinstance(result, Prepared) and self._is_duplicate(result):
                detail = json.loads(result.text).get("url", "")
                result = SkippedItem(key=result.key, reason="duplicate photo", detail=detail)
            if isinstance(result, SkippedItem):
                self._leave_out([result])
            else:
                self._add_sample(number, result)
            self._last_candidate = key
            full = self._tar is not None and self._tar.num_samples == self.samples_per_shard
            if full or number + 1 - self._next_candidate >= _MOST_CANDIDATES * self.samples_per_shard:
                self._cut(number + 1)

    def finish_last(self) -> None:
        """Close the last shard once the candidates have run out."""
        if self.num_candidates < self._resumed_at:
            raise ShardError(
                "the input is shorter than when this build was begun",
                where=self.path,
                got=f"{self.num_candidates} candidates",
                wanted=f"at least {self._resumed_at}",
                do="Start anew with --overwrite.",
            )
        with _writing(self.path):
            if self._tar is not None:
                self._cut(self.num_candidates)

    def complete(self, build: dict[str, Any]) -> Manifest:
        """Write skipped.jsonl and, last, the manifest."""
        manifest = Manifest(
            format=FORMAT,
            name=self.path.resolve().name,
            num_samples=self.num_samples,
            num_captions=sum(entry.num_captions for entry in self.entries),
            shards=self.entries,
            skipped=dict(sorted(self.skipped.items())),
            build=json.loads(json.dumps(build, default=str)),
        )
        with _writing(self.path):
            partial = self.path / f"{SKIPPED}.partial"
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(item.model_dump_json() + "\n" for item in self._all_skipped())
            partial.replace(self.path / SKIPPED)
            write_json(self.path / MANIFEST, manifest.model_dump(mode="json"))
            self._remove([self.path / BUILDING, *(self._stretch_path(n) for n in range(self._num_stretches))])
        return manifest

    def stop(self) -> None:
        """Leave finished shards for the next run, and nothing else; nothing at all when no shard is finished."""
        if self._tar is not None:
            self._tar.abandon()
            self._tar = None
        if self._indexes:
            self._leave_finished()
        else:
            self.remove()

    def remove(self) -> None:
        """Remove everything that this build wrote, the folder too if it made it."""
        self._remove(self._ours())
        if self._made_folder and not any(self.path.iterdir()):
            self.path.rmdir()

    def _check_contents(self, fingerprint: dict[str, Any], overwrite: bool) -> None:
        if not self.path.is_dir():
            raise ShardError("not a folder", where=self.path)
        building, manifest = self.path / BUILDING, self.path / MANIFEST
        if not (building.exists() or manifest.exists()):
            ours = set(self._partials())
            if foreign := sorted(file.name for file in self.path.iterdir() if file not in ours):
                raise ShardError(
                    "the folder holds other files",
                    where=self.path,
                    got=", ".join(foreign[:3]),
                    do="Give --out a new or an empty folder.",
                )
        elif overwrite:
            self._remove([manifest])  # first, so that at no moment it vouches for files that are gone
            self._remove(self._ours())
        elif manifest.exists():
            raise ShardError("already built", where=self.path, do="Use it, or build it anew with --overwrite.")
        elif (found := json.loads(building.read_bytes())) != fingerprint:
            raise ShardError(
                "an unfinished build with other settings is in this folder",
                where=self.path,
                got=f"now {_differences(fingerprint, found)}",
                wanted=_differences(found, fingerprint),
                do="Go on with those settings, or start anew with --overwrite.",
            )

    def _find_finished(self) -> None:
        """Take over finished shards and stretches up to the first gap; what lies behind it is deleted."""
        while (found := self._next_finished()) is not None:
            index_path, index = found
            self._indexes.append(index_path)
            if index.keys:
                self.entries.append(shard_entry(self._tar_path(len(self.entries)), index))
            else:
                self._num_stretches += 1
            self._digests.update(index.photo_digests)
            self._count(index.skipped)
            self.num_samples += len(index.keys)
            self._next_candidate = index.candidates[1]
            self._checks[self._next_candidate - 1] = index.last_candidate
        self._resumed_at = self._next_candidate
        self._leave_finished()

    def _leave_finished(self) -> None:
        kept = {BUILDING} | {path.name for path in self._indexes} | {entry.file for entry in self.entries}
        self._remove(file for file in self._ours() if file.name not in kept)

    def _next_finished(self) -> tuple[Path, ShardIndex] | None:
        """The index of the shard, or else of the stretch, that goes on where the finished ones end."""
        tar, stretch = self._tar_path(len(self.entries)), self._stretch_path(self._num_stretches)
        for index_path in (tar.with_name(index_name(tar.name)), stretch):
            if not index_path.is_file():
                continue
            index = parse_json(ShardIndex, index_path.read_bytes(), index_path)
            whole = index_path == stretch or (
                tar.is_file() and tar.stat().st_size == tar_size(sum(index.texts[-1])) and bool(index.tar_sha256)
            )
            if whole and index.candidates[0] == self._next_candidate:
                return index_path, index
        return None

    def _is_duplicate(self, sample: Prepared) -> bool:
        if not self.drop_duplicates:
            return False
        digest = photo_digest(sample.photo)
        known = digest in self._digests
        self._digests.add(digest)
        return known

    def _add_sample(self, number: int, sample: Prepared) -> None:
        if self._tar is not None and self.shard_bytes is not None and self._tar.size_with(sample) > self.shard_bytes:
            self._cut(number)
        if self._tar is None:
            self._tar = ShardTar(self._tar_path(len(self.entries)), self.drop_duplicates)
        self._tar.add(sample)
        self._leave_out(sample.skipped)
        self.num_samples += 1

    def _cut(self, stop: int) -> None:
        """Finish the shard, or note the stretch without one, that ends before candidate ``stop``."""
        candidates = self._next_candidate, stop
        if self._tar is None:
            index_path = self._stretch_path(self._num_stretches)
            index = ShardIndex.of_nothing(candidates, self._last_candidate, self._pending)
            write_json(index_path, index.model_dump(mode="json"))
            self._num_stretches += 1
        else:
            entry = self._tar.finish(candidates, self._last_candidate, self._pending)
            index_path = self.path / entry.index_file
            self._tar = None
            self.entries.append(entry)
        self._indexes.append(index_path)
        self._pending = []
        self._next_candidate = stop

    def _leave_out(self, items: Sequence[SkippedItem]) -> None:
        self._pending += items
        self._count(items)

    def _count(self, items: Sequence[SkippedItem]) -> None:
        for item in items:
            self.skipped[item.reason] += 1
            self.examples.setdefault(item.reason, item)

    def _all_skipped(self) -> Iterator[SkippedItem]:
        for index_path in self._indexes:
            yield from parse_json(ShardIndex, index_path.read_bytes(), index_path).skipped
        yield from self._pending

    def _tar_path(self, shard: int) -> Path:
        return self.path / f"{self.path.resolve().name}-{shard:06d}.tar"

    def _stretch_path(self, stretch: int) -> Path:
        return self.path / f"{self.path.resolve().name}-skipped-{stretch:06d}.json"

    def _ours(self) -> list[Path]:
        name = re.escape(self.path.resolve().name)
        shards = rf"{name}-\d{{6}}\.(tar|index\.json)|{name}-skipped-\d{{6}}\.json"
        pattern = rf"({shards}|manifest\.json|building\.json|skipped\.jsonl|report\.json)(\.partial)?"
        return [file for file in self.path.iterdir() if re.fullmatch(pattern, file.name)]

    def _partials(self) -> list[Path]:
        return [file for file in self._ours() if file.suffix == ".partial"]

    def _remove(self, files: Iterable[Path]) -> None:
        for file in list(files):
            file.unlink(missing_ok=True)


def _differences(these: dict[str, Any], those: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in these.items() if those.get(name) != value) or "none of that"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A disk that is full or read-only is a user's matter, not a traceback."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ShardError(
                "no space left on the disk",
                where=path,
                do="Make room and run the same command again: it goes on behind the last finished shard.",
            ) from error
        raise ShardError(f"cannot write: {error.strerror or error}", where=path) from error
