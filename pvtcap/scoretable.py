"""Evaluations as a table for the terminal: one, or several side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from pvtcap.errors import EvaluationError

SCORES = "scores.json"  # what ``evaluate`` calls it

Report = Mapping[str, Any]


def read_report(folder: Path) -> Report:
    """The content of an evaluation folder's scores.json. Raises EvaluationError when there is none."""
    path = folder / SCORES
    try:
        report: Report = json.loads(path.read_bytes())
    except OSError:
        do = "Give a folder that 'pvtcap evaluate' or a training run wrote."
        raise EvaluationError(f"no {SCORES} here", where=folder, do=do) from None
    except ValueError as error:
        raise EvaluationError(f"not JSON: {error}", where=path) from None
    return report


def score_table(reports: Mapping[str, Report], title: str | None = None) -> Table:
    """A row a metric and a statistic, a column a report; a metric that was unavailable gives its reason."""
    table = Table("", title=title)
    for name in reports:
        table.add_column(name, justify="right")
    every = list(reports.values())
    for metric in dict.fromkeys(name for report in every for name in report["scores"]):
        table.add_row(metric, *(_score(report, metric) for report in every))
    table.add_section()
    table.add_row("photos", *(f"{report['num_photos']:,}" for report in every))
    for name in dict.fromkeys(name for report in every for name in report["statistics"]):
        table.add_row(name, *(f"{report['statistics'].get(name, float('nan')):,.4g}" for report in every))
    return table


def _score(report: Report, metric: str) -> str:
    value = report["scores"].get(metric)
    return f"unavailable: {report['unavailable'].get(metric, '')}" if value is None else f"{value:.4f}"
