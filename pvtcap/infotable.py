"""What is in a ShardSet, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table
from rich.text import Text

from pvtcap.distribution import Distribution, Range
from pvtcap.shardformat import FeatureFormat
from pvtcap.shardinfo import ShardSetInfo

_MOST_ROWS = 12  # of a table that lists different values


def info_tables(info: ShardSetInfo) -> Iterator[Table]:
    """Totals, statistics, shares of kinds of photos, what the build left out, and how it was built."""
    yield _totals(info)
    yield _statistics(info)
    yield _shares(info)
    if info.manifest.skipped:
        yield _skipped(info)
    if info.manifest.features is not None:
        yield _features(info.manifest.features)
    if info.manifest.build:
        yield _build(info)


def _totals(info: ShardSetInfo) -> Table:
    manifest, words = info.manifest, info.counts.words
    # Text, not str: rich would read a bracket in a name as markup.
    table = Table(title=Text(f"{manifest.name}, in {info.location}"), title_justify="left")
    row = {
        "photos": manifest.num_samples,
        "captions": manifest.num_captions,
        "shards": len(manifest.shards),
        "bytes": info.size_bytes,
        "words": words.total(),
        "vocabulary": len(words),
        "seen once": info.num_words_once,
    }
    for name in row:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:,}" for value in row.values()))
    return table


def _statistics(info: ShardSetInfo) -> Table:
    counts = info.counts
    table = Table("")
    for name in ("min", "mean", "median", "p95", "max"):
        table.add_column(name, justify="right")
    rows: dict[str, Distribution | Range] = {
        "captions a photo": counts.captions_per_photo,
        "words a caption": counts.caption_words,
        "short side, px": counts.short_side_px,
        "long side, px": counts.long_side_px,
        "width, px": counts.width_px,
        "height, px": counts.height_px,
        "pixels a photo": counts.pixels,
        ("bytes a photo" if info.manifest.features is None else "bytes of features"): counts.photo_bytes,
        "photos a shard": info.samples_per_shard,
    }
    for name, values in rows.items():
        ranks = (
            [f"{values.quantile(share):,}" for share in (0.5, 0.95)] if isinstance(values, Distribution) else ["", ""]
        )
        table.add_row(name, f"{values.min:,}", _short(values.mean), *ranks, f"{values.max:,}")
    return table


def _shares(info: ShardSetInfo) -> Table:
    counts = info.counts
    table = Table("", "")
    table.columns[1].overflow = "fold"
    for name in ("photos", "share"):
        table.add_column(name, justify="right")
    kinds: dict[str, Mapping[str, int]] = {
        "captions a photo": {f"{value:,}": times for value, times in sorted(counts.captions_per_photo.counts.items())},
        "orientation": dict(counts.orientations.most_common()),
        "source": {name or "(none)": times for name, times in counts.sources.most_common()},
    }
    for kind, times in kinds.items():
        table.add_section()
        for number, (name, photos) in enumerate(_first_rows(times)):
            share = photos / info.manifest.num_samples
            table.add_row("" if number else kind, Text(name), f"{photos:,}", f"{share:.1%}")
    return table


def _first_rows(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """The counts as rows; a long list is cut, and says so."""
    rows = list(counts.items())
    if len(rows) <= _MOST_ROWS:
        return rows
    rest = rows[_MOST_ROWS - 1 :]
    return [*rows[: _MOST_ROWS - 1], (f"({len(rest):,} others)", sum(times for _, times in rest))]


def _skipped(info: ShardSetInfo) -> Table:
    table = Table("left out by the build")
    table.columns[0].overflow = "fold"
    table.add_column("times", justify="right")
    for reason, times in _first_rows(info.manifest.skipped):
        table.add_row(Text(reason), f"{times:,}")
    return table


def _features(features: FeatureFormat) -> Table:
    table = Table("features in place of photos", "")
    table.columns[1].overflow = "fold"
    for name, value in features.model_dump().items():
        table.add_row(Text(name), Text(", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)))
    return table


def _build(info: ShardSetInfo) -> Table:
    table = Table("built with", "")
    table.columns[1].overflow = "fold"
    for name, value in info.manifest.build.items():
        table.add_row(Text(name), Text("" if value is None else str(value)))
    return table


def _short(mean: float) -> str:
    return f"{mean:,.0f}" if mean >= 10_000 else f"{mean:,.1f}" if mean >= 100 else f"{mean:,.2f}"
