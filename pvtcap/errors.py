"""Every error that pvtcap raises on purpose.

    PvtcapError             a user can mend it; the command line prints one line and exits with code 2, but for
    ├── ConfigError         a configuration file, an override or a command-line option
    ├── ShardError          a shard folder, a tar, an index, a manifest, a photo or a caption
    ├── CheckpointError     a checkpoint folder, or weights that do not fit the model
    ├── TrainError          a run that must not go on (a loss that is not finite, say)
    ├── EvaluationError     captions that do not cover the data, or a scorer that cannot start
    └── MachineError        what the machine lacks (memory, disk, network, a compiler), said by a library: code 1

A message says what is wrong, where, what was found, what was wanted and what to do, in that order, each only where
it is known. A mistake of the programmer is an ``AssertionError`` instead, and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PvtcapError(Exception):
    """Base of all errors a user can act on.

    Only ``what`` is required. ``told`` is true on a rank that was told of an error another rank raised; such a rank
    stays silent, so that one mistake is one line on the terminal.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        wanted: object = None,
        do: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.wanted, self.do = what, where, got, wanted, do
        self.told = False
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what if self.where is None else f"{self.where}: {self.what}"]
        if self.got is not None:
            parts.append(f"got {self.got}")
        if self.wanted is not None:
            parts.append(f"wanted {self.wanted}")
        line = "; ".join(parts)
        said = line if self.do is None else f"{line}. {self.do}"
        return " ".join(part.strip() for part in said.split("\n"))  # what libraries say may be several lines

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle as cls(*args); ours have keywords, and cross process borders (workers, ranks) whole.
        return _rebuild, (type(self), self.what, self.where, self.got, self.wanted, self.do)


class ConfigError(PvtcapError):
    """A configuration that cannot be run."""


class ShardError(PvtcapError):
    """A ShardSet that is missing, damaged or not what its manifest says."""


class CheckpointError(PvtcapError):
    """A checkpoint that is missing, incomplete, or of another model."""


class TrainError(PvtcapError):
    """A training run that must stop."""


class EvaluationError(PvtcapError):
    """An evaluation whose result would not be trustworthy."""


class MachineError(PvtcapError):
    """Something that the machine lacks: memory, disk, a network, a compiler, another rank."""


def _rebuild(
    cls: type[PvtcapError], what: str, where: object, got: object, wanted: object, do: str | None
) -> PvtcapError:
    return cls(what, where=where, got=got, wanted=wanted, do=do)


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A suggestion for a mistyped ``word``, or None when nothing known is close."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f"Did you mean '{close[0]}'?" if close else None
