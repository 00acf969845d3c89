"""How often whole numbers occur: exact, and as large as there are different values, however many were counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Distribution:
    """``counts[value]`` is how often ``value`` occurred. All but ``add`` and ``update`` need one that is not empty."""

    counts: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, values: Iterable[int]) -> Distribution:
        return cls(Counter(values))

    def add(self, value: int) -> None:
        self.counts[value] += 1

    def update(self, other: Distribution) -> None:
        self.counts.update(other.counts)

    @property
    def num(self) -> int:
        """How many values were counted."""
        return self.counts.total()

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(value * times for value, times in self.counts.items())

    @property
    def mean(self) -> float:
        return self.total / self.num

    @property
    def min(self) -> int:
        return min(self.counts)

    @property
    def max(self) -> int:
        return max(self.counts)

    def quantile(self, share: float) -> int:
        """The nearest rank: the smallest value that at least ``share`` of the values do not exceed."""
        wanted = share * self.num
        reached = 0
        for value in sorted(self.counts):
            reached += self.counts[value]
            if reached >= wanted:
                break
        return value

    def as_json(self) -> dict[str, Any]:
        """min, mean, median, p95, max, and counts: pairs [value, how often] in the values' order."""
        return {
            "min": self.min,
            "mean": self.mean,
            "median": self.quantile(0.5),
            "p95": self.quantile(0.95),
            "max": self.max,
            "counts": [list(pair) for pair in sorted(self.counts.items())],
        }


@dataclass
class Range:
    """Least, mean and largest of numbers too different to count one by one, such as sizes in bytes."""

    num: int = 0
    total: int = 0
    min: int = 0
    max: int = 0

    def add(self, value: int) -> None:
        self.update(Range(1, value, value, value))

    def update(self, other: Range) -> None:
        if other.num:
            self.min = min(self.min, other.min) if self.num else other.min
            self.max = max(self.max, other.max)
            self.num += other.num
            self.total += other.total

    @property
    def mean(self) -> float:
        return self.total / self.num

    def as_json(self) -> dict[str, Any]:
        """min, mean, max and total."""
        return {"min": self.min, "mean": self.mean, "max": self.max, "total": self.total}
