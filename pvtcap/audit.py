"""What a run has seen: its ledger against the keys of the data it trained on.

    for source, number in audit(Path("runs/mine")).epochs: ...

An epoch of which each shard's count and hash are those of its keys has shown each sample exactly once, whatever the
number of ranks and restarts. The last epoch is still open: only what is too much in it can be wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pvtcap.configfile import load
from pvtcap.errors import TrainError
from pvtcap.ledger import MODULUS, Book, Shard, Skipped, Stretch, read, sum_hashes
from pvtcap.sources import Sources


@dataclass(frozen=True)
class EpochReport:
    """One epoch of one source. ``seen`` samples were trained on, ``skipped`` not decodable; ``wrong_shards`` have seen
    other samples than their own, or not each once."""

    source: str
    epoch: int
    num_samples: int
    seen: int
    skipped: int
    missing: int
    duplicates: int
    is_open: bool
    wrong_shards: list[str]

    @property
    def is_clean(self) -> bool:
        return not self.wrong_shards


@dataclass(frozen=True)
class Report:
    """A run's audit; ``gaps`` are steps of which the ledger knows nothing, or knows twice."""

    first_step: int
    last_step: int
    starts: list[tuple[int, int]]  # each stretch of an equal number of ranks: after which step, how many
    epochs: list[EpochReport]
    skipped: list[Skipped]
    gaps: list[str]

    @property
    def is_clean(self) -> bool:
        return not self.gaps and all(epoch.is_clean for epoch in self.epochs)

    def to_json(self) -> dict[str, Any]:
        return {
            "clean": self.is_clean,
            "steps": [self.first_step, self.last_step],
            "world_sizes": [{"after_step": after, "ranks": ranks} for after, ranks in self.starts],
            "epochs": [vars(epoch) for epoch in self.epochs],
            "skipped": [skipped.model_dump() for skipped in self.skipped],
            "gaps": self.gaps,
        }


def audit(run: Path) -> Report:
    """Compare a run's ledger with its data. Raises TrainError where there is no ledger, or the data are others now."""
    if not (run / "config.yaml").is_file():
        raise TrainError("not a run folder (no config.yaml)", where=run, do="Give the run.dir of a training run.")
    config = load(run / "config.yaml")
    book = read(run / "ledger")
    if not book.stretches:
        raise TrainError("the run has no ledger yet", where=run / "ledger", do="It is written with each checkpoint.")
    sources = Sources.open(config.data)
    if (then := book.stretches[-1].data) != (now := sources.describe()):
        raise TrainError(
            "the data are not those that the run was trained on",
            where="data.train",
            got=", ".join(f"{of.name} {of.manifest_sha256[:12]}…" for of in now),
            wanted=", ".join(f"{of.name} {of.manifest_sha256[:12]}…" for of in then),
        )
    last = book.stretches[-1].step
    skipped = [one for one in book.skipped if one.step <= last]
    return Report(
        book.stretches[0].after,
        last,
        _starts(book.stretches),
        list(_epochs(Book(book.stretches, skipped), sources)),
        skipped,
        _gaps(book.stretches),
    )


def _epochs(book: Book, sources: Sources) -> Iterator[EpochReport]:
    counts: Counter[Shard] = Counter()
    hashes: Counter[Shard] = Counter()
    for stretch in book.stretches:
        for source, epoch, shard, count, hash_sum in stretch.shards:
            counts[source, epoch, shard] += count
            hashes[source, epoch, shard] += hash_sum
    left_out: dict[Shard, list[str]] = {}
    for one in book.skipped:
        left_out.setdefault((one.source, one.epoch, one.shard), []).append(one.key)
    begun_elsewhere = book.stretches[0].after > 0
    for source, sizes in enumerate(sources.sizes):
        name = sources.shardsets[source].manifest.name if sources.weights else " + ".join(_names(sources))
        numbers = sorted({epoch for of, epoch, _ in [*counts, *left_out] if of == source})
        keys = [cache(partial(_hash_of_keys, sources, source, shard)) for shard in range(len(sizes))]
        for number in numbers:
            is_open = number == numbers[-1] or (begun_elsewhere and number == numbers[0])
            missing = duplicates = 0
            wrong = []
            for shard, size in enumerate(sizes):
                skipped = left_out.get((source, number, shard), [])
                seen = counts[source, number, shard] + len(skipped)
                hash_sum = (hashes[source, number, shard] + sum_hashes(skipped)) % MODULUS
                fewer, more = max(0, size - seen), max(0, seen - size)
                if seen == size and hash_sum != keys[shard]():
                    fewer = more = 1  # at least: as many as it has, but not its own, each once
                missing, duplicates = missing + fewer, duplicates + more
                if more or (fewer and not is_open):
                    wrong.append(sources.file(source, shard))
            yield EpochReport(
                name,
                number,
                sum(sizes),
                seen=sum(counts[source, number, shard] for shard in range(len(sizes))),
                skipped=sum(len(left_out.get((source, number, shard), [])) for shard in range(len(sizes))),
                missing=missing,
                duplicates=duplicates,
                is_open=is_open,
                wrong_shards=wrong,
            )


def _hash_of_keys(sources: Sources, source: int, shard: int) -> int:
    number, of_set = sources.locate(source, shard)
    return sum_hashes(sources.shardsets[number].load_index(of_set).keys)


def _names(sources: Sources) -> list[str]:
    return [shardset.manifest.name for shardset in sources.shardsets]


def _starts(stretches: list[Stretch]) -> list[tuple[int, int]]:
    starts: list[tuple[int, int]] = []
    for stretch in stretches:
        if not starts or starts[-1][1] != stretch.world_size:
            starts.append((stretch.after, stretch.world_size))
    return starts


def _gaps(stretches: list[Stretch]) -> list[str]:
    return [
        f"after step {one.step} comes step {other.after + 1}"
        for one, other in pairwise(stretches)
        if other.after != one.step
    ]


def print_report(report: Report, console: Console) -> None:
    """The audit as a person reads it."""
    ranks = ", ".join(f"{ranks} from step {after + 1}" for after, ranks in report.starts)
    console.print(f"steps {report.first_step + 1} to {report.last_step}; ranks: {ranks}")
    table = Table()
    for column in ("source", "epoch", "samples", "seen", "skipped", "missing", "duplicates", ""):
        table.add_column(column, justify="left" if column in ("source", "") else "right")
    for epoch in report.epochs:
        table.add_row(
            epoch.source,
            str(epoch.epoch),
            f"{epoch.num_samples:,}",
            f"{epoch.seen:,}",
            f"{epoch.skipped:,}",
            "" if epoch.is_open else f"{epoch.missing:,}",
            f"{epoch.duplicates:,}",
            ("so far" if epoch.is_open else "each once") if epoch.is_clean else f"wrong: {epoch.wrong_shards[0]}",
        )
    console.print(table)
    for one in report.skipped:
        console.print(f"skipped at step {one.step}: {one.where}: {one.reason}")
    for gap in report.gaps:
        console.print(f"[red]a gap in the ledger: {gap}[/red]")
    console.print("clean" if report.is_clean else "[red]NOT clean[/red]")
