"""How fast on a GPU? python benchmarks/gpu.py [--quick] [--budget-s N] [--out FILE]

A full-size model (pvt_v2_b1 and the 137.9M decoder; new weights, which cost what trained ones do), bf16, photos of
384 px with five captions each, one GPU, everything made here:

    engine       pvtcap's training step under DeepSpeed, batches on the device: sizes, ZeRO stages, compiled or not
    packed       the same model in a bare loop: autocast, AdamW, no DeepSpeed
    a row each   the peer, as BLIP, LAVIS and open_clip train: a caption a row, each with its photo, through
                 transformers' BlipTextLMHeadModel behind the same encoder and projection, bare loop, the same dropout
    loader       photos a second that the stream delivers with so many workers, nobody training
    whole loop   ``pvtcap.train.train_step`` on the stream (ZeRO-2): what an epoch of Flickr30k's size is reckoned from

from photos, and from the encoder's output as feature shards give it. MFU is ``pvtcap.flops`` over the device's peak
(data sheet); "product", the same over what a bf16 matrix product reached in this run. A step is the median of several,
the GPU synchronised before and after; GiB, its highest allocated memory, and what ``pvtcap plan`` says of it; "waits",
the share of waiting for data. The photos are noise of 448 px, about 100 kB a JPEG, and are read from the page cache.

Parts run in processes of their own, the most telling first. Whatever fails, does not fit in memory or has no time left
is a row with its reason. The table is printed and the JSON written after each part. --toy: a tiny model on a CPU, to
test this program and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gpu_table import Contestant, Row, best, device_of, show, show_summary, summary, write
from rich.console import Console

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[1]
MOST_PHOTOS = 256  # a step of the whole loop


@dataclass(frozen=True)
class Size:
    """How large all is; ``model`` are keys of the configuration, ``peak`` TFLOP/s where not known of the device."""

    px: int = 384
    batches: tuple[int, ...] = (32, 64, 128, 256, 512)  # photos
    feature_batches: tuple[int, ...] = (64, 256, 512, 1024, 2048)  # the same of features, which take less memory
    row_each_batches: tuple[int, ...] = (32, 64, 128)  # larger ones are slower (an H200: 64, 178 ms; 256, 1,579 ms)
    one_batch: int = 128  # where sizes are not compared
    workers: tuple[int, ...] = (1, 2, 4, 8, 16)
    loader_batch: int = 64  # smaller ones, since 16 workers make 49 ahead
    data_photos: int = 1024  # larger steps see them several times
    warm_up: int = 4
    steps: int = 12
    seconds: float = 4.0  # that the loader and the whole loop are measured, at least
    product: int = 8192
    pieces: int = 30_522
    peak: float | None = None
    needs_gpu: bool = True
    model: dict[str, Any] = field(default_factory=dict)


QUICK = replace(
    Size(), batches=(64, 512), feature_batches=(512, 1024, 2048), row_each_batches=(64,), workers=(4, 16),
    data_photos=512, one_batch=256, steps=6, seconds=2.0,
)  # fmt: skip
TOY = Size(
    px=64, batches=(4, 8), feature_batches=(8, 64), row_each_batches=(4, 8), one_batch=4, loader_batch=4,
    workers=(1, 2), data_photos=32, warm_up=1, steps=2, seconds=0.1, product=256, pieces=300, peak=1.0, needs_gpu=False,
    model={
        "encoder": "pvt_v2_b0", "encoder_stages": 2, "projection": "linear", "decoder_layers": 1, "decoder_width": 32,
        "decoder_heads": 2, "decoder_feedforward": 64, "decoder_positions": 64,
    },
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Contestants of one process, of a ``kind`` in gpu_contestants.py, and the seconds that they have."""

    name: str
    kind: str
    limit_s: float
    contestants: list[Contestant]


def parts(size: Size, rows: list[Row]) -> Iterator[Part]:
    """The most telling first; what comes later is chosen by the ``rows`` that are there by then."""
    inputs, one = ("photos", "features"), size.one_batch
    cpus = len(os.sched_getaffinity(0))
    making = min(8, cpus)
    prepared = [Contestant("device"), Contestant("shards"), Contestant("features", workers=making)]
    yield Part("data", "data", 150, prepared)
    ours = {"photos": size.batches, "features": size.feature_batches}
    each = (
        ("a row each", None, dict.fromkeys(inputs, size.row_each_batches)),
        ("packed", None, ours),
        ("engine", 2, ours),
    )
    for loop, stage, batches in each:
        yield Part(loop, "steps", 75, [Contestant(loop, of, n, stage) for of in inputs for n in batches[of]])

    def whole(of: str, compiled: bool) -> Part:
        fastest = best(rows, loop="engine", input=of)
        workers = best(rows, loop="loader", input=of)
        # Larger steps are few in an epoch, and what workers make ahead fills shared memory.
        photos = min(fastest.contestant.photos if fastest else one, MOST_PHOTOS)
        chosen = Contestant(
            "whole loop", of, photos, 2, compiled,
            workers.contestant.workers if workers else making,
        )  # fmt: skip
        return Part(f"{chosen.loop} from {of}{', compiled' if compiled else ''}", "whole loop", 75, [chosen])

    def fastest_compiled(loop: str, of: str, stage: int | None) -> Contestant:
        """Compiled, at the size that was fastest without: compiling takes most of a minute for each."""
        fastest = best(rows, loop=loop, input=of)
        return Contestant(loop, of, fastest.contestant.photos if fastest else one, stage, compiled=True)

    def of_stage(stage: int) -> Part:
        return Part(f"ZeRO-{stage}", "steps", 60, [Contestant("engine", of, one, stage) for of in inputs])

    yield of_stage(1)
    yield Part("engine from features, compiled", "steps", 120, [fastest_compiled("engine", "features", 2)])
    counts = [count for count in size.workers if count <= cpus or count == min(size.workers)]
    loaders = [Contestant("loader", of, size.loader_batch, workers=n) for of in inputs for n in counts]
    yield Part("loader", "loader", 75, loaders)
    for of in inputs:
        yield whole(of, compiled=False)
    yield of_stage(0)
    yield of_stage(3)
    yield Part("engine from photos, compiled", "steps", 150, [fastest_compiled("engine", "photos", 2)])
    yield whole("features", compiled=True)
    yield Part("a row each, compiled", "steps", 120, [fastest_compiled("a row each", of, None) for of in inputs])


