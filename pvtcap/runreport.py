"""Runs as one HTML page that needs nothing beside it: curves, scores, what differs between them, what happened.

    Path("report.html").write_text(page([read(Path("runs/a")), read(Path("runs/b"))]))

All of it is from the run folders' log.jsonl, config.yaml, environment.json and eval/; a run may still be going on.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from pvtcap import jsonfile, runlog
from pvtcap.configfile import flat, read_yaml
from pvtcap.errors import ConfigError
from pvtcap.htmlreport import document, inline
from pvtcap.stepfolders import step_of

CHARTS = (
    ("Loss, nats a token (val dashed)", ("train/loss", "val/loss")),
    ("CIDEr", ("val/CIDEr",)),
    ("Bleu_4", ("val/Bleu_4",)),
    ("METEOR", ("val/METEOR",)),
    ("Captions a second", ("speed/captions_per_second",)),
    ("Share of time waiting for data", ("data/wait_share",)),
    ("Gradient norm", ("train/grad_norm",)),
    ("Learning rate", ("train/lr",)),
    ("Host memory, GiB a rank", ("memory/host_gib",)),
)
_SCORES = ("val/CIDEr", "val/Bleu_4", "val/METEOR", "val/ROUGE_L", "val/SPICE")
_SHEET = "captions.png"
_STYLE = """
td, th { padding: .2rem 1.1rem .2rem 0; border-bottom: 1px solid #e4e4e4; text-align: left; vertical-align: top;
font-variant-numeric: tabular-nums; font-weight: normal; } th { color: #666; } .charts { display: grid; gap: 1rem;
grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); } .charts svg { width: 100%; height: auto; }
img { max-width: 100%; }
"""


@dataclass(frozen=True)
class Run:
    """A run folder, read. ``lines`` are those of log.jsonl; ``sheet`` a PNG of its last captions."""

    name: str
    path: Path
    lines: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]
    sheet: bytes | None

    def curve(self, tag: str) -> tuple[list[int], list[float]]:
        """Steps and values."""
        points = sorted((line["step"], line[tag]) for line in self.lines if tag in line and line["kind"] != "spike")
        return [step for step, _ in points], [value for _, value in points]


def read(path: Path) -> Run:
    """ConfigError where there is no log of a run."""
    lines = runlog.read(path)
    if not lines:
        raise ConfigError(
            "no run is logged here", where=path, wanted=f"a run folder with a {runlog.LOG}", do="Such as runs/NAME."
        )
    sheets = sorted(path.glob(f"eval/*/{_SHEET}"), key=lambda sheet: step_of(sheet.parent))
    return Run(
        name=path.resolve().name,
        path=path,
        lines=lines,
        config=flat(read_yaml(path / "config.yaml")),
        environment=jsonfile.read(path / "environment.json", ConfigError),
        sheet=sheets[-1].read_bytes() if sheets else None,
    )


def page(runs: Sequence[Run]) -> str:
    """The whole page."""
    differing = _differences(runs)
    parts = [
        _table(["", *_names(runs)], _summary(runs)),
        "<h2>Curves</h2>",
        f'<div class="charts">{"".join(_charts(runs))}</div>',
        *(
            ["<h2>What differs in their configurations</h2>", _table(["", *_names(runs)], differing)]
            if differing
            else []
        ),
        "<h2>What happened</h2>",
        _table(["run", "step", ""], _events(runs))
        if _events(runs)
        else '<p class="about">nothing out of the ordinary</p>',
    ]
    for run in runs:
        if run.sheet is not None:
            parts.append(f"<h2>Captions of {escape(run.name)}, the last ones</h2>")
            parts.append(f'<img alt="" src="{inline(run.sheet, "png")}">')
    return document(", ".join(run.name for run in runs), "".join(parts), _STYLE)


def _names(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs]


def _summary(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of name and a cell a run."""
    rows = [
        ["step", *(f"{max(line['step'] for line in run.lines):,}" for run in runs)],
        ["ranks", *(f"{run.environment['world_size']} × {run.environment['device']}" for run in runs)],
        ["train loss, last", *(_last(run, "train/loss") for run in runs)],
        ["val loss, best", *(_best(run, "val/loss", lowest=True) for run in runs)],
        *([f"{tag.removeprefix('val/')}, best", *(_best(run, tag) for run in runs)] for tag in _SCORES),
        ["captions/s, median", *(_median(run, "speed/captions_per_second") for run in runs)],
        ["model FLOPs utilisation, median", *(_median(run, "speed/mfu") for run in runs)],
        ["time waiting for data, median", *(_median(run, "data/wait_share") for run in runs)],
        ["seconds of a checkpoint, median", *(_median(run, "checkpoint/seconds") for run in runs)],
    ]
    return [row for row in rows if any(row[1:])]


def _last(run: Run, tag: str) -> str:
    values = run.curve(tag)[1]
    return f"{values[-1]:.4f}" if values else ""


def _best(run: Run, tag: str, *, lowest: bool = False) -> str:
    steps, values = run.curve(tag)
    if not values:
        return ""
    best = min(values) if lowest else max(values)
    return f"{best:.4f} at step {steps[values.index(best)]:,}"


def _median(run: Run, tag: str) -> str:
    values = run.curve(tag)[1]
    return f"{median(values):.4g}" if values else ""


def _differences(runs: Sequence[Run]) -> list[list[str]]:
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [[key, *(str(run.config.get(key, "–")) for run in runs)] for key in keys if key != "run.dir"]
    return [row for row in rows if len(set(row[1:])) > 1]


def _events(runs: Sequence[Run]) -> list[list[str]]:
    rows = []
    for run in runs:
        for line in run.lines:
            if line["kind"] == "event":
                rows.append([run.name, f"{line['step']:,}", line["text"]])
            elif line["kind"] == "spike":
                text = f"loss {line['train/loss']:.3f} where {line['expected']:.3f} was expected; photos: "
                text += ", ".join(line["keys"][:8])
                rows.append([run.name, f"{line['step']:,}", text])
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{first}</tr>{body}</table>"


def _charts(runs: Sequence[Run]) -> list[str]:
    """An SVG for each chart that any run has points for."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    found = []
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pvtcap", "font.size": 9}):
        for title, tags in CHARTS:
            figure = Figure(figsize=(5.2, 3.0), layout="constrained")
            axes: Any = figure.subplots()
            for number, run in enumerate(runs):
                for tag, style in zip(tags, ("-", "--"), strict=False):
                    steps, values = run.curve(tag)
                    if steps:
                        label = run.name if tag == tags[0] else None
                        marker = "o" if len(steps) < 30 else None
                        axes.plot(
                            steps, values, style, color=f"C{number % 10}", label=label, marker=marker, ms=3, lw=1.2
                        )
            if not axes.lines:
                continue
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            if len(runs) > 1:
                axes.legend(frameon=False, fontsize=8)
            out = io.StringIO()
            figure.savefig(out, format="svg", metadata={"Date": None})
            found.append(out.getvalue()[out.getvalue().index("<svg") :])
    return found
