"""How fast is a training step? python benchmarks/train_step.py [--photos N] [--repeat N]

A full-size decoder (12 layers, width 768, 30,524 pieces: 137.9M parameters with cross-attention; new weights, which
cost what trained ones do), eight photos at 384 px with five captions each, AdamW, float32, on this machine's CPUs.
Contestants take turns, each in a process of its own; a step is a batch of the same photos and captions. The first step
of a turn is not measured: while one waits, the kernel takes back what it has freed, and that step has to ask for all
of it again, which a training loop does not. The two loops, which lie close together, have the mean of four steps behind
it, the others one. Each round has new processes, since where in memory one happens to lie changes its step by some 5 %.

Captions are as long as COCO's: the lengths (in words and marks) of its tenths take turns, and a row each is filled up
to the longest of the batch, as it is in training. --lengths 11 makes them all alike, so that nothing is filled up.

    packed       pvtcap's model, the five captions of a photo in one row
    a row each   as BLIP, LAVIS and open_clip train: a caption a row, each with its photo, through transformers' own
                 BlipTextLMHeadModel behind the same encoder and projection, with the same dropout (BLIP's 0.1)
    …            both again from the encoder's output, as feature shards give it
    whole loop   ``pvtcap train`` on the same shards: stream, DeepSpeed (ZeRO-2, one rank), monitor
    bare loop    the packed model, batches made before, loss, backward, clip, step: nothing else
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from results import Row, report
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from pvtcap.batch import Batch
from pvtcap.captioner import Captioner
from pvtcap.config import batch_plan
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.encoder import FeedForward
from pvtcap.engine import Engine, parameter_groups
from pvtcap.ledger import Ledger
from pvtcap.sources import Sources
from pvtcap.stream import View, train_batches
from pvtcap.text import CaptionTokenizer
from pvtcap.train import train_step

ROOT = Path(__file__).parents[1]
VOCAB, CAPTIONS, LENGTH = 30_524, 5, 11
TENTHS = (8, 8, 9, 9, 10, 10, 11, 12, 13, 15)  # of the 25,014 of COCO's val2017: the middle of each tenth
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
    """A ShardSet of 4 × ``photos`` of noise with captions of COCO's usual length: ten words and a half.

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
    """A caption a row, each with its photo, as BLIP's ``forward_decoder`` and its heirs have it.

    Behind the encoder of ``ours``, as timm has it, and its projection stands transformers' decoder, new and of the same
    size.
    """

    def __init__(self, ours: Captioner, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder, self.projection = copy.deepcopy(ours.encoder), ours.projection
        for module in self.encoder.modules():
            if type(module) is FeedForward:
                module.__class__ = MlpWithDepthwiseConv
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        own = {name: getattr(ours.decoder.lm.config, name) for name in (*sizes, "max_position_embeddings")}
        own |= {"encoder_hidden_size": own["hidden_size"], "is_decoder": True}
        config = BlipTextConfig(**own, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        self.text = BlipTextLMHeadModel(config)

    def forward(self, photos: Tensor, tokens: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            features = photos if photos.is_floating_point() else self.encoder(photos)
        loss: Tensor = self.text(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=self.projection(features), labels=labels
        ).loss
        return loss


def unpacked(batch: Batch, tokenizer: CaptionTokenizer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same photos and captions, a caption a row: photos (R, …), tokens, labels and mask (R, T)."""
    rows = [(photo, text) for photo, sample in zip(batch.photos, batch.samples, strict=True)
            for text in sample.captions[:CAPTIONS]]  # fmt: skip
    tokens = torch.from_numpy(tokenizer.pack([[text] for _, text in rows], 40).tokens)
    mask = (tokens != tokenizer.pad_id).long()
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


def contestant(name: str, folder: Path, photos: int, px: int) -> Callable[[], None]:
    """One training step of it."""
    config = parse(configuration(folder, photos, px), "benchmark")
    sources = Sources.open(config.data)
    tokenizer = CaptionTokenizer.train((text for group in sources.captions() for text in group), 2000, "a picture of ")
    # Only the whole loop gets what pvtcap does for a process that trains (the allocator, pvtcap/hostmemory.py).
    world, plan = World.start() if name == "whole loop" else World.alone("cpu"), batch_plan(config.data, 1)
    view = View(config.data, tokenizer, config.text.max_tokens)
    batches = train_batches(sources, view, plan, world, seed=0, first_step=0)
    ours = Captioner(config, VOCAB)
    ours.train()
    if name == "whole loop":
        engine = Engine(ours, config, plan, world)
        ledger = Ledger(config.run.dir, sources, world, start_step=0, max_bad_fraction=0.0)
        count = itertools.count(1)
        return lambda: train_step(engine, batches, ledger, plan, world, step=next(count), scale=0.1) and None  # type: ignore[func-returns-value]
    made = itertools.cycle([next(batches) for _ in range(2)])
    if name == "bare loop":
        return steps_of(ours, parameter_groups(ours, config.optim), lambda: loss_of(ours, next(made)))
    batch = next(made)
    shown: Tensor = batch.photos
    if name.endswith(FEATURES):
        with torch.no_grad():
            shown = ours.encoder(batch.photos)
    if name.startswith("packed"):
        batch = replace(batch, photos=shown)
        return steps_of(ours, parameter_groups(ours, config.optim), lambda: loss_of(ours, batch))
    row_each = RowEach(ours, config.model.dropout)
    row_each.train()
    rows, tokens, labels, mask = unpacked(batch, tokenizer)
    if shown is not batch.photos:
        rows = shown.repeat_interleave(len(rows) // len(shown), 0)
    learning = [*row_each.text.parameters(), *row_each.projection.parameters()]
    return steps_of(row_each, learning, lambda: row_each(rows, tokens, labels, mask))


def loss_of(model: Captioner, batch: Batch) -> Tensor:
    total: Tensor = model(batch)
    return total / batch.num_labels


FEATURES = ", features"
PAIRS = (
    ("packed", "a row each", 3.5),
    ("packed, features", "a row each", 4.5),  # who decodes and encodes a photo for each caption has no features
    ("packed, features", "a row each, features", None),
    ("whole loop", "bare loop", 0.95),
)
TOGETHER = (
    (("packed", "packed, features", "a row each", "a row each, features"), 1),
    (("whole loop", "bare loop"), 4),
)  # who take part in the same rounds, and the steps of a turn that are measured


class Process:
    """A contestant in a process of its own, which takes a step when told to: none has another's memory."""

    def __init__(self, name: str, folder: Path, args: argparse.Namespace) -> None:
        words = ["--photos", args.photos, "--px", args.px, "--contestant", name, folder]
        command = [sys.executable, __file__, *map(str, words)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> float:
        """The seconds that it took; what it takes to get ready is not among them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(SECONDS):
                return float(line.removeprefix(SECONDS))
        sys.exit("a contestant died")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def one_round(names: Sequence[str], steps: int, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of each, the mean of ``steps``, in processes that start together."""
    processes = {name: Process(name, folder, args) for name in names}
    for process in processes.values():
        process.step()  # all are ready and warm before any is measured
    seconds = {}
    for name, process in processes.items():
        process.step()
        seconds[name] = statistics.fmean(process.step() for _ in range(steps))
    for process in processes.values():
        process.end()
    return seconds


SECONDS = "seconds: "


def take_part(name: str, folder: Path, args: argparse.Namespace) -> None:
    step = contestant(name, folder, args.photos, args.px)
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        print(f"{SECONDS}{time.perf_counter() - started}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--px", type=int, default=384)
    parser.add_argument("--repeat", type=int, default=3, help="rounds: new processes, a turn each")
    parser.add_argument("--lengths", type=int, nargs="+", default=TENTHS, help="of captions (default: COCO's tenths)")
    parser.add_argument("--contestant", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant is not None:
        take_part(args.contestant[0], Path(args.contestant[1]), args)
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        build(Path(temporary), args.photos, args.px, args.lengths)
        rounds = [
            [one_round(names, steps, Path(temporary), args) for _ in range(args.repeat)] for names, steps in TOGETHER
        ]
    for ours, theirs, goal in PAIRS:
        seconds = next(one for one in rounds if ours in one[0])
        rates = {name: [args.photos * CAPTIONS / one[name] for one in seconds] for name in (ours, theirs)}
        rows.append(Row.of("a training step", "captions/s", rates, goal=goal))
    title = f"{args.photos} photos × {CAPTIONS} captions a step, {torch.get_num_threads()} threads"
    options = {"photos": args.photos, "px": args.px, "lengths": args.lengths, "repeat": args.repeat}
    report("train_step", title, rows, {"options": options, "seconds": rounds})


if __name__ == "__main__":
    main()