def run_part(part: Part, folder: Path, size: Size, deadline: float) -> list[Row]:
    """A row for each contestant of the part; it ends by the deadline (monotonic seconds)."""
    rows: list[Row] = []
    remaining, until = list(part.contestants), min(time.monotonic() + part.limit_s, deadline)
    least_s = 20.0 if size.needs_gpu else 1.0  # imports, a model, and CUDA's start
    while remaining:
        left_s = until - time.monotonic()
        if left_s < least_s:
            over = "the budget is" if until == deadline else f"the part's {part.limit_s:g} s are"
            rows += [Row(part.name, one, reason=f"left out: {over} over") for one in remaining]
            break
        found, problem = run_child(part, remaining, folder, size, left_s)
        rows += [Row(part.name, one, result) for one, result in zip(remaining, found[1:], strict=False)]
        remaining = remaining[len(found[1:]) :]
        if remaining and not found:  # the part could not begin
            rows += [Row(part.name, one, reason=problem) for one in remaining]
            break
        if remaining:
            failed = remaining.pop(0)
            rows.append(Row(part.name, failed, reason=problem))
            if "out of memory" in problem.lower():
                larger = [one for one in remaining if one.input == failed.input and one.photos > failed.photos]
                rows += [Row(part.name, one, reason=f"{failed.photos} photos did not fit in memory") for one in larger]
                remaining = [one for one in remaining if one not in larger]
    return rows


def run_child(
    part: Part, remaining: list[Contestant], folder: Path, size: Size, limit_s: float
) -> tuple[list[dict[str, Any]], str]:
    """The lines that the process wrote (one that it is ready, one a contestant), and what ended it before all were."""
    spec, out, told = folder / "spec.json", folder / "out.jsonl", folder / "stderr.txt"
    contestants = [asdict(one) for one in remaining]
    spec.write_text(
        json.dumps({"kind": part.kind, "folder": str(folder), "size": asdict(size), "contestants": contestants})
    )
    out.write_text("")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), str(HERE), os.environ.get("PYTHONPATH")))),
    }
    # No script: each decoding process would read it again, with all that it imports, for seconds.
    command = [sys.executable, "-c", "import gpu_contestants; gpu_contestants.main()", str(spec), str(out)]
    problem = ""
    # A file, since a pipe would be kept open by workers that outlive a killed process for a moment.
    with told.open("w") as file:
        try:
            done = subprocess.run(command, env=environment, stdout=file, stderr=file, timeout=limit_s, check=False)
            problem = f"ended with code {done.returncode}"
        except subprocess.TimeoutExpired:
            problem = f"stopped: not done after {limit_s:.0f} s"
    lines = [json.loads(line) for line in out.read_text().splitlines() if line.endswith("}")]
    if lines and "problem" in lines[-1]:
        problem = lines.pop()["problem"]
    elif problem.startswith("ended"):
        problem += "".join(f": {line}" for line in told.read_text(errors="replace").split("\n") if line.strip())[-200:]
    return lines, " ".join(problem.split())[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, photos and steps")
    parser.add_argument("--toy", action="store_true", help="a tiny model, on a CPU too: tests this program")
    parser.add_argument("--budget-s", type=float, default=540, help="parts end by then (default %(default)s)")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="run these and data only; the others are named")
    parser.add_argument("--peak-tflops", type=float, help="of the device, dense bf16, where pvtcap/flops.py has none")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/gpu.json; of --toy gpu_toy.json")
    args = parser.parse_args()
    deadline = time.monotonic() + args.budget_s
    out = args.out or ROOT / "benchmarks" / "results" / ("gpu_toy.json" if args.toy else "gpu.json")
    size = TOY if args.toy else QUICK if args.quick else Size()
    size = replace(size, peak=args.peak_tflops or size.peak)
    options = {"size": asdict(size), "budget_s": args.budget_s, "toy": args.toy, "quick": args.quick}
    console, rows = Console(width=132), list[Row]()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        for part in parts(size, rows):
            unwanted = args.parts and part.name not in ("data", *args.parts)
            no_data = any(row.contestant.loop == "shards" and row.reason for row in rows)
            why_not = "left out: not among --parts" if unwanted else "left out: no photos" if no_data else None
            if why_not is None:
                made = run_part(part, Path(temporary), size, deadline)
            else:
                made = [Row(part.name, one, reason=why_not) for one in part.contestants]
            rows += made
            show(f"{part.name} ({deadline - time.monotonic():.0f} s left)", made, device_of(rows), console)
            write(out, rows, options, complete=False)
    write(out, rows, options, complete=True)
    show_summary(summary(rows, device_of(rows)), console)


if __name__ == "__main__":
    main()
