"""What was taken from which file: as a table for eyes, and with checksums for a manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from pvtcap.shardset import sha256_file

_MOST_NAMES = 4


class SourceFile(BaseModel):
    """One file that weights were taken from; ``part`` is encoder, projection or decoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    part: str
    file: str
    size_bytes: NonNegativeInt
    sha256: str


@dataclass(frozen=True)
class Loaded:
    """What one part of the model took. ``taken`` and ``ignored`` count tensors, ``parameters`` numbers in them.

    ``new`` are names that keep the values they were made with; ``source`` is what the configuration says.
    """

    part: str
    source: str
    files: tuple[Path, ...] = ()
    taken: int = 0
    parameters: int = 0
    new: tuple[str, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def source_files(loaded: Sequence[Loaded]) -> tuple[SourceFile, ...]:
    """Every file that was read, with its sha256 (about a second for each gigabyte); one that two parts share, twice."""
    digests = {path: sha256_file(path) for path in {path for one in loaded for path in one.files}}
    return tuple(
        SourceFile(part=one.part, file=str(path), size_bytes=path.stat().st_size, sha256=digests[path])
        for one in loaded
        for path in one.files
    )


def weights_table(loaded: Sequence[Loaded]) -> str:
    """Lines of text: a row a part, and below it what is new, what was ignored, and what else a user should know."""
    lines = [f"{'weights':<12}{'taken':>7}{'parameters':>14}{'new':>6}{'ignored':>9}  from"]
    for one in loaded:
        ignored = sum(one.ignored.values())
        source = str(one.files[0]) if one.files else one.source
        lines.append(f"{one.part:<12}{one.taken:>7,}{one.parameters:>14,}{len(one.new):>6,}{ignored:>9,}  {source}")
        if one.new and one.taken:
            lines.append(f"{'':<12}new: {_some(one.new)}")
        if one.ignored:
            lines.append(f"{'':<12}ignored: {_some([f'{name} ({count})' for name, count in one.ignored.items()])}")
        lines += [f"{'':<12}{note}" for note in one.notes]
    return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + (
        f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    )
