"""Two systems on the same images: how far one is better than the other, by paired bootstrap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from pvtcap import bootstrap, jsonfile
from pvtcap.errors import EvaluationError
from pvtcap.metrics import Scores

T = TypeVar("T")
CAPTIONS = "captions.jsonl"  # what ``evaluate`` and ``score --out`` call it


@dataclass(frozen=True)
class PerImage:
    """A system's scores image by image, in the order of ``ids``; see ``bootstrap`` for ``statistics``."""

    ids: list[str]
    values: Mapping[str, float | None]
    per_image: dict[str, list[float]]
    statistics: dict[str, list[list[float]]]

    @classmethod
    def of(cls, scores: Scores) -> Self:
        ids = sorted(scores.per_image)
        return cls(
            ids,
            scores.values,
            _columns([scores.per_image[id_] for id_ in ids]),
            _columns([scores.statistics[id_] for id_ in ids]),
        )

    @classmethod
    def read(cls, folder: Path, values: Mapping[str, float | None]) -> Self:
        """From an evaluation folder's captions.jsonl; ``values`` are its scores.json's scores."""
        path = folder / CAPTIONS
        do = "Evaluate it again with this version."
        try:
            by_id = {str(line["image_id"]): line for line in jsonfile.read_lines(path, EvaluationError)}
            ids = sorted(by_id)
            per_image = _columns([by_id[id_]["scores"] for id_ in ids])
            statistics = _columns([by_id[id_]["statistics"] for id_ in ids])
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"no scores of each image: {error!r}", where=path, do=do) from None
        if lacking := [name for name, value in values.items() if value is not None and name not in per_image]:
            raise EvaluationError(f"no scores of each image: {lacking[0]}", where=path, do=do)
        return cls(ids, values, per_image, statistics)


def differences(a: PerImage, b: PerImage, resamples: int = bootstrap.RESAMPLES) -> dict[str, bootstrap.Difference]:
    """B less A for each name that both have. Raises EvaluationError unless both are of the same images."""
    if a.ids != b.ids:
        only = [len(set(one.ids) - set(other.ids)) for one, other in ((a, b), (b, a))]
        raise EvaluationError(
            "not the same images", got=f"{only[0]:,} only in the first, {only[1]:,} only in the second", wanted="none"
        )
    drawn = [bootstrap.resampled(one.per_image, one.statistics, resamples) for one in (a, b)]
    found = {}
    for name, value in a.values.items():
        other = b.values.get(name)
        if value is not None and other is not None:
            found[name] = bootstrap.difference(drawn[0][name], drawn[1][name], other - value)
    return found


def _columns(rows: Sequence[Mapping[str, T]]) -> dict[str, list[T]]:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
