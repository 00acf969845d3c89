"""A run's ``log.jsonl``, read back: while it is being written, after it was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pvtcap import jsonfile
from pvtcap.errors import ConfigError

LOG = "log.jsonl"


def read(run: Path) -> list[dict[str, Any]]:
    """Its complete lines; none where there is no log, or none yet. Raises ConfigError at one that is damaged."""
    path = run / LOG
    lines: list[dict[str, Any]] = jsonfile.read_lines(path, ConfigError, growing=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or not {"kind", "step"} <= line.keys():
            raise ConfigError("not a line of a run's log", where=f"{path}, line {number}", wanted="'kind' and 'step'")
    return lines
