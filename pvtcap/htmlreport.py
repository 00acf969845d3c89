"""An evaluation as one HTML page that needs nothing beside it: scores, and photos with what the model says of them."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

NUM_WORST, NUM_BEST, NUM_RANDOM, SEED = 20, 12, 12, 0

_FRAME = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem; color: #1c1c1c; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.about { color: #666; margin-top: 0; } table { border-collapse: collapse; }
"""
_STYLE = """
.note { color: #8a4b00; } table { display: inline-table; margin: 0 2.5rem 1rem 0; vertical-align: top; }
td { padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #e4e4e4; } td.number { text-align: right;
font-variant-numeric: tabular-nums; } td.interval { color: #666; font-variant-numeric: tabular-nums; }
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(255px, 1fr)); gap: 1.2rem; }
figure { margin: 0; } figure img { width: 100%; height: 200px; object-fit: contain; background: #f1f1f1; }
figcaption b { display: block; margin: .3rem 0 .1rem; } figcaption ul { margin: .2rem 0 0; padding-left: 1.1rem;
color: #666; font-size: 13px; } details { font-size: 13px; } summary { color: #666; cursor: pointer; }
.words { display: flex; flex-wrap: wrap; gap: 4px; } .words span { width: 80px; text-align: center; }
.words img { width: 80px; height: auto; } .score { float: right; margin-left: .6rem; color: #666; font-size: 13px; }
"""


@dataclass(frozen=True)
class WordPicture:
    """A word of a caption, and a JPEG of where the model looked for it."""

    word: str
    jpeg: bytes


def page(
    report: Mapping[str, Any],
    ranked: Sequence[Mapping[str, Any]],
    photo: Callable[[str], bytes],
    pictures: Mapping[str, Sequence[WordPicture]] | None = None,
) -> str:
    """The page of scores.json's ``report`` and its photos, the worst first; ``photo`` gives a key's JPEG.

    ``pictures`` are those of its words, where there are some. A photo that is in several sections is in the page once
    for each.
    """
    step = f"step {report['step']:,}" if report.get("step") is not None else ""
    how = report["generation"]
    words = [
        *(f"{report['num_photos']:,} photos of {report['data']}", report["checkpoint"], step),
        f"{how['num_beams']} beams" if how["top_p"] is None else f"nucleus sampling, top_p {how['top_p']}",
        f"at most {how['max_length']} tokens",
        how["precision"],
        "photos blanked" if report["blank_photos"] else "",
    ]
    notes = [f"{name} is unavailable: {reason}" for name, reason in report["unavailable"].items()]
    if report["num_missing"]:
        keys = [one["key"] for one in report["missing"]]
        some_keys = ", ".join(keys[:10]) + ", …" * (len(keys) > 10)
        notes.append(
            f"Not readable, and in no score: {len(keys):,} of {len(keys) + len(ranked):,} photos ({some_keys})"
        )
    body = "".join(
        f"<h2>{title}</h2>{_photos(rows, photo, pictures or {})}" for title, rows in _sections(ranked).items()
    )
    return document(
        f"Captions of {report['data']}",
        f'<p class="about">{escape(" · ".join(filter(None, words)))}</p>'
        f"{_scores(report)}{''.join(f'<p class=note>{escape(note)}</p>' for note in notes)}"
        '<p class="about">Intervals are 95%, by bootstrap over photos. Photos are ranked by their own CIDEr, '
        f"equal ones by ROUGE-L.</p>{body}",
        _STYLE,
    )


def document(title: str, body: str, style: str) -> str:
    """A whole page: its title as plain text, HTML below it, and what CSS it has besides the frame that all share."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_FRAME}{style}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{escape(title)}</h1>{body}</body></html>\n'


def inline(picture: bytes, kind: str = "jpeg") -> str:
    """A picture as the address of itself."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def shown(ranked: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that the page shows, each once."""
    return list({row["key"]: row for rows in _sections(ranked).values() for row in rows}.values())


def _sections(ranked: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    draw = np.random.default_rng(SEED)
    some = sorted(draw.permutation(len(ranked))[:NUM_RANDOM])
    return {
        f"The {min(NUM_WORST, len(ranked))} worst": list(ranked[:NUM_WORST]),
        f"The {min(NUM_BEST, len(ranked))} best": list(ranked[::-1][:NUM_BEST]),
        f"{len(some)} at random": [ranked[number] for number in some],
    }


def _scores(report: Mapping[str, Any]) -> str:
    rows = []
    for name, value in report["scores"].items():
        low, high = report["intervals"].get(name, (None, None))
        interval = "" if low is None else f"{low:.4f} – {high:.4f}"
        shown = "unavailable" if value is None else f"{value:.4f}"
        rows.append(_row(name, shown, interval))
    more = {"held-out loss (nats a token)": report.get("loss"), "perplexity": report.get("perplexity")}
    more |= report["statistics"]
    others = [_row(name.replace("_", " "), f"{value:,.4g}") for name, value in more.items() if value is not None]
    return f"<table>{''.join(rows)}</table><table>{''.join(others)}</table>"


def _row(name: str, value: str, interval: str = "") -> str:
    return f'<tr><td>{escape(name)}</td><td class="number">{value}</td><td class="interval">{interval}</td></tr>'


def _photos(
    rows: Sequence[Mapping[str, Any]],
    photo: Callable[[str], bytes],
    pictures: Mapping[str, Sequence[WordPicture]],
) -> str:
    figures = []
    for row in rows:
        score = f"CIDEr {row['scores']['CIDEr']:.2f}" if "CIDEr" in row["scores"] else ""
        references = "".join(f"<li>{escape(reference)}</li>" for reference in row["references"])
        caption, key = escape(row["caption"]) or "<i>nothing</i>", escape(row["key"])
        figures.append(
            f'<figure><img src="{inline(photo(row["key"]))}" alt="{key}" title="{key}">'
            f'<figcaption><span class="score">{score}</span><b>{caption}</b>{_words(pictures.get(row["key"], ()))}'
            f"<ul>{references}</ul></figcaption></figure>"
        )
    return f'<div class="photos">{"".join(figures)}</div>'


def _words(pictures: Sequence[WordPicture]) -> str:
    """Folded up, as most who read the page look at a few photos only."""
    spans = "".join(f'<span><img src="{inline(one.jpeg)}" alt="">{escape(one.word)}</span>' for one in pictures)
    return f'<details><summary>where it looked</summary><div class="words">{spans}</div></details>' if spans else ""
