"""A run's ``log.jsonl``, read back: while it is being written, after it was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG = "log.jsonl"


def read(run: Path) -> list[dict[str, Any]]:
    """Its complete lines; none where there is no log. What stands behind the last newline is still being written."""
    path = run / LOG
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
