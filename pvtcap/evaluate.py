"""Caption a whole ShardSet on every rank, merge, score. Takes a checkpoint folder, leaves an evaluation folder.

    OUT/results.json     COCO's format: [{"image_id": …, "caption": …}, …], in the ShardSet's order
    OUT/scores.json      the metrics, which were unavailable and why, caption statistics, what was evaluated
    OUT/captions.jsonl   a photo a line: key, image_id, caption, references and its own scores
    OUT/captions.png     the first photos with what the model says and a reference

The model is an ordinary module on each rank, never under ZeRO, so no collective occurs while captions are generated
and ranks may finish at different times. Batches are cut before ranks share them: any world size writes the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pvtcap import metrics, sheet
from pvtcap.checkpoint import Checkpoint
from pvtcap.config import EvaluateConfig
from pvtcap.dist import World
from pvtcap.errors import EvaluationError
from pvtcap.scoretable import SCORES
from pvtcap.shardset import ShardReader, ShardSet, write_json
from pvtcap.stream import View, whole_batches

RESULTS, CAPTIONS, SHEET = "results.json", "captions.jsonl", "captions.png"


@dataclass(frozen=True)
class Captioned:
    """One photo's generated caption, beside what identifies it and its references."""

    key: str
    image_id: int | str
    caption: str
    references: tuple[str, ...]


def run(
    checkpoint: Path, data: Path, out: Path, world: World, how: EvaluateConfig, *, blank_photos: bool = False
) -> dict[str, Any] | None:
    """Evaluate; collective. Returns the content of scores.json on rank 0, None elsewhere."""
    chosen = world.on_first_rank(lambda: Checkpoint.open(checkpoint))
    shardset = world.on_first_rank(lambda: ShardSet.open(data))
    mine = generate(chosen, shardset, world, how, blank_photos)
    parts = world.gather(mine)

    def finish() -> dict[str, Any]:
        assert parts is not None, "rank 0 gathers"
        captioned = merge(shardset, [item for part in parts for item in part])
        write_json(out / RESULTS, [{"image_id": c.image_id, "caption": c.caption} for c in captioned])
        draw_sheet(captioned[: how.sheet_photos], shardset, out / SHEET)
        scores = score(captioned, how)
        report = {
            "scores": scores.values,
            "unavailable": scores.unavailable,
            "statistics": metrics.caption_statistics({str(c.image_id): c.caption for c in captioned}),
            "num_photos": len(captioned),
            "blank_photos": blank_photos,
            "checkpoint": chosen.path.name,
            "step": chosen.manifest.step,
            "data": shardset.manifest.name,
            "generation": how.model_dump(mode="json"),
        }
        write_captions(captioned, scores, out / CAPTIONS)
        write_json(out / SCORES, report)
        return report

    report = world.on_first_rank(finish)
    return report if world.is_first else None


def generate(
    checkpoint: Checkpoint, shardset: ShardSet, world: World, how: EvaluateConfig, blank_photos: bool
) -> list[Captioned]:
    """Captions of this rank's photos."""
    model, tokenizer = checkpoint.captioner(world.device), checkpoint.tokenizer()
    data = checkpoint.config.data.model_copy(update={"blank_photos": blank_photos})
    view = View(data, tokenizer, checkpoint.config.text.max_tokens)
    captioned = []
    for batch in whole_batches(shardset, view, how.micro_batch, world, even=False):
        captions = model.caption(batch.photos.to(world.device), tokenizer, how)
        captioned += [
            Captioned(sample.key, sample.image_id, caption, sample.captions)
            for sample, caption in zip(batch.samples, captions, strict=True)
        ]
    return captioned


def merge(shardset: ShardSet, captioned: Sequence[Captioned]) -> list[Captioned]:
    """The captions in the ShardSet's order; EvaluationError unless each of its photos has exactly one."""
    counts = Counter(item.key for item in captioned)
    keys = list(shardset.keys())
    wrong = [key for key in keys if counts[key] != 1] + sorted(counts.keys() - set(keys))
    if wrong:
        raise EvaluationError(
            "not exactly one caption for each photo",
            where=shardset.path,
            got=f"{counts[wrong[0]]} for {wrong[0]}, {len(wrong)} such photos",
            wanted="1 each",
        )
    by_key = {item.key: item for item in captioned}
    return [by_key[key] for key in keys]


def score(captioned: Sequence[Captioned], how: EvaluateConfig) -> metrics.Scores:
    references = {str(item.image_id): list(item.references) for item in captioned}
    candidates = {str(item.image_id): item.caption for item in captioned}
    return metrics.score(references, candidates, timeout_s=how.metric_timeout_s)


def write_captions(captioned: Sequence[Captioned], scores: metrics.Scores, path: Path) -> None:
    lines = [
        json.dumps({**asdict(item), "scores": scores.per_image.get(str(item.image_id), {})}, ensure_ascii=False)
        for item in captioned
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_sheet(captioned: Sequence[Captioned], shardset: ShardSet, path: Path) -> None:
    """The set's first photos: the same ones at each evaluation."""
    if not captioned:
        return
    entries = []
    with ShardReader(shardset) as reader:
        places = ((shard, index) for shard, size in enumerate(shardset.sizes) for index in range(size))
        for item, place in zip(captioned, places, strict=False):
            entries.append(sheet.Entry(reader.read(*place).photo, item.caption, item.references[0]))
    sheet.draw(entries, path)
