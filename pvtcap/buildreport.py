"""What a build tells the person who started it: a progress bar on a terminal, and two tables at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from pvtcap.shardset import Manifest, SkippedItem


@dataclass(frozen=True)
class BuildReport:
    """A finished build: what was skipped is counted in the manifest, ``examples`` has the first item of each reason.

    ``num_resumed`` of its samples were already there from an interrupted run.
    """

    path: Path
    manifest: Manifest
    examples: dict[str, SkippedItem]
    num_candidates: int
    num_resumed: int
    seconds: float

    @property
    def photos_per_s(self) -> float:
        return (self.manifest.num_samples - self.num_resumed) / max(self.seconds, 1e-9)


@contextmanager
def photos_progress(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of photos just done; a bar only on a terminal, on stderr."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn() if total is not None else TimeElapsedColumn(),
    )
    # What a command prints meanwhile belongs to stdout: a file or a pipe, even where stderr is a terminal.
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False)
    with shown as progress:
        task = progress.add_task(name, total=total)
        yield lambda done: progress.advance(task, done)


def print_report(report: BuildReport) -> None:
    console = Console(highlight=False)
    manifest = report.manifest
    table = Table(title=Text(str(report.path)), title_justify="left")
    for column in ("samples", "captions", "shards", "bytes", "photos/s"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{manifest.num_samples:,}",
        f"{manifest.num_captions:,}",
        f"{len(manifest.shards):,}",
        f"{sum(entry.size_bytes for entry in manifest.shards):,}",
        f"{report.photos_per_s:,.0f}",
    )
    console.print(table)
    if report.num_resumed:
        console.print(f"{report.num_resumed:,} samples were there from an interrupted run.")
    if report.examples:
        console.print(_skipped_table(report))


def _skipped_table(report: BuildReport) -> Table:
    table = Table(title="left out (each one is in skipped.jsonl)", title_justify="left")
    table.add_column("reason", overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("for example", overflow="fold")
    for reason, count in report.manifest.skipped.items():
        example = report.examples[reason]
        # Text, not str: rich would read a bracket in a file name as markup.
        table.add_row(
            Text(reason), f"{count:,}", Text(f"{example.key}: {example.detail}" if example.detail else example.key)
        )
    return table


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f} photos/s")
