"""JSON as it lies in files: what it holds, or one error of the reader's kind that names the file and the line.

    read(path, ShardError)                   a file's one value
    read_lines(path, ConfigError)            a value a line
    parse(text_or_bytes, where, ShardError)  what was read already

What it should hold is the reader's to check.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pvtcap.errors import PvtcapError


def parse(
    text: str | bytes, where: object, error: type[PvtcapError], what: str = "not JSON", do: str | None = None
) -> Any:
    """The value; ``error`` at ``where``, saying ``what`` this is not, when it is no JSON."""
    try:
        return json.loads(text)
    # ValueError: no JSON, no UTF-8, or a number of thousands of digits. RecursionError: brackets, thousands deep.
    except (ValueError, RecursionError) as wrong:
        raise error(f"{what}: {wrong}", where=where, do=do) from None


def read(path: Path, error: type[PvtcapError], what: str = "not JSON", do: str | None = None) -> Any:
    """The value in a file; ``error`` when it cannot be read or, saying ``what`` it is not, is no JSON."""
    return parse(_bytes(path, error), path, error, what, do)


def read_lines(path: Path, error: type[PvtcapError], *, growing: bool = False) -> list[Any]:
    """The values of the lines; of a ``growing`` file without what stands behind the last newline: it is being written.

    Only newlines end a line: str.splitlines would cut a caption that holds U+2028. Raises ``error``.
    """
    *lines, rest = _bytes(path, error).split(b"\n")
    if rest and not growing:
        lines.append(rest)
    do = "Something cut its writing off there: without that line the file can be read."
    return [parse(line, f"{path}, line {number}", error, do=do) for number, line in enumerate(lines, start=1)]


def _bytes(path: Path, error: type[PvtcapError]) -> bytes:
    try:
        return path.read_bytes()
    except OSError as wrong:
        raise error(f"cannot read it: {wrong.strerror}", where=path) from None
