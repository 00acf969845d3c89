"""Caption a whole ShardSet on every rank, merge, score. Takes a checkpoint folder, leaves an evaluation folder.

    OUT/results.json     COCO's format: [{"image_id": …, "caption": …}, …], in the ShardSet's order
    OUT/scores.json      the metrics, which were unavailable and why, caption statistics, what was evaluated; last
    OUT/captions.jsonl   a photo a line: key, image_id, caption, references and its own scores
    OUT/report.html      all of it to look at: scores, the best, the worst and other photos with captions
    OUT/captions.png, worst.png     the first photos, and the worst, with what the model says and a reference

The model is an ordinary module on each rank, never under ZeRO, so no collective occurs while captions are generated
and ranks may finish at different times. Batches are cut before ranks share them: any world size writes the same bytes.
What a rank has captioned it keeps in OUT/parts until all is merged: an evaluation that was killed goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch

from pvtcap import frozenencoder, heatmaps, scoring
from pvtcap.batch import Batch
from pvtcap.checkpoint import Checkpoint
from pvtcap.config import Config, EvaluateConfig
from pvtcap.dist import World
from pvtcap.errors import EvaluationError, ShardError
from pvtcap.evalparts import Captioned, Part, Parts
from pvtcap.packing import Packed
from pvtcap.scoretable import SCORES
from pvtcap.scoring import SHEET, WORST
from pvtcap.shardset import ShardSet
from pvtcap.sources import open_shardset
from pvtcap.stepfolders import complete, step_of
from pvtcap.stream import View, whole_batches

__all__ = ["SHEET", "WORST", "BackgroundEvaluation", "Captioned", "caption_all", "merge", "run"]


def run(
    checkpoint: Path,
    data: str | Path,
    out: Path,
    world: World,
    how: EvaluateConfig,
    *,
    blank_photos: bool = False,
    allow_missing: bool = False,
    training: Path | None = None,
    heat_maps: bool = False,
) -> dict[str, Any] | None:
    """Caption and score. Every rank calls it; returns the content of scores.json on rank 0, None elsewhere.

    Only captioning is collective: the other ranks leave while rank 0 scores, so no time-out of theirs can be reached.
    ``heat_maps``: the report shows where the model looked for each word.
    """
    if heat_maps:
        world.on_first_rank(lambda: heatmaps.check(open_shardset(data, Checkpoint.open(checkpoint).config.data)))
    caption_all(
        checkpoint, data, out, world, how, blank_photos=blank_photos, allow_missing=allow_missing, training=training
    )
    if not world.is_first:
        return None
    return scoring.finish(out, _heat_maps(checkpoint, data, world, how, blank_photos) if heat_maps else None)


def _heat_maps(checkpoint: Path, data: str | Path, world: World, how: EvaluateConfig, blank: bool) -> scoring.HeatMaps:
    """The model once more: where there is nothing left to caption, it has not been read."""
    chosen = Checkpoint.open(checkpoint)
    return heatmaps.HeatMaps(chosen, world.device, open_shardset(data, chosen.config.data), how, blank=blank)


def caption_all(
    checkpoint: Path,
    data: str | Path,
    out: Path,
    world: World,
    how: EvaluateConfig,
    *,
    blank_photos: bool = False,
    allow_missing: bool = False,
    training: Path | None = None,
    beat: Callable[[], None] | None = None,
) -> None:
    """Leave in ``out`` what ``scoring.finish`` needs; collective.

    ``allow_missing`` goes on without photos that cannot be read; ``training`` is the ShardSet whose captions are not
    novel. Raises ShardError at a photo that cannot be read, EvaluationError unless each photo is captioned once.
    """
    chosen = world.on_first_rank(lambda: Checkpoint.open(checkpoint))
    shardset = world.on_first_rank(lambda: open_shardset(data, chosen.config.data))
    config = _shown(chosen.config, blank_photos)
    world.on_first_rank(lambda: frozenencoder.check(config, [shardset]))
    identity = _identity(chosen, shardset, how, world, (blank_photos, allow_missing, str(training)))
    if world.on_first_rank(lambda: scoring.waits(out, identity)):
        return
    parts = Parts(out, identity, world)
    done, numbers = parts.found(-(-shardset.num_samples // how.micro_batch))
    with parts:
        for part in _captioned(chosen, config, shardset, world, how, numbers, allow_missing):
            parts.add(part)
            done.append(part)
            if beat is not None:
                beat()
    gathered = world.gather(done)

    def finish() -> None:
        assert gathered is not None, "rank 0 gathers"
        every = sorted((part for one in gathered for part in one), key=lambda part: part.number)
        captioned, report = _merged(every, shardset)
        report |= {
            "blank_photos": blank_photos,
            "checkpoint": chosen.path.name,
            "step": chosen.manifest.step,
            "generation": how.model_dump(mode="json"),
        }
        scoring.prepare(out, identity, report, [asdict(one) for one in captioned], shardset, training)

    world.on_first_rank(finish)
    parts.remove()


class BackgroundEvaluation:
    """The evaluations of a training run: captions by all ranks at a step, scores beside the steps that follow.

    with BackgroundEvaluation(config, world) as beside:
        beside.start(folder, step)                          collective; returns when the captions are there
        for scored in beside.finished(): …                  rank 0 at any later step, elsewhere nothing; never waits
        for scored in beside.finished(wait=True): …         at the end of the run; left before that, it stops scoring

    No rank ever waits for a scorer but rank 0 at the end, where no collective follows. ``beat`` is called after each
    batch that is captioned: whoever watches over the run sees that it moves.
    """

    def __init__(self, config: Config, world: World, beat: Callable[[], None] | None = None) -> None:
        self.config, self.world, self.beat, self.scoring = config, world, beat, scoring.Scoring()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.scoring.stop()

    def start(self, checkpoint: Path, step: int) -> None:
        """Caption ``data.val`` with a checkpoint just written, into run.dir/eval/step_…"""
        assert self.config.data.val is not None, "train asks for scores only where there is data.val"
        out, blank = self.config.run.dir / "eval" / checkpoint.name, self.config.data.blank_photos
        how = self.config.evaluate
        caption_all(checkpoint, self.config.data.val, out, self.world, how, blank_photos=blank, beat=self.beat)
        if self.world.is_first:
            self.scoring.start(step, out)

    def owed(self) -> list[tuple[Path, int]]:
        """Checkpoints, and their steps, whose evaluation a stopped run began and did not bring to its scores.

        Of more than two the newest, oldest first: so many wait at a time. Collective.
        """

        def find() -> list[tuple[Path, int]]:
            folders = complete(self.config.run.dir / "checkpoints")
            begun = [(folder, self.config.run.dir / "eval" / folder.name) for folder in folders]
            waiting = [folder for folder, out in begun if out.is_dir() and not (out / SCORES).exists()]
            return [(folder, step_of(folder)) for folder in waiting[-2:]]

        return self.world.on_first_rank(find)

    def finished(self, *, wait: bool = False) -> Iterator[scoring.Scored]:
        """What has been scored since last asked, each with the step it belongs to; with ``wait``, all that is left."""
        return self.scoring.wait() if wait else self.scoring.finished()


def _identity(
    checkpoint: Checkpoint, shardset: ShardSet, how: EvaluateConfig, world: World, options: tuple[object, ...]
) -> str:
    """Of all that decides the captions: parts of another identity are of no use."""
    what = [
        checkpoint.manifest.model_dump(mode="json", include={"step", "encoder_sha256", "config"}),
        checkpoint.manifest.trainable_sha256,
        hashlib.sha256(shardset.manifest.model_dump_json().encode()).hexdigest(),
        how.model_dump(mode="json"),
        world.device.type,
        options,
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _merged(parts: Sequence[Part], shardset: ShardSet) -> tuple[list[Captioned], dict[str, Any]]:
    """The captions in the ShardSet's order, and what scores.json says of all parts together."""
    missing = [one for part in parts for one in part.missing]
    captioned = merge(shardset, [one for part in parts for one in part.captioned], [key for key, _ in missing])
    num_labels = sum(part.num_labels for part in parts)
    loss = math.fsum(part.loss_sum for part in parts) / num_labels
    return captioned, {
        "num_photos": len(captioned),
        "num_missing": len(missing),
        "missing": [{"key": key, "reason": reason} for key, reason in missing],
        "loss": loss,
        "perplexity": math.exp(min(loss, 80.0)),  # beyond that it overflows, and says nothing
        "data": shardset.manifest.name,
    }


