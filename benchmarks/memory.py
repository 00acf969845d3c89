"""Does ``pvtcap plan`` know what a rank takes? python benchmarks/memory.py [--layers N] [--ranks 1 2 4]

Trains three steps of a full-size model (new weights; --layers makes it smaller) on photos of noise, on CPUs, float32,
at each ZeRO stage and number of ranks, and compares the peak of each rank's resident memory with the plan: its base and
what it says of the device, which is the host here. The goal is 15 %.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pvtcap.captioner import Captioner
from pvtcap.config import Config, batch_plan
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.engine import Engine
from pvtcap.plan import BASE_BYTES, plan
from pvtcap.stream import Batch

ROOT = Path(__file__).parents[1]
CAPTIONS, TOKENS, VOCAB = 5, 14, 30_524


def configuration(stage: int, ranks: int, layers: int) -> Config:
    tree: dict[str, Any] = {
        "data": {"train": "nowhere", "global_batch": 2 * ranks, "captions_per_photo": CAPTIONS, "image_px": 224},
        "model": {"decoder_layers": layers, "dropout": 0.0},
        "train": {"steps": 3},
        "zero": {"stage": stage},
    }
    return parse(tree, "benchmark")


def one_rank(stage: int, layers: int, out: Path) -> None:
    """Three steps; every rank's peak in ``out``."""
    with World.start() as world:
        config = configuration(stage, world.size, layers)
        cut = batch_plan(config.data, world.size)
        engine = Engine(Captioner(config, VOCAB), config, cut, world)
        length = CAPTIONS * TOKENS
        tokens = torch.randint(1, VOCAB, (cut.micro_batch, length))
        numbers = torch.arange(length).expand(cut.micro_batch, -1)
        batch = Batch(
            photos=torch.randint(0, 256, (cut.micro_batch, 3, 224, 224), dtype=torch.uint8),
            tokens=tokens, labels=tokens, positions=numbers % TOKENS, segments=numbers // TOKENS + 1,
            samples=(), num_captions=cut.micro_batch * CAPTIONS,
        )  # fmt: skip
        for _ in range(3):
            engine.forward_backward(batch, scale=1e-3)
            engine.step(0.1)
        peaks = world.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        if peaks is not None:
            out.write_text(json.dumps(peaks))


def measured(stage: int, ranks: int, layers: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peaks.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        launcher = [sys.executable, str(ROOT / "launch/torchrun.py"), "--standalone", "--nproc-per-node", str(ranks)]
        words = [__file__, "--one-rank", str(stage), "--layers", str(layers), "--out", str(out)]
        done = subprocess.run([*launcher, *words], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        return int(max(json.loads(out.read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--one-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_rank is not None:
        one_rank(args.one_rank, args.layers, args.out)
        return
    table = Table(title=f"peak memory of a rank in GB, {args.layers} layers, float32, CPU")
    for column in ("ranks", "ZeRO", "measured", "planned", "off by"):
        table.add_column(column, justify="right")
    rows = []
    for ranks in args.ranks:
        for stage in range(4):
            peak = measured(stage, ranks, args.layers)
            planned = BASE_BYTES + plan(configuration(stage, ranks, args.layers), "", 1, ranks).memory[stage].total
            rows.append({"ranks": ranks, "stage": stage, "measured": peak, "planned": planned})
            off = f"{planned / peak - 1:+.0%}"
            table.add_row(str(ranks), str(stage), f"{peak / 1e9:.2f}", f"{planned / 1e9:.2f}", off)
    Console(width=100).print(table)
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / "memory.json").write_text(json.dumps({"cpus": os.cpu_count(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
