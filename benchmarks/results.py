"""What every benchmark says in the end: the same table, and a file in benchmarks/results (make bench: results/short).

rows = [Row.of("packed or a row each", "captions/s", {"packed": rates, "a row each": others}, goal=3.5)]
report("train_step", "8 photos × 5 captions a step", rows, measured)
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table

# run.py has its short runs write elsewhere, so that they never replace longer ones.
FOLDER = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")


@dataclass(frozen=True)
class Row:
    """Two medians beside each other. ``ratio`` above 1 says that ours is the better one by so much.

    ``spread`` is (highest - lowest) / median of the runs, of the one that differed more.
    """

    question: str
    unit: str
    name: str
    ours: float
    peer: str
    theirs: float
    ratio: float
    spread: float
    goal: float | None

    @classmethod
    def of(
        cls,
        question: str,
        unit: str,
        runs: Mapping[str, Sequence[float]],
        *,
        goal: float | None = None,
        less_is_better: bool = False,
    ) -> Self:
        """``runs`` has what each run of ours and of the peer (or the limit) came to, in this order."""
        (name, ours), (peer, theirs) = runs.items()
        medians = statistics.median(ours), statistics.median(theirs)
        ratio = medians[1] / medians[0] if less_is_better else medians[0] / medians[1]
        spread = max((max(each) - min(each)) / statistics.median(each) for each in (ours, theirs))
        return cls(question, unit, name, medians[0], peer, medians[1], ratio, spread, goal)


def report(name: str, title: str, rows: Sequence[Row], measured: Mapping[str, Any]) -> None:
    """Print the table; write it, and all that was measured, to results/``name``.json."""
    print_rows(title, rows)
    FOLDER.mkdir(parents=True, exist_ok=True)
    content = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "title": title,
        "rows": [asdict(row) for row in rows],
        **measured,
    }
    (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def print_rows(title: str, rows: Sequence[Row]) -> None:
    table = Table(title=title)
    for column in ("", "ours", "", "peer or limit", "", "unit", "ratio", "goal", "spread"):
        table.add_column(column, justify="right" if column in ("", "ratio", "goal", "spread") else "left")
    table.columns[0].justify = "left"
    for row in rows:
        goal = "" if row.goal is None else f"{row.goal:g}"
        pairs = (row.name, _number(row.ours), row.peer, _number(row.theirs))
        table.add_row(row.question, *pairs, row.unit, f"{row.ratio:.2f}", goal, f"{row.spread:.0%}")
    Console(width=130).print(table)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine() -> str:
    """As README quotes it: cores, processor, torch."""
    import torch  # here, since the processes that some benchmarks start import their file again

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} × {processor}{gpu}, torch {torch.__version__}"
