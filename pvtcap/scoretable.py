"""Evaluations as a table for the terminal: one, or several side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from pvtcap import jsonfile
from pvtcap.bootstrap import Difference
from pvtcap.errors import EvaluationError

SCORES = "scores.json"  # what ``evaluate`` calls it

Report = Mapping[str, Any]
_KINDS = {"scores": dict, "unavailable": dict, "statistics": dict, "num_photos": int}


def read_report(folder: Path) -> Report:
    """The content of an evaluation folder's scores.json. Raises EvaluationError when there is none, or another's."""
    path = folder / SCORES
    do = "Give a folder that 'pvtcap evaluate' or a training run wrote."
    if not path.is_file():
        raise EvaluationError(f"no {SCORES} here", where=folder, do=do)
    report: Report = jsonfile.read(path, EvaluationError)
    for name, kind in _KINDS.items():
        if not isinstance(report, dict) or not isinstance(report.get(name), kind):
            raise EvaluationError(f"not the scores of an evaluation: it lacks '{name}'", where=path, do=do)
    return report


def score_table(reports: Mapping[str, Report], title: str | None = None) -> Table:
    """A row a metric (with its 95% interval) and a statistic, a column a report."""
    table = Table("", title=title)
    for name in reports:
        table.add_column(name, justify="right")
    every = list(reports.values())
    for metric in dict.fromkeys(name for report in every for name in report["scores"]):
        table.add_row(metric, *(_score(report, metric) for report in every))
    table.add_section()
    table.add_row("photos", *(f"{report['num_photos']:,}" for report in every))
    for name in dict.fromkeys(name for report in every for name in _statistics(report)):
        table.add_row(name, *(f"{_statistics(report).get(name, float('nan')):,.4g}" for report in every))
    return table


def reasons(reports: Mapping[str, Report]) -> list[str]:
    """A line for each metric that was unavailable, and for a tokenizer that is not the usual one."""
    lines = []
    for report in reports.values():
        lines += [f"{metric} is unavailable: {reason}" for metric, reason in report["unavailable"].items()]
        if "own" in report.get("tokenizer", ""):
            lines.append(f"tokens by {report['tokenizer']}")
    return list(dict.fromkeys(lines))


def difference_table(differences: Mapping[str, Difference], first: str, second: str) -> Table:
    """A row a metric: how far the second is above the first, its 95% interval, and how often it is above."""
    title = Text(f"{second} less {first}, paired bootstrap over images")
    table = Table("", title=title)
    for heading in ("difference", "95% interval", f"{second} is better in"):
        table.add_column(Text(heading), justify="right")
    for name, one in differences.items():
        # Text, not str: rich would read the interval's bracket as markup.
        interval = Text(f"[{one.low:+.4f}, {one.high:+.4f}]")
        table.add_row(name, f"{one.value:+.4f}", interval, f"{one.share_better:.1%} of resamples")
    return table


def _statistics(report: Report) -> dict[str, float]:
    # A photo that could not be read is part of every score's meaning; the held-out loss stands beside them.
    missing = report.get("num_missing") or None
    rows = {"photos not readable": missing, "loss": report.get("loss"), "perplexity": report.get("perplexity")}
    return {**{name: value for name, value in rows.items() if value is not None}, **report["statistics"]}


def _score(report: Report, metric: str) -> Text:
    value = report["scores"].get(metric)
    if value is None:
        return Text("unavailable" if metric in report["scores"] else "")
    low, high = report.get("intervals", {}).get(metric, (None, None))
    # The wider side of the interval: scores.json and the page have both, a table of three columns has no room for them.
    return Text(f"{value:.4f}" if low is None else f"{value:.4f} ±{max(value - low, high - value):.3f}")
