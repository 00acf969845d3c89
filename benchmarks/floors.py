"""Where does the time go, and how far is it from the least possible? python benchmarks/floors.py [--photos N]

Each part of a training step (the 137.9M decoder, five captions a photo at 384 px, float32) and of captioning (three
beams), measured alone, beside its floor: the longer of its floating-point operations, as torch counts them, at the
rate of this machine's best matrix product, and the bytes it must at least move at the rate of a copy. A ratio below
1 / 1.3 wants an explanation (LOG.md has it).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from evaluate import END, PAD, PREFIX, features, our_decoder
from results import Row, report
from train_step import CAPTIONS, VOCAB, build, configuration, loss_of

from pvtcap.captioner import Captioner
from pvtcap.config import EvaluateConfig, batch_plan
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.engine import parameter_groups
from pvtcap.flops import counter
from pvtcap.packing import Packed
from pvtcap.sources import Sources
from pvtcap.stream import View, train_batches
from pvtcap.text import CaptionTokenizer

GOAL = 0.77  # 1 / 1.3
FLOAT = 4  # bytes


def seconds(task: Callable[[], object], repeat: int) -> list[float]:
    """Of each of ``repeat`` runs, behind one that warms up."""
    found = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        task()
        found.append(time.perf_counter() - started)
    return found[1:]


def operations(task: Callable[[], object]) -> float:
    with counter() as count:
        task()
    return float(count.get_total_flops())


def product_rate() -> float:
    """Floating-point operations a second of the best of some square matrix products."""
    best = 0.0
    for side in (768, 1536, 3072):
        a, b = torch.randn(side, side), torch.randn(side, side)
        best = max(best, 2 * side**3 / min(seconds(lambda a=a, b=b: a @ b, 8)))  # type: ignore[misc]
    return best


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy larger than any cache."""
    source = torch.ones(2**27)
    target = torch.empty_like(source)
    return 2 * FLOAT * source.numel() / min(seconds(lambda: target.copy_(source), 5))


class Floors:
    """Rows of measured parts; ``flops`` and ``moved`` are rates of this machine."""

    def __init__(self, repeat: int) -> None:
        self.repeat, self.flops, self.moved = repeat, product_rate(), copy_rate()
        self.rows: list[Row] = []

    def add(self, name: str, task: Callable[[], object], moved_bytes: float) -> float:
        """Gives the part's median seconds."""
        return self.add_known(name, seconds(task, self.repeat), operations(task), moved_bytes)

    def add_known(self, name: str, runs: list[float], operations_done: float, moved_bytes: float) -> float:
        floor = max(operations_done / self.flops, moved_bytes / self.moved)
        self.rows.append(Row.of(name, "s", {"measured": runs, "floor": [floor]}, goal=GOAL, less_is_better=True))
        return self.rows[-1].ours


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def training(floors: Floors, folder: Path, photos: int) -> None:
    config = parse(configuration(folder, photos, 384), "benchmark")
    sources = Sources.open(config.data)
    tokenizer = CaptionTokenizer.train((text for group in sources.captions() for text in group), 2000, "a picture of ")
    view = View(config.data, tokenizer, config.text.max_tokens)
    batch = next(train_batches(sources, view, batch_plan(config.data, 1), World.start(), seed=0, first_step=0))
    model = Captioner(config, VOCAB)
    model.train()
    with torch.no_grad():
        patches = model.patches(batch.photos)
        shown = model.encoder(batch.photos)
        floors.add("encoder", lambda: model.encoder(batch.photos), FLOAT * size(model.encoder))
    floors.add("projection", lambda: model.projection(shown), FLOAT * size(model.projection))

    def decoder(given: Any = patches) -> Any:
        return model.decoder(given, Packed.of(batch))

    forward_s = floors.add("decoder and loss, forward", decoder, FLOAT * size(model.decoder))
    forward = operations(decoder)
    runs = [one - forward_s for one in seconds(lambda: decoder().backward(), floors.repeat)]
    both = operations(lambda: decoder().backward())
    floors.add_known("decoder and loss, backward", runs, both - forward, 2 * FLOAT * size(model.decoder))
    model.zero_grad()
    groups = parameter_groups(model, config.optim)
    adamw = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
    learning = [parameter for group in adamw.param_groups for parameter in group["params"]]
    count = sum(parameter.numel() for parameter in learning)
    clip = seconds(lambda: torch.nn.utils.clip_grad_norm_(learning, 1e9), floors.repeat)
    floors.add_known("gradient norm and clipping", clip, 0, 3 * FLOAT * count)
    # Reads weight, gradient and two moments; writes weight and moments.
    floors.add_known("AdamW", seconds(adamw.step, floors.repeat), 0, 7 * FLOAT * count)


def captioning(floors: Floors, photos: int) -> None:
    decoder, how = our_decoder(), EvaluateConfig(num_beams=3, max_length=20, min_length=5)
    given = features(photos, 1)

    def generate() -> object:
        return decoder.generate(given, PREFIX, END, PAD, how)

    runs = seconds(generate, floors.repeat)
    steps = how.max_length - len(PREFIX)
    # Every token needs all weights once, however many rows share them.
    floors.add_known(f"captions of {photos} photos", runs, operations(generate), steps * FLOAT * size(decoder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        build(Path(temporary), args.photos, 384)
        floors = Floors(args.repeat)
        training(floors, Path(temporary), args.photos)
        captioning(floors, 2 * args.photos)
    rates = f"{floors.flops / 1e9:,.0f} GFLOP/s, {floors.moved / 1e9:.1f} GB/s"
    title = f"{args.photos} photos × {CAPTIONS} captions; this machine: {rates}"
    measured = {"options": vars(args), "flops_per_s": floors.flops, "bytes_per_s": floors.moved}
    report("floors", title, floors.rows, measured)


if __name__ == "__main__":
    main()
