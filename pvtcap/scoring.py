"""The second half of an evaluation: from captions to scores, pictures and a report. No model, and no torch, is needed.

``evaluate`` leaves captions.jsonl and evaluation.json; ``finish`` makes the rest and takes evaluation.json away. It may
run in the process that captioned, in another one beside a training run (``Scoring``), or again after it was killed:

    python -m pvtcap.scoring OUT
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pvtcap import htmlreport, metrics, sheet
from pvtcap.comparison import CAPTIONS
from pvtcap.errors import PvtcapError, ShardError
from pvtcap.photo import BadPhoto, pillow_errors, upright_rgb
from pvtcap.scoretable import SCORES
from pvtcap.shardcache import ShardCache
from pvtcap.shardset import ShardReader, ShardSet, write_json

RESULTS, SHEET, WORST, REPORT, EVALUATION = (
    "results.json",
    "captions.png",
    "worst.png",
    "report.html",
    "evaluation.json",
)
FILES = (REPORT, RESULTS, SCORES, CAPTIONS, SHEET, WORST)  # not all are drawn of features
HeatMaps = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Sequence[htmlreport.WordPicture]]]
_LOG = "scoring.log"
_PHOTO_PX, _QUALITY = 320, 85
_BY = ("CIDEr", "ROUGE_L", "Bleu_1")  # which of a photo's scores say how good its caption is; the next, of equal ones


def prepare(
    out: Path,
    identity: str,
    report: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    data: ShardSet,
    training: Path | None,
) -> None:
    """Leave what ``finish`` needs: ``rows`` of key, image_id, caption, references, and the rest of scores.json.

    evaluation.json comes last: where it is, the captions are whole.
    """
    for name in (SCORES, EVALUATION):
        (out / name).unlink(missing_ok=True)
    _write_lines(out / CAPTIONS, rows)
    places = {"data": _location(data), "training": None if training is None else str(training.absolute())}
    write_json(out / EVALUATION, {"identity": identity, **places, "report": report})


def waits(out: Path, identity: str) -> bool:
    """Are the captions of this very evaluation there, and only their scores not?"""
    try:
        return bool(json.loads((out / EVALUATION).read_bytes())["identity"] == identity)
    except (OSError, ValueError, KeyError):
        return False


def finish(out: Path, heat_maps: HeatMaps | None = None) -> dict[str, Any]:
    """Score what ``prepare`` left; returns the content of scores.json, the last file that is written.

    ``heat_maps`` gives the pictures of the report's photos, by key.
    """
    about = json.loads((out / EVALUATION).read_bytes())
    rows = [json.loads(line) for line in (out / CAPTIONS).read_text(encoding="utf-8").split("\n") if line]
    how = about["report"]["generation"]
    write_json(out / RESULTS, [{"image_id": row["image_id"], "caption": row["caption"]} for row in rows])
    scores = metrics.score(
        {row["key"]: row["references"] for row in rows},
        {row["key"]: row["caption"] for row in rows},
        timeout_s=how["metric_timeout_s"],
        memory_mib=how["metric_memory_mib"],
        java_heap_mib=how["java_heap_mib"],
    )
    rows = [
        {**row, "scores": scores.per_image[row["key"]], "statistics": scores.statistics[row["key"]]} for row in rows
    ]
    report = {
        "scores": scores.values,
        "intervals": {name: list(interval) for name, interval in scores.intervals.items()},
        "unavailable": scores.unavailable,
        "tokenizer": scores.tokenizer,
        "statistics": metrics.caption_statistics(
            {row["key"]: row["caption"] for row in rows}, _training_captions(about["training"])
        ),
        **about["report"],
    }
    ranked = sorted(rows, key=_goodness)
    shardset = _open(about["data"])
    photos = Photos(shardset)
    if shardset.manifest.features is None:  # of features there is nothing to draw
        _draw(rows[: how["sheet_photos"]], photos, out / SHEET)
        _draw(ranked[: htmlreport.NUM_WORST], photos, out / WORST)
    pictures = heat_maps(htmlreport.shown(ranked)) if heat_maps is not None else {}
    (out / REPORT).write_text(htmlreport.page(report, ranked, photos.read, pictures), encoding="utf-8")
    _write_lines(out / CAPTIONS, rows)
    write_json(out / SCORES, report)
    (out / EVALUATION).unlink()
    return report


class Photos:
    """Small JPEGs of a ShardSet's photos, upright, by key; grey where one cannot be read (it may be blanked, too)."""

    def __init__(self, shardset: ShardSet) -> None:
        self.reader = ShardReader(shardset)
        places = ((shard, index) for shard, size in enumerate(shardset.sizes) for index in range(size))
        self.places = dict(zip(shardset.keys(), places, strict=True))

    def encoded(self, key: str) -> bytes:
        """As it lies in the shard. Raises ShardError."""
        return self.reader.read(*self.places[key]).photo

    def read(self, key: str) -> bytes:
        try:
            with pillow_errors(), Image.open(io.BytesIO(self.encoded(key))) as image:
                rgb = upright_rgb(image)
        except (BadPhoto, ShardError):
            rgb = Image.new("RGB", (_PHOTO_PX, _PHOTO_PX), "#808080")
        rgb.thumbnail((_PHOTO_PX, _PHOTO_PX))
        out = io.BytesIO()
        rgb.save(out, "JPEG", quality=_QUALITY)
        return out.getvalue()


