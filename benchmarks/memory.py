"""Does ``pvtcap plan`` know what a rank takes? python benchmarks/memory.py [--layers N] [--ranks 1 2 4] [--stages 0 2]

Trains three steps of a full-size model (new weights; --layers makes its decoder smaller) on drawn photos at 384 px, on
CPUs, by ``pvtcap.train.run`` itself, at each ZeRO stage and number of ranks under our torchrun; then compares the
highest resident memory of a rank (VmHWM) with what the plan says of that configuration. The processes that decode are
not in it, nor is a checkpoint. The goal is 15 %.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import timm
import torch
from results import Row, report

from pvtcap import train
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.plan import plan
from pvtcap.sources import Sources
from pvtcap.stallwatch import StallWatch
from pvtcap.text import CaptionTokenizer

ROOT = Path(__file__).parents[1]
STEPS = 3  # AdamW's moments are made in the first; the highest point is in one of the others
GOAL, PIECES = 0.15, 30_522


def tree(folder: Path, stage: int, ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """The configuration that is both trained and planned."""
    return {
        "run": {"dir": str(folder / f"run-{ranks}-{stage}")},
        "data": {
            "train": str(folder / "shapes"),
            "global_batch": args.micro_batch * ranks,
            "micro_batch": args.micro_batch,
            "workers": 1,
        },
        "text": {"vocab": str(folder / "vocab.txt")},
        "model": {"encoder_weights": str(folder / "encoder.pth"), "decoder": "scratch", "decoder_layers": args.layers},
        "train": {"what": "projection+decoder+encoder" if args.encoder else "projection+decoder", "steps": 1000},
        "zero": {"stage": stage, "offload": args.offload},
        "precision": args.precision,
    }


def prepare(folder: Path) -> None:
    main = runpy.run_path(str(ROOT / "shards" / "shapes.py"))["main"]
    main(["--num-samples", "64", "--image-px", "384", "--processes", "1", "--out", str(folder / "shapes")])
    write_parts(folder, folder / "shapes")


def write_parts(folder: Path, shards: Path, encoder: str = "pvt_v2_b1", num_pieces: int = PIECES) -> None:
    """New weights of an encoder, and a vocabulary of BERT's size, most of which no caption uses."""
    data = parse({"data": {"train": str(shards)}, "train": {"steps": 1}}, "memory").data
    captions = (caption for group in Sources.open(data).captions() for caption in group)
    learned = CaptionTokenizer.train(captions, min(1000, num_pieces)).vocab
    pieces = [*learned, *(f"[unused{number}]" for number in range(num_pieces - len(learned)))]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    torch.save(timm.create_model(encoder, num_classes=0).state_dict(), folder / "encoder.pth")


class Enough(Exception):
    """The step has been reached."""


class StopAt:
    """Stands in for a run's watch, which hears of each step."""

    def beat(self, step: int | None = None) -> None:
        if step == STEPS:
            raise Enough


def one_rank(words: str, out: Path) -> None:
    """A few steps; every rank's highest memory goes to ``out``."""
    with World.start() as world:
        try:
            train.run(parse(json.loads(words), "memory"), world, resume="none", watch=cast(StallWatch, StopAt()))
        except Enough:
            found = world.gather(highest_bytes())
        if found is not None:
            out.write_text(json.dumps(found))


def highest_bytes() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def measured(config: dict[str, Any], ranks: int, folder: Path) -> int:
    """The highest memory of the rank that has most, in bytes."""
    out = folder / "found.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, str(ROOT / "launch" / "torchrun.py"), "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, str(Path(__file__).resolve()), "--one-rank", json.dumps(config), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return int(max(json.loads(out.read_text())))


def compare(args: argparse.Namespace) -> None:
    rows, terms_of = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        for ranks in args.ranks:
            for stage in args.stages:
                config, name = tree(folder, stage, ranks, args), f"{ranks} ranks, ZeRO-{stage}"
                terms = plan(parse(config, "memory"), "", 1, ranks).memory[stage]
                both = {"planned": [terms.peak / 2**20], "measured": [measured(config, ranks, folder) / 2**20]}
                rows.append(Row.of(name, "MiB", both))
                terms_of[name] = asdict(terms)
                print(f"{name}: {both}", file=sys.stderr, flush=True)
    title = f"highest memory of a rank: {args.layers} layers, {args.micro_batch} photos a rank, {args.precision}"
    options = {name: value for name, value in vars(args).items() if name != "one_rank"}
    report("memory", title, rows, {"options": options, "terms": terms_of})
    far = [row.question for row in rows if abs(row.ratio - 1) > GOAL]
    print(f"further than {GOAL:.0%} away: {', '.join(far) or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--offload", choices=("none", "optimizer", "optimizer+parameters"), default="none")
    parser.add_argument("--encoder", action="store_true", help="train the encoder as well")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--one-rank", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_rank:
        one_rank(args.one_rank[0], Path(args.one_rank[1]))
    else:
        compare(args)


if __name__ == "__main__":
    main()