def _captioned(
    checkpoint: Checkpoint,
    config: Config,
    shardset: ShardSet,
    world: World,
    how: EvaluateConfig,
    numbers: Sequence[int],
    allow_missing: bool,
) -> Iterator[Part]:
    """The batches with these numbers, captioned, with their held-out loss."""
    if not numbers:
        return
    model, tokenizer = checkpoint.captioner(world.device, [shardset]).cast(how.precision), checkpoint.tokenizer()
    view = View(config.data, tokenizer, config.text.max_tokens)
    batches = whole_batches(
        shardset, view, how.micro_batch, world, even=False, numbers=numbers, allow_missing=allow_missing
    )
    for number, batch in zip(numbers, _or_what_to_do(batches), strict=True):
        captions, loss_sum, num_labels = list[str](), 0.0, 0
        if batch.samples:
            on_device = batch.to(world.device)
            with torch.inference_mode():
                packed = Packed.of(on_device)
                patches = model.patches(on_device.photos)
                loss_sum, num_labels = float(model.decoder(patches, packed)), batch.num_labels
            torch.manual_seed(config.run.seed * 1_000_003 + number)  # sampling depends on the batch, not on the rank
            captions = model.caption_patches(patches, tokenizer, how)
        captioned = (
            Captioned(sample.key, sample.image_id, caption, sample.captions)
            for sample, caption in zip(batch.samples, captions, strict=True)
        )
        yield Part(number, tuple(captioned), batch.missing, loss_sum, num_labels)


def _shown(config: Config, blank_photos: bool) -> Config:
    """The checkpoint's configuration, with the photos of this evaluation blanked or not."""
    return config.model_copy(update={"data": config.data.model_copy(update={"blank_photos": blank_photos})})


def _or_what_to_do(batches: Iterator[Batch]) -> Iterator[Batch]:
    try:
        yield from batches
    except ShardError as error:
        do = f"{error.do or ''} --allow-missing evaluates without it, and says so.".strip()
        raise ShardError(error.what, where=error.where, got=error.got, wanted=error.wanted, do=do) from None


def merge(shardset: ShardSet, captioned: Sequence[Captioned], missing: Sequence[str] = ()) -> list[Captioned]:
    """The captions in the ShardSet's order; EvaluationError unless each photo has exactly one, or is ``missing``."""
    counts = Counter([*(item.key for item in captioned), *missing])
    keys = list(shardset.keys())
    wrong = [key for key in keys if counts[key] != 1] + sorted(counts.keys() - set(keys))
    if wrong:
        raise EvaluationError(
            "not exactly one caption for each photo",
            where=shardset.location,
            got=f"{counts[wrong[0]]} for {wrong[0]}, {len(wrong)} such photos",
            wanted="1 each",
        )
    by_key = {item.key: item for item in captioned}
    if not by_key:
        raise EvaluationError("no photo could be read", where=shardset.location, got=f"{len(missing):,} unreadable")
    return [by_key[key] for key in keys if key in by_key]
