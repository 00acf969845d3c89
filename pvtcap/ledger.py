"""The ledger of a run: which samples its optimizer steps consumed, as counts and order-free hashes.

    RUN/ledger/consumed.jsonl     a line for each stretch of steps between two checkpoints
    RUN/ledger/skipped.jsonl      a line for each photo that could not be decoded, with where and why

A line of the first has the steps (first, last], the number of ranks, what data that was, and for each shard that was
read in an epoch ``[source, epoch, shard, count, hash]``, the hash being the sum of ``sample_hash`` modulo 2**64: any
number of ranks adds up to the same, and ``audit`` compares it with the sum over the shard's keys.

The lines of a stretch are written before the checkpoint that ends it. A run that resumes drops what lies beyond its
checkpoint, so the ledger tells what the weights have seen, across restarts and changes of the world size.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pvtcap.batch import BadSample, Batch
from pvtcap.dist import World
from pvtcap.errors import TrainError
from pvtcap.sources import Sources, TrainedOn

CONSUMED, SKIPPED = "consumed.jsonl", "skipped.jsonl"
MODULUS = 2**64

Shard = tuple[int, int, int]  # source, epoch, shard


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Stretch(_Line):
    """Optimizer steps ``after`` + 1 … ``step``, and the shards they read: [source, epoch, shard, count, hash]."""

    after: int
    step: int
    world_size: int
    data: list[TrainedOn]
    shards: list[tuple[int, int, int, int, int]]


class Skipped(_Line):
    """A sample that was left out of optimizer step ``step``."""

    step: int
    source: int
    epoch: int
    shard: int
    sample: int
    where: str
    key: str
    reason: str


@dataclass(frozen=True)
class Book:
    """The ledger of a run folder, read back."""

    stretches: list[Stretch]
    skipped: list[Skipped]


def sample_hash(key: str) -> int:
    """64 bits of BLAKE2b of a sample's key."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def sum_hashes(keys: Iterable[str]) -> int:
    """Sum of ``sample_hash`` modulo 2**64: it does not depend on the order, and sees a key that occurs twice."""
    return sum(map(sample_hash, keys)) % MODULUS


def read(folder: Path, up_to_step: int | None = None) -> Book:
    """The ledger in ``folder`` (RUN/ledger), up to a step; empty where there is none. Raises TrainError if damaged."""
    stretches, skipped = _read_lines(Stretch, folder / CONSUMED), _read_lines(Skipped, folder / SKIPPED)
    if up_to_step is None:
        return Book(stretches, skipped)
    return Book([s for s in stretches if s.step <= up_to_step], [s for s in skipped if s.step <= up_to_step])


class Ledger:
    """Collects on each rank what its batches hold; ``write`` brings it to rank 0 and to disk.

    ``start_step`` is the last step already done. ``judge``, ``write`` and the making of one are collective.
    """

    def __init__(self, run: Path, sources: Sources, world: World, *, start_step: int, max_bad_fraction: float) -> None:
        self.folder, self.world, self.after = run / "ledger", world, start_step
        self._counts: Counter[Shard] = Counter()
        self._hashes: Counter[Shard] = Counter()
        self._bad: list[BadSample] = []  # this rank's, of the last step
        self._data = world.on_first_rank(sources.describe)
        self._num_samples = [sum(sizes) for sizes in sources.sizes]
        self._max_bad_fraction = max_bad_fraction
        kept = world.on_first_rank(lambda: _cut(self.folder, start_step))
        self._num_bad = Counter((skipped.source, skipped.epoch) for skipped in kept.skipped)

    @property
    def num_bad(self) -> int:
        """Samples left out since the run began."""
        return self._num_bad.total()

    def take(self, batches: list[Batch]) -> int:
        """Note what this rank trains on in a step; returns how many samples of it are bad."""
        self._bad = [bad for batch in batches for bad in batch.bad]
        left_out = {bad.place.position for bad in self._bad}
        for batch in batches:
            for place, sample in zip(batch.places, batch.samples, strict=True):
                if place.position not in left_out:
                    shard = place.source, place.epoch, place.shard
                    self._counts[shard] += 1
                    self._hashes[shard] += sample_hash(sample.key)
        return len(self._bad)

    def judge(self, step: int) -> list[BadSample]:
        """Every rank's bad samples of this step, written to disk; ask when ``take`` found some on any rank.

        Raises TrainError, on all ranks, when they are more than ``max_bad_fraction`` of a source's samples in an epoch.
        """
        parts = self.world.broadcast(self.world.gather(self._bad))
        assert parts is not None, "rank 0 gathers"
        found = [bad for part in parts for bad in part]

        def note() -> None:
            lines = [
                Skipped(
                    step=step,
                    source=bad.place.source,
                    epoch=bad.place.epoch,
                    shard=bad.place.shard,
                    sample=bad.place.sample,
                    where=bad.where,
                    key=bad.key,
                    reason=bad.reason,
                )
                for bad in found
            ]
            _append(self.folder / SKIPPED, lines)

        self.world.on_first_rank(note)
        for bad in found:
            source, epoch = bad.place.source, bad.place.epoch
            self._num_bad[source, epoch] += 1
            allowed = int(self._max_bad_fraction * self._num_samples[source])
            if self._num_bad[source, epoch] > allowed:
                error = TrainError(
                    f"too many photos cannot be decoded: {bad.reason}",
                    where=bad.where,
                    got=f"{self._num_bad[source, epoch]} in epoch {epoch} of {self._num_samples[source]:,} samples",
                    wanted=f"at most {allowed} (data.max_bad_fraction {self._max_bad_fraction:g})",
                    do=f"'pvtcap shards verify' names them all. Left out so far: {self.folder / SKIPPED}.",
                )
                error.told = not self.world.is_first
                raise error
        return found

    def write(self, step: int) -> None:
        """The ledger up to this step; before its checkpoint, so that no checkpoint is without."""
        parts = self.world.gather((self._counts, self._hashes))

        def append() -> None:
            assert parts is not None, "rank 0 gathers"
            counts: Counter[Shard] = sum((part[0] for part in parts), Counter())
            hashes: Counter[Shard] = sum((part[1] for part in parts), Counter())
            shards = [(*shard, counts[shard], hashes[shard] % MODULUS) for shard in sorted(counts)]
            stretch = Stretch(
                after=self.after,
                step=step,
                world_size=self.world.size,
                data=self._data,
                shards=shards,
            )
            _append(self.folder / CONSUMED, [stretch])

        if step > self.after:
            self.world.on_first_rank(append)
        self.after = step
        self._counts.clear()
        self._hashes.clear()


def _cut(folder: Path, step: int) -> Book:
    """Drop what lies beyond ``step``: the run goes on from there, and will do those steps again."""
    book = read(folder, step)
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in ((CONSUMED, book.stretches), (SKIPPED, book.skipped)):
        partial = folder / f"{name}.partial"
        partial.unlink(missing_ok=True)
        _append(partial, lines)
        partial.replace(folder / name)
    return book


def _append(path: Path, lines: Sequence[_Line]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(line.model_dump_json() + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


L = TypeVar("L", bound=_Line)


def _read_lines(kind: type[L], path: Path) -> list[L]:
    if not path.exists():
        return []
    # What stands behind the last newline was being written when the run was killed, and no checkpoint knows it.
    complete = path.read_bytes().split(b"\n")[:-1]
    try:
        return [kind.model_validate_json(line) for line in complete]
    except ValidationError as error:
        raise TrainError(
            "a damaged ledger", where=path, got=error.errors()[0]["msg"], do="Restore it, or remove the ledger folder."
        ) from None
