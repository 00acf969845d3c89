"""The rows of ``gpu.py``, what they come to, and how they are shown and written."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

EPOCH_PHOTOS, EPOCH_CAPTIONS, EPOCHS = 29_000, 145_000, 5  # Flickr30k's training split
GOAL_MFU, GOAL_S, GOAL_RATIO = 0.40, 300, 3.0
# Whose captions a second are compared, each at its best size: ours and the peer's (loop, input), compiled, the goal.
PAIRS = (
    (("engine", "photos"), ("a row each", "photos"), False, GOAL_RATIO),
    (("engine", "features"), ("a row each", "photos"), False, GOAL_RATIO),  # who trains so has no feature shards
    (("engine", "features"), ("a row each", "features"), False, None),
    (("packed", "photos"), ("a row each", "photos"), False, None),  # the same bare loop
    (("packed", "features"), ("a row each", "features"), False, None),
    (("engine", "photos"), ("a row each", "photos"), True, None),
    (("engine", "features"), ("a row each", "features"), True, None),
)


@dataclass(frozen=True)
class Contestant:
    """What gets a row: ``loop`` with batches of so many ``photos`` of this ``input``."""

    loop: str
    input: str = "photos"
    photos: int = 0
    stage: int | None = None
    compiled: bool = False
    workers: int = 0

    @property
    def name(self) -> str:
        stage = "" if self.stage is None else f", ZeRO-{self.stage}"
        return f"{self.loop}{stage}{', compiled' if self.compiled else ''}"


@dataclass(frozen=True)
class Row:
    """What was ``found`` of a contestant, or the ``reason`` why nothing was."""

    part: str
    contestant: Contestant
    found: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None

    def tree(self) -> dict[str, Any]:
        return {"part": self.part, "name": self.contestant.name, **asdict(self.contestant), **self.found} | (
            {} if self.reason is None else {"reason": self.reason}
        )


def best(rows: list[Row], *, key: str = "photos_per_s", **wanted: Any) -> Row | None:
    """The row with the highest ``key`` among those whose contestant is as ``wanted``."""
    found = [
        row
        for row in rows
        if key in row.found and all(getattr(row.contestant, name) == value for name, value in wanted.items())
    ]
    return max(found, key=lambda row: float(row.found[key]), default=None)


COLUMNS = (
    "", "input", "photos", "workers", "ms/step", "captions/s", "photos/s", "MFU", "product", "GiB", "planned", "waits",
)  # fmt: skip


def show(title: str, rows: list[Row], device: dict[str, Any], console: Console) -> None:
    reasons, lines = dict[str, list[str]](), list[tuple[str, ...]]()
    for row in rows:
        one, found = row.contestant, row.found

        def cell(key: str, form: str, per: float | None = 1.0, found: dict[str, Any] = found) -> str:
            return format(found[key] / per, form) if per and found.get(key) is not None else ""

        if row.reason is not None:
            workers = f", {one.workers} workers" if one.workers else ""
            reasons.setdefault(row.reason, []).append(f"{one.name}, {one.input} {one.photos or ''}".rstrip() + workers)
        elif "photos_per_s" in found:
            numbers = (
                cell("step_s", ",.1f", 1e-3),
                cell("captions_per_s", ",.0f"),
                cell("photos_per_s", ",.0f"),
                cell("model_tflops", ".1%", device.get("peak_tflops")),
                cell("model_tflops", ".1%", device.get("product_tflops")),
                cell("memory_gib", ".1f"),
                cell("planned_gib", ".1f"),
                cell("wait_share", ".0%"),
            )
            lines.append((one.name, one.input, str(one.photos or ""), str(one.workers or ""), *numbers))
        else:
            console.print(f"{one.name}: {json.dumps(found)}", markup=False, highlight=False)
    if lines:
        table = Table(title=title, title_justify="left")
        told = [number for number in range(len(COLUMNS)) if any(line[number] for line in lines)]
        for number in told:
            justify: Literal["left", "right"] = "left" if number < 2 else "right"
            table.add_column(COLUMNS[number], justify=justify, no_wrap=True)
        for line in lines:
            table.add_row(*(line[number] for number in told))
        console.print(table)
    for reason, names in reasons.items():
        console.print(f"{reason}: {'; '.join(names)}", markup=False, highlight=False)


def summary(rows: list[Row], device: dict[str, Any]) -> list[dict[str, Any]]:
    """What the numbers come to: of each question the measured value, the goal, and whether it is reached (None: ?)."""
    found: list[dict[str, Any]] = []

    def add(what: str, measured: float | None, goal: float | None = None, *, less: bool = False) -> None:
        reached = None if measured is None or goal is None else (measured <= goal if less else measured >= goal)
        found.append({"what": what, "measured": measured, "goal": goal, "reached": reached})

    top = best(rows, key="model_tflops", loop="engine", input="features")
    peak = device.get("peak_tflops")
    add(
        "MFU of projection and decoder, from features",
        top.found["model_tflops"] / peak if top and peak else None,
        GOAL_MFU,
    )
    for pair in PAIRS:
        (ours, of), (theirs, theirs_of), compiled, goal = pair
        first = best(rows, loop=ours, input=of, compiled=compiled)
        second = best(rows, loop=theirs, input=theirs_of, compiled=compiled)
        ratio = first.found["captions_per_s"] / second.found["captions_per_s"] if first and second else None
        add(f"{ours}, {of}, beside {theirs}, {theirs_of}{'; both compiled' if compiled else ''}", ratio, goal)
    once = best(rows, loop="features")
    making = None if once is None else EPOCH_PHOTOS / once.found["photos_per_s"]
    for of in ("photos", "features"):
        loop = best(rows, loop="whole loop", input=of)
        epoch = None if loop is None else EPOCH_CAPTIONS / loop.found["captions_per_s"]
        add(f"Flickr30k-sized epoch from {of}, s", epoch)
        add(f"five of them from {of}, s", None if epoch is None else EPOCHS * epoch, GOAL_S, less=True)
        enough = [row.contestant.workers for row in rows if keeps_up(row, best(rows, loop="engine", input=of), of)]
        add(f"fewest workers of those tried that deliver what the GPU trains from {of}", min(enough, default=None))
    add("making the features of 29,000 photos, once, s", making)
    return found


def keeps_up(row: Row, trained: Row | None, of: str) -> bool:
    one = row.contestant
    if trained is None or one.loop != "loader" or one.input != of:
        return False
    return float(row.found.get("photos_per_s", 0.0)) >= float(trained.found["photos_per_s"])


def show_summary(found: list[dict[str, Any]], console: Console) -> None:
    table = Table("", "measured", "goal", "reached", title="What it comes to", title_justify="left")
    for line in found:
        measured, goal = ("" if line[key] is None else f"{line[key]:,.2f}" for key in ("measured", "goal"))
        table.add_row(line["what"], measured, goal, {None: "", True: "yes", False: "no"}[line["reached"]])
    console.print(table)


def write(out: Path, rows: list[Row], options: dict[str, Any], *, complete: bool) -> None:
    """All there is so far, whole at any moment."""
    device = device_of(rows)
    content = {
        "complete": complete,
        "device": device,
        "cpus": len(os.sched_getaffinity(0)),
        "options": options,
        "rows": [row.tree() for row in rows],
        "summary": summary(rows, device),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(out)


def device_of(rows: list[Row]) -> dict[str, Any]:
    return next((row.found for row in rows if row.contestant.loop == "device"), {})
