"""Does the stream's memory grow over an epoch, or with the number of ranks? python benchmarks/stream_memory.py

Draws 100,000 small pictures into shards of 1,000, then reads one epoch of them as one rank of 1, 4 and 16 with two
decoding processes: resident memory (MiB) of each process after 2,000 photos of the run and at the epoch's end. Also:
what the order of an epoch of 12 million samples costs, all windows of all lanes of it, in time and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from results import Row, report

ROOT = Path(__file__).parents[1]
EARLY = 2_000

READ = """
import itertools, json, sys, psutil, torch
from pathlib import Path
from pvtcap.config import DataConfig, batch_plan
from pvtcap.dist import World
from pvtcap.sources import Sources
from pvtcap.stream import View, train_batches
from pvtcap.text import CaptionTokenizer

def main():
    folder, ranks, photos, early = sys.argv[1], *map(int, sys.argv[2:])
    data = DataConfig(train=folder, global_batch=64, image_px=64, workers=2, captions_per_photo=2)
    sources = Sources.open(data)
    captions = (c for group in itertools.islice(sources.captions(), 1000) for c in group)
    view = View(data, CaptionTokenizer.train(captions, 200), 24)
    plan = batch_plan(data, ranks)
    batches = train_batches(sources, view, plan, World(0, ranks, 0, torch.device("cpu")), seed=0, first_step=0)
    me, seen, found = psutil.Process(), 0, []
    for batch in batches:
        if not found and seen >= early or seen >= photos // ranks:
            workers = [p for p in me.children(recursive=True) if not p.children() and p.memory_info().rss > 2**26]
            found.append([round(p.memory_info().rss / 2**20) for p in [me, *workers]])
            if seen >= photos // ranks:
                break
        seen += len(batch.samples)
    print(json.dumps(found))

if __name__ == "__main__":
    main()
"""

ORDER = """
import json, resource, time
from pvtcap.order import Order
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
order = Order([[10_000] * 1_200], [1.0], seed=0, global_batch=256, max_lanes=32, window_shards=2)
order.place(11_999_999)
sought = time.perf_counter()
steps = sorted({need.step for need in __import__("itertools").takewhile(
    lambda need: need.step < 12_000_000 // 256, order.needs(0, range(256)))})
for step in steps:  # a window of some lane begins here: the permutation of each is drawn
    for lane in range(32):
        order.place(step * 256 + lane * 8 + 7)
done = time.perf_counter()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([sought - started, done - sought, (after - before) / 1024]))
"""


def child(code: str, *words: object) -> list[Any]:
    """Run a program of ours in a process of its own; what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"  # workers import it
        program.write_text(code)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(program), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return list(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=100_000)
    parser.add_argument("--data", type=Path, help="a folder to keep the shards in, or to find them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        data = args.data or Path(temporary) / "shards"
        if not (data / "manifest.json").is_file():
            words = ["--num-samples", str(args.photos), "--image-px", "32", "--samples-per-shard", "1000"]
            command = [sys.executable, "-m", "pvtcap", "shards", "shapes", *words, "--out", str(data)]
            subprocess.run(command, check=True, cwd=ROOT)
        found = {ranks: child(READ, data, ranks, args.photos, EARLY) for ranks in (1, 4, 16)}
    rows = []
    for ranks, (early, late) in found.items():
        for number, (before, after) in enumerate(zip(early, late, strict=True)):
            name = f"worker {number}" if number else "trainer"
            both = {"at the epoch's end": [after], f"after {EARLY:,} photos": [before]}
            rows.append(Row.of(f"{ranks} ranks, {name}", "MiB", both, less_is_better=True))
    seek_s, epoch_s, order_mib = child(ORDER)
    order = {"seek_s": seek_s, "epoch_s": epoch_s, "mib": order_mib}
    report("stream_memory", f"an epoch of {args.photos:,} photos", rows, {"photos": args.photos, "order_12m": order})
    print(
        f"order of 12,000,000 samples in 1,200 shards: made and a seek to the last in {seek_s * 1e3:.1f} ms, all "
        f"windows of the epoch in {epoch_s:.2f} s, {order_mib:.0f} MiB"
    )


if __name__ == "__main__":
    main()
