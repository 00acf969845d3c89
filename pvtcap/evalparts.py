"""What each rank has captioned so far, so that a killed evaluation goes on.

OUT/parts/rank_00003.jsonl holds an identity, of all that decides the captions, and then a line a batch. A rank writes
its own file and reads all it can see, be the folder shared or a machine's own; the process group says who has what.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

from pvtcap.dist import World


@dataclass(frozen=True)
class Captioned:
    """One photo's generated caption, beside what identifies it and its references."""

    key: str
    image_id: int | str
    caption: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A batch of the evaluation, done. ``missing`` are (key, reason); ``loss_sum`` is in nats over ``num_labels``."""

    number: int
    captioned: tuple[Captioned, ...]
    missing: tuple[tuple[str, str], ...]
    loss_sum: float
    num_labels: int

    @classmethod
    def of_json(cls, tree: dict[str, Any]) -> Self:
        captioned = (Captioned(**{**one, "references": tuple(one["references"])}) for one in tree["captioned"])
        missing = ((key, reason) for key, reason in tree["missing"])
        return cls(tree["number"], tuple(captioned), tuple(missing), tree["loss_sum"], tree["num_labels"])


class Parts:
    """The parts below ``out`` that belong to this ``identity``; ``with`` closes this rank's file."""

    def __init__(self, out: Path, identity: str, world: World) -> None:
        self.folder, self.identity, self.world = out / "parts", identity, world
        self._file: IO[str] | None = None

    def found(self, num_batches: int) -> tuple[list[Part], list[int]]:
        """(parts that this rank gives to the merge, batches that this rank is to do); collective.

        Where several ranks see a part, the first of them gives it. What is left is dealt out anew.
        """
        seen = self._read()
        all_seen = self.world.gather(sorted(seen))
        holder: dict[int, int] = {}
        for rank, numbers in enumerate(all_seen or []):
            for number in numbers:
                holder.setdefault(number, rank)
        holder = self.world.broadcast(holder)
        left = [number for number in range(num_batches) if number not in holder]
        mine = [seen[number] for number, rank in holder.items() if rank == self.world.rank and number < num_batches]
        return mine, left[self.world.rank :: self.world.size]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, part: Part) -> None:
        """The first one opens the file: an evaluation that cannot begin leaves nothing behind."""
        if self._file is None:
            self._open()
        self._write(asdict(part))

    def remove(self) -> None:
        """When the evaluation is whole; every rank, as the folder may be each machine's own."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank_{self.world.rank:05d}.jsonl"
        kept = self._lines(path)
        # Anew, not appended: the end of a killed rank's file may be half a line.
        self._file = path.with_suffix(".partial").open("w", encoding="utf-8")
        self._write({"identity": self.identity})
        for tree in kept:
            self._write(tree)
        path.with_suffix(".partial").replace(path)

    def _write(self, tree: dict[str, Any]) -> None:
        assert self._file is not None, "opened"
        print(json.dumps(tree, ensure_ascii=False), file=self._file, flush=True)

    def _read(self) -> dict[int, Part]:
        parts = (Part.of_json(tree) for path in sorted(self.folder.glob("rank_*.jsonl")) for tree in self._lines(path))
        return {part.number: part for part in parts}

    def _lines(self, path: Path) -> list[dict[str, Any]]:
        """The whole lines of a file of this identity; of any other, none."""
        try:
            first, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] or [""]
            if json.loads(first or "{}").get("identity") != self.identity:
                return []
            return [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return []
