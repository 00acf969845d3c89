"""How fast is a training step? python benchmarks/train_step.py [--photos N] [--repeat N]

A full-size decoder (12 layers, width 768, 30,524 pieces: 137.9M parameters with cross-attention; new weights, which
cost what trained ones do), eight photos at 384 px with five captions each, AdamW, float32, on this machine's CPUs.
Contestants take turns, each step a batch of the same photos and captions; medians of captions trained a second:

    packed       pvtcap's model, the five captions of a photo in one row
    a row each   as BLIP, LAVIS and open_clip train: a caption a row, each with its photo, through transformers' own
                 BlipTextLMHeadModel behind the same encoder and projection
    …            both again from the encoder's output, as feature shards give it
    whole loop   ``pvtcap train`` on the same shards: stream, DeepSpeed (ZeRO-2, one rank), monitor
    bare loop    the packed model, batches made before, loss, backward, clip, step: nothing else
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from pvtcap.captioner import Captioner
from pvtcap.config import batch_plan
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.engine import Engine, parameter_groups
from pvtcap.ledger import Ledger
from pvtcap.sources import Sources
from pvtcap.stream import Batch, View, train_batches
from pvtcap.text import CaptionTokenizer
from pvtcap.train import train_step

ROOT = Path(__file__).parents[1]
VOCAB, CAPTIONS, LENGTH = 30_524, 5, 11
WORDS = "a the man woman dog cat red blue on in grass street with two sits runs near old small table"


def configuration(folder: Path, photos: int, px: int) -> dict[str, Any]:
    return {
        "run": {"dir": str(folder / "run")},
        "data": {
            "train": str(folder / "shards"), "global_batch": photos, "captions_per_photo": CAPTIONS, "image_px": px,
            "workers": 1,
        },
        "text": {"vocab": "train", "vocab_size": 2000, "prompt": "a picture of "},
        "model": {"encoder": "pvt_v2_b1", "decoder": "scratch", "dropout": 0.1},
        "train": {"steps": 1000},
    }  # fmt: skip


def build(folder: Path, photos: int, px: int, lengths: Sequence[int] = (LENGTH,), *options: str) -> None:
    """A ShardSet of 4 × ``photos`` of noise with captions as long as COCO's: ten words and a half.

    ``lengths`` of captions take turns; ``options`` are the builder's.
    """
    from PIL import Image

    source = folder / "source"
    source.mkdir()
    words = WORDS.split()
    lines = []
    for number in range(4 * photos):
        Image.effect_noise((px + 64, px + 64), 60).convert("RGB").save(source / f"{number}.jpg")
        many = [lengths[(number + turn) % len(lengths)] for turn in range(CAPTIONS)]
        numbers = [[number * 7 + turn * 3 + place * place for place in range(many[turn])] for turn in range(CAPTIONS)]
        captions = [" ".join(words[one % len(words)] for one in row) for row in numbers]
        lines.append(json.dumps({"image": f"{number}.jpg", "captions": captions}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    import runpy

    main = runpy.run_path(str(ROOT / "shards" / "folder.py"))["main"]
    where = ["--images", str(source), "--captions", str(folder / "captions.jsonl"), "--out", str(folder / "shards")]
    main([*where, *options])


class RowEach(nn.Module):
    """A caption a row, each with its photo, as BLIP's ``forward_decoder`` and its heirs have it; of ``ours``' size."""

    def __init__(self, ours: Captioner) -> None:
        super().__init__()
        self.encoder, self.projection = ours.encoder, ours.projection
        of = ours.decoder.lm.config
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        sizes = {name: getattr(of, name) for name in names}
        self.text = BlipTextLMHeadModel(BlipTextConfig(**sizes, encoder_hidden_size=of.hidden_size, is_decoder=True))

    def forward(self, photos: Tensor, tokens: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            features = photos if photos.is_floating_point() else self.encoder(photos)
        loss: Tensor = self.text(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=self.projection(features), labels=labels
        ).loss
        return loss


def unpacked(batch: Batch, tokenizer: CaptionTokenizer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same photos and captions, a caption a row: photos (R, …), tokens, labels and mask (R, T)."""
    rows = [(photo, tokenizer.pack([text], 40)) for photo, sample in zip(batch.photos, batch.samples, strict=True)
            for text in sample.captions[:CAPTIONS]]  # fmt: skip
    longest = max(len(pack.tokens) for _, pack in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, (_, pack) in zip(tokens, rows, strict=True):
        row[: len(pack.tokens)] = torch.as_tensor(pack.tokens)
    mask = (tokens > 0).long()
    return torch.stack([photo for photo, _ in rows]), tokens, tokens.masked_fill(mask == 0, -100), mask


def steps_of(model: nn.Module, groups: Any, loss_of: Callable[[], Tensor]) -> Callable[[], None]:
    """One training step: forward, backward, clip, AdamW."""
    optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step() -> None:
        loss_of().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def contestants(folder: Path, photos: int, px: int) -> Iterator[tuple[str, Callable[[], None]]]:
    config = parse(configuration(folder, photos, px), "benchmark")
    sources = Sources.open(config.data)
    tokenizer = CaptionTokenizer.train((text for group in sources.captions() for text in group), 2000, "a picture of ")
    world, plan = World.start(), batch_plan(config.data, 1)
    view = View(config.data, tokenizer, config.text.max_tokens)
    batches = train_batches(sources, view, plan, world, seed=0, first_step=0)
    batch = next(batches)
    ours = Captioner(config, VOCAB)
    ours.train()
    with torch.no_grad():
        features = ours.encoder(batch.photos)

    def packed(photos_or_features: Tensor) -> Tensor:
        patches = ours.patches(photos_or_features)
        loss: Tensor = ours.decoder(patches, batch.tokens, batch.labels, batch.positions, batch.segments)
        return loss / batch.num_labels

    row_each = RowEach(ours)
    row_each.text.train()
    rows, tokens, labels, mask = unpacked(batch, tokenizer)
    spread = features.repeat_interleave(len(rows) // len(features), 0)
    learning = [*row_each.text.parameters(), *row_each.projection.parameters()]
    groups = parameter_groups(ours, config.optim)
    yield "packed", steps_of(ours, groups, lambda: packed(batch.photos))
    yield "a row each", steps_of(row_each, learning, lambda: row_each(rows, tokens, labels, mask))
    yield "packed, features", steps_of(ours, groups, lambda: packed(features))
    yield "a row each, features", steps_of(row_each, learning, lambda: row_each(spread, tokens, labels, mask))
    engine = Engine(Captioner(config, VOCAB), config, plan, world)
    ledger = Ledger(config.run.dir, sources, world, start_step=0, max_bad_fraction=0.0)
    count = iter(range(1, 1000))
    yield "whole loop", lambda: train_step(engine, batches, ledger, plan, world, step=next(count), scale=0.1) and None  # type: ignore[func-returns-value]
    bare = Captioner(config, VOCAB)
    bare.train()
    made = [next(batches) for _ in range(2)]
    turn = iter(range(1000))

    def bare_loss() -> Tensor:
        one = made[next(turn) % 2]
        total: Tensor = bare(one)
        return total / one.num_labels

    yield "bare loop", steps_of(bare, parameter_groups(bare, config.optim), bare_loss)


PAIRS = (
    ("packed", "a row each", 3.5),
    ("packed, features", "a row each", 4.5),  # who decodes and encodes a photo for each caption has no features
    ("packed, features", "a row each, features", None),
    ("whole loop", "bare loop", 0.95),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--px", type=int, default=384)
    parser.add_argument("--repeat", type=int, default=3, help="steps of each that are measured; one is not")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        build(Path(temporary), args.photos, args.px)
        steps = dict(contestants(Path(temporary), args.photos, args.px))
        for turn in range(args.repeat + 1):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                if turn:
                    seconds.setdefault(name, []).append(time.perf_counter() - started)
    rates = {name: args.photos * CAPTIONS / statistics.median(times) for name, times in seconds.items()}
    table = Table(title=f"{args.photos} photos × {CAPTIONS} captions a step, {torch.get_num_threads()} threads")
    for column in ("", "captions/s", "spread", "beside", "ratio", "goal"):
        table.add_column(column, justify="left" if column in ("", "beside") else "right")
    rows = []
    for ours, theirs, goal in PAIRS:
        rows.append({"ours": ours, "beside": theirs, "ratio": rates[ours] / rates[theirs], "goal": goal})
        for name in (ours, theirs):
            times = seconds[name]
            spread = f"{(max(times) - min(times)) / statistics.median(times):.0%}"
            last = (
                (theirs, f"{rows[-1]['ratio']:.2f}", "" if goal is None else f"{goal:g}")
                if name == ours
                else ("", "", "")
            )
            table.add_row(name, f"{rates[name]:.2f}", spread, *last)
    Console(width=110).print(table)
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    content = {"cpus": os.cpu_count(), "options": vars(args), "seconds": seconds, "ratios": rows}
    (results / "train_step.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