@dataclass(frozen=True)
class Scored:
    """An evaluation that ``Scoring`` has done with: its report, or why there is none."""

    step: int
    out: Path
    report: dict[str, Any] | None
    reason: str = ""


class Scoring:
    """Scores evaluations in a process of its own, one at a time, while a training run goes on. Rank 0's matter.

    scoring.start(1000, out)                    returns at once
    for scored in scoring.finished(): …         at any later step; again returns at once
    for scored in scoring.wait(): …             at the end of the run

    A slow scorer never piles up work: while one runs, only the newest of those that came meanwhile waits; the others
    are given back by ``finished`` with a reason, their captions whole (python -m pvtcap.scoring OUT scores them).
    """

    def __init__(self) -> None:
        self._running: tuple[int, Path, subprocess.Popen[bytes]] | None = None
        self._waiting: tuple[int, Path] | None = None
        self._done: deque[Scored] = deque()

    def start(self, step: int, out: Path) -> None:
        if self._waiting is not None:
            reason = f"not scored: the scores of an earlier step were not done when those of step {step} were due"
            self._done.append(Scored(*self._waiting, None, reason))
        self._waiting = step, out
        self._look()

    def finished(self) -> Iterator[Scored]:
        """Those done since last asked."""
        self._look()
        while self._done:
            yield self._done.popleft()

    def wait(self) -> Iterator[Scored]:
        """All that are left; returns when they are done. The metrics' time limits bound how long that takes."""
        while self._running is not None:
            self._running[2].wait()
            self._look()
        yield from self.finished()

    def stop(self) -> None:
        """Give up what runs, as after an error: the captions are there, and can be scored again."""
        if self._running is not None:
            self._running[2].terminate()
            self._running[2].wait()

    def _look(self) -> None:
        if self._running is not None and self._running[2].poll() is not None:
            step, out, process = self._running
            if process.returncode == 0:
                if not (out / _LOG).stat().st_size:
                    (out / _LOG).unlink()  # it had nothing to say
                self._done.append(Scored(step, out, json.loads((out / SCORES).read_bytes())))
            else:
                said = (out / _LOG).read_text(encoding="utf-8", errors="replace").strip()
                reason = said.splitlines()[-1] if said else f"the scorer ended with code {process.returncode}"
                self._done.append(Scored(step, out, None, reason))
            self._running = None
        if self._running is None and self._waiting is not None:
            (step, out), self._waiting = self._waiting, None
            with (out / _LOG).open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "pvtcap.scoring", str(out)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            os.setpriority(os.PRIO_PROCESS, process.pid, 10)  # training comes first
            self._running = step, out, process


def _location(shardset: ShardSet) -> dict[str, Any]:
    """What ``_open`` needs, in another process too: the folder, or the URL and the cache that has what was fetched."""
    if shardset.mirror is None:
        return {"folder": str(shardset.path.absolute())}
    cache = shardset.mirror.cache
    return {"url": shardset.mirror.url, "cache": str(cache.folder), "cache_bytes": cache.max_bytes}


def _open(location: dict[str, Any]) -> ShardSet:
    if "url" not in location:
        return ShardSet.open(location["folder"])
    return ShardSet.open(location["url"], ShardCache(Path(location["cache"]), location["cache_bytes"]))


def _goodness(row: dict[str, Any]) -> list[float]:
    return [row["scores"].get(name, 0.0) for name in _BY]


def _training_captions(folder: str | None) -> Iterator[str] | None:
    if folder is None:
        return None
    return (caption for captions in ShardSet.open(Path(folder)).captions() for caption in captions)


def _draw(rows: Sequence[dict[str, Any]], photos: Photos, path: Path) -> None:
    if rows:
        sheet.draw([sheet.Entry(photos.read(r["key"]), r["caption"], r["references"][0]) for r in rows], path)


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    try:
        finish(Path(sys.argv[1]))
    except PvtcapError as error:
        sys.exit(str(error))
