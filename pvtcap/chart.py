"""Histograms as one picture, drawn with Pillow: matplotlib would be a large dependency for a few bars.

Panel(title, axis, unit, Distribution) … ── draw_panels() ──▶ PNG, two panels a row
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pvtcap.distribution import Distribution

PANEL_PX, COLUMNS = (640, 400), 2
_LEFT_PX, _RIGHT_PX, _TOP_PX, _BOTTOM_PX = 84, 24, 92, 60
_INK, _GREY, _GRID, _BAR, _TAIL_BAR = "#202020", "#606060", "#e4e4e4", "#3b75af", "#b0b0b0"
_MOST_BARS = 40


@dataclass(frozen=True)
class Panel:
    """One histogram: what is on the horizontal axis, with its unit, and what the heights of the bars count."""

    title: str
    axis: str
    counted: str
    values: Distribution


@dataclass(frozen=True)
class Bars:
    """Bar *n* counts the values from ``first + n * step`` to below the next bar's; ``tail`` those behind all bars."""

    first: int
    step: int
    heights: list[int]
    tail: int = 0

    @property
    def stop(self) -> int:
        """The value that the bars do not reach."""
        return self.first + self.step * len(self.heights)


def bars(values: Distribution) -> Bars:
    """At most 40 bars and some, as wide as a round number; a few values far off do not press the others together."""
    low, high = values.min, values.max
    most = values.quantile(0.995)
    if high - low > 2 * max(most - low, 10):
        high = most
    step = next(step for step in _round_numbers() if (high - low) // step < _MOST_BARS)
    first = low // step * step
    heights = [0] * ((high - first) // step + 1)
    tail = 0
    for value, times in values.counts.items():
        number = (value - first) // step
        if number < len(heights):
            heights[number] += times
        else:
            tail += times
    return Bars(first, step, heights, tail)


def draw_panels(panels: Sequence[Panel], title: str, path: Path) -> None:
    """Write a PNG with the panels in rows of two below the title."""
    width, height = PANEL_PX
    head = 56
    canvas = Image.new("RGB", (COLUMNS * width, head + -(-len(panels) // COLUMNS) * height), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((24, 20), title, fill=_INK, font=ImageFont.load_default(22))
    for number, panel in enumerate(panels):
        row, column = divmod(number, COLUMNS)
        _draw_panel(pen, panel, column * width, head + row * height)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def _draw_panel(pen: ImageDraw.ImageDraw, panel: Panel, x: int, y: int) -> None:
    small, large = ImageFont.load_default(14), ImageFont.load_default(18)
    shown, values = bars(panel.values), panel.values
    left, right, top, bottom = x + _LEFT_PX, x + PANEL_PX[0] - _RIGHT_PX, y + _TOP_PX, y + PANEL_PX[1] - _BOTTOM_PX
    pen.text((x + 24, y + 10), panel.title, fill=_INK, font=large)
    numbers = f"min {values.min:,}   median {values.quantile(0.5):,}   mean {values.mean:,.1f}   max {values.max:,}"
    pen.text((x + 24, y + 36), numbers, fill=_GREY, font=small)
    pen.text((left, top - 12), panel.counted, fill=_GREY, font=small, anchor="lb")

    highest = max(*shown.heights, shown.tail)
    step = next(step for step in _round_numbers() if highest / step <= 5)
    scale = (bottom - top) / (-(-highest // step) * step)
    for tick in range(0, highest + step, step):
        at = bottom - round(tick * scale)
        pen.line((left, at, right, at), fill=_GRID if tick else _INK)
        pen.text((left - 8, at), f"{tick:,}", fill=_GREY, font=small, anchor="rm")

    _draw_bars(pen, shown, (left, right, bottom), scale)
    below = panel.axis
    if shown.tail:
        below += f"    (in grey: {shown.tail:,} with {shown.stop:,} or more)"
    pen.text(((left + right) / 2, bottom + 46), below, fill=_INK, font=small, anchor="mm")


def _draw_bars(pen: ImageDraw.ImageDraw, shown: Bars, place: tuple[int, int, int], scale: float) -> None:
    """The bars, and the numbers below the axis: at a bar's middle when it stands for one value, at its edges if not."""
    left, right, bottom = place
    font = ImageFont.load_default(14)
    # At least five places, so that a single bar is not a wall; one more, half a bar off, for the tail.
    slots = len(shown.heights) + (1.5 if shown.tail else 0)
    places = max(5.0, slots)
    wide = (right - left) / places
    start = left + (places - slots) / 2 * wide
    gap = 1 if wide > 4 else 0
    for number, times in enumerate([*shown.heights, shown.tail]):
        is_tail = number == len(shown.heights)
        if times:
            a = start + (number + (0.5 if is_tail else 0)) * wide
            top = min(bottom - 1, round(bottom - times * scale))  # one in a million is seen too
            box = (round(a) + gap, top, round(a + wide) - 1 - gap, bottom - 1)
            pen.rectangle(box, fill=_TAIL_BAR if is_tail else _BAR)
    widest = font.getlength(f"{shown.stop:,}") + 14
    every = next(every for every in _round_numbers() if every >= shown.step and every / shown.step * wide >= widest)
    last = shown.stop - 1 if shown.step == 1 else shown.stop
    for value in range(-(-shown.first // every) * every, last + 1, every):
        at = start + ((value - shown.first) / shown.step + (0.5 if shown.step == 1 else 0)) * wide
        pen.line((at, bottom, at, bottom + 5), fill=_INK)
        pen.text((at, bottom + 10), f"{value:,}", fill=_GREY, font=font, anchor="ma")


def _round_numbers() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, …"""
    for power in itertools.count():
        for digit in (1, 2, 5):
            yield digit * 10**power
