"""How fast do training batches come, and how soon? python benchmarks/stream.py --coco DIR --flickr8k DIR

The same JPEGs, as batches of 32 random crops of 384 × 384 px, by

    pixels      pvtcap's own decoding functions over photos in memory, into the same batch again and again; nothing
                is read or sent. The limit.
    simplejpeg  the fastest loop of public parts over photos in memory: simplejpeg, crop, torch's antialiased bicubic
    pillow      Pillow alone over photos in memory: decode, crop, resize
    pvtcap      train_batches over a ShardSet; it packs five captions a photo, too
    webdataset  the same tars as open_clip reads them: PIL images, torchvision's RandomResizedCrop, ToTensor, Normalize
    open_clip   open_clip's own loader and transforms (open_clip_train.data): the same JPEGs, a caption each
    streaming   mosaicml-streaming over its own MDS files with the same JPEGs and the transforms of webdataset

each in a process of its own that is held, with its workers, to one CPU and one thread: what comes in a second is what
a core gives. What it reads lies in the kernel's cache of files by then: the loops over photos in memory read nothing
while they are timed, and minutes pass between two turns, in which a kernel may drop it (a tenth of our time for small
photos). As other work may share that CPU, photos are counted by CPU second, too (process and workers; start and first
batches left out): medians of --repeat runs, which take turns. Then the seconds to the first batch, imports left
out (those of pvtcap's fork server too, which 'pvtcap train' begins before it imports DeepSpeed): at the start, and
when going on after 90 % of an epoch, with the workers and without. webdataset reads again what came before (once):
with decoding, as a plain loop does, or ("reading") without.

streaming (--streaming VENV) wants an older NumPy and open_clip (--open-clip VENV) an older webdataset, so they have
environments of their own that look for torch where ours is: run.py makes them in environments/.
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from results import Row, report
from stream_ways import BATCH, SIDE_PX, WAYS, begin_workers, by_pillow

ROOT = Path(__file__).parents[1]
WARM_UP = 4  # batches
SUBJECTS = ("a dog", "two people at a table", "a red bus", "the sea", "some food on a plate")
READ_BY = {"open_clip": "clip", "streaming": "mds"}  # the others: shards
PEERS = ("open_clip", "streaming")  # in environments of their own
NUMBERS = (  # what is measured, its name, its unit, and whether less is better
    ("photos_per_cpu_s", "batches", "photos a CPU s", False),
    ("photos_per_s", "batches", "photos/s", False),
    ("first_batch_s", "first batch", "s", True),
    ("resume_s", "after 90 % of an epoch", "s", True),
    ("resume_without_workers_s", "after 90 %, no workers", "s", True),
)
GOALS = {
    ("photos_per_cpu_s", "webdataset"): 1.8,
    ("photos_per_cpu_s", "open_clip"): 1.8,
    ("photos_per_cpu_s", "pillow"): 1.5,
    ("photos_per_cpu_s", "streaming"): 1.5,
    ("photos_per_cpu_s", "simplejpeg"): 0.95,
    ("photos_per_cpu_s", "pixels"): 0.95,
    ("resume_s", "webdataset"): 50.0,
}
RESUMED = ("pvtcap", "webdataset", "webdataset, reading")


def cpu_s() -> float:
    """CPU seconds of this process and all that it started, those that have ended too."""
    process = psutil.Process()
    own = process.cpu_times()
    children = [child.cpu_times() for child in process.children(recursive=True)]
    return sum(own) + sum(each.user + each.system for each in children)


def measure(way: str, folder: Path, workers: int, first: int, num_batches: int) -> dict[str, float]:
    """Run in a process of its own: seconds to the first batch, then photos by second and by CPU second."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    next(by_pillow(folder, 0, 0))  # what all of them use is warm
    for path in (folder / READ_BY.get(way, "shards")).rglob("*.*"):
        path.read_bytes()
    batches_of, modules = WAYS[way]
    for name in modules:
        importlib.import_module(name)
    if way == "pvtcap" and workers:
        begin_workers()
    started = time.perf_counter()
    batches = batches_of(folder, workers, first)
    next(batches)
    found = {"first_batch_s": time.perf_counter() - started}
    if num_batches:
        for _ in itertools.islice(batches, WARM_UP):
            pass
        started, cpu = time.perf_counter(), cpu_s()
        for _ in itertools.islice(batches, num_batches):
            pass
        found["photos_per_s"] = BATCH * num_batches / (time.perf_counter() - started)
        found["photos_per_cpu_s"] = BATCH * num_batches / (cpu_s() - cpu)
    return found


def run(*words: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return done.stdout


def build(name: str, args: argparse.Namespace, folder: Path) -> int:
    """Write shards/, the same photos/ as files, vocab.json and, for streaming, mds/; gives the number of photos."""
    from pvtcap.shardset import ShardSet
    from pvtcap.text import CaptionTokenizer

    command = [sys.executable, "-m", "pvtcap", "shards"]
    options = ["--samples-per-shard", 500, "--out", folder / "shards"]
    if name == "flickr8k":
        texts, chosen = args.flickr8k / "Flickr8k.token.txt", args.flickr8k / "Flickr_8k.trainImages.txt"
        run(*command, name, "--images", args.flickr8k / "images", "--captions", texts, "--list", chosen, *options)
    else:
        (folder / "many").mkdir()
        rows = ["file,caption\n"]
        for number, photo in zip(
            range(args.coco_photos), itertools.cycle(sorted(args.coco.glob("*.jpg"))), strict=False
        ):
            (folder / "many" / f"{number:06d}.jpg").symlink_to(photo.resolve())
            rows += [f"{number:06d}.jpg,a photo of {what} with number {number}\n" for what in SUBJECTS]
        (folder / "captions.csv").write_text("".join(rows))
        run(*command, "folder", "--images", folder / "many", "--captions", folder / "captions.csv", *options)
    shardset = ShardSet.open(folder / "shards")
    vocab = CaptionTokenizer.train(itertools.chain.from_iterable(shardset.captions()), 2000).vocab
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "photos").mkdir()
    for tar in sorted((folder / "shards").glob("*.tar")):
        run("tar", "xf", tar, "-C", folder / "photos", "--wildcards", "*.jpg")
    if args.open_clip is not None:
        write_clip(folder)
    if args.streaming is not None:
        run(args.streaming / "bin" / "python", __file__, "--write-mds", folder)
    return shardset.num_samples


def write_clip(folder: Path) -> None:
    """KEY.jpg and KEY.txt, 500 samples a tar: open_clip reads no JSON."""
    (folder / "clip").mkdir()
    photos = sorted((folder / "photos").iterdir())
    for first in range(0, len(photos), 500):
        with tarfile.open(folder / "clip" / f"{first:06d}.tar", "w") as tar:
            for path in photos[first : first + 500]:
                tar.add(path, path.name)
                caption = tarfile.TarInfo(f"{path.stem}.txt")
                caption.size = len(SUBJECTS[0])
                tar.addfile(caption, io.BytesIO(SUBJECTS[0].encode()))


def write_mds(folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder / "mds"), columns={"image": "jpeg", "captions": "str"}) as writer:
        for path in sorted((folder / "photos").iterdir()):
            with Image.open(path) as image:  # a JPEG that nobody has read yet is stored byte for byte
                writer.write({"image": image, "captions": "five captions"})


def compare(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All ways in turn, --repeat times; the numbers of each run by way, and their medians."""
    num_photos = build(name, args, folder)
    late = int(0.9 * num_photos / BATCH)
    runs: dict[str, dict[str, list[float]]] = {}

    def measured(way: str, workers: int, first: int, num_batches: int, names: dict[str, str]) -> None:
        python = getattr(args, way) / "bin" / "python" if way in PEERS else sys.executable
        told = json.loads(run(python, __file__, "--measure", way, folder, workers, first, num_batches).splitlines()[-1])
        for key, value in told.items():
            runs.setdefault(way, {}).setdefault(names.get(key, key), []).append(value)

    for turn in range(args.repeat):
        for way in WAYS:
            if way != "webdataset, reading" and not (way in PEERS and getattr(args, way) is None):
                measured(way, args.workers, 0, args.num_batches, {})
            if way == "pvtcap" or (way in RESUMED and turn == 0):  # webdataset takes half a minute, and is not close
                measured(way, args.workers, late, 0, {"first_batch_s": "resume_s"})
                measured(way, 0, late, 0, {"first_batch_s": "resume_without_workers_s"})
    return {"photos": num_photos, "runs": runs}


def rows_of(name: str, runs: dict[str, dict[str, list[float]]]) -> list[Row]:
    rows = []
    for key, what, unit, less_is_better in NUMBERS:
        for peer, found in runs.items():
            if peer != "pvtcap" and key in found:
                both = {"pvtcap": runs["pvtcap"][key], peer: found[key]}
                goal = GOALS.get((key, peer))
                rows.append(Row.of(f"{name}: {what}", unit, both, goal=goal, less_is_better=less_is_better))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", type=Path, help="a folder of JPEGs, used again and again, such as COCO's val2017")
    parser.add_argument("--coco-photos", type=int, default=1500, help="in the epoch (default %(default)s)")
    parser.add_argument("--flickr8k", type=Path, help="folder with images/, Flickr8k.token.txt, the list of training")
    parser.add_argument("--streaming", type=Path, metavar="VENV", help="environment with mosaicml-streaming; see above")
    parser.add_argument("--open-clip", type=Path, metavar="VENV", help="environment with open_clip_torch; see above")
    parser.add_argument("--workers", type=int, default=1, help="of pvtcap and its peers (default 1; 0: none)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--num-batches", type=int, default=48, help="timed in a run (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one run, of eight batches each")
    parser.add_argument("--write-mds", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_mds is not None:
        write_mds(args.write_mds)
    elif args.measure is not None:
        way, folder, *numbers = args.measure
        print(json.dumps(measure(way, Path(folder), *map(int, numbers))), flush=True)
        os._exit(0)  # loaders that run ahead would take seconds to stop
    else:
        if args.quick:
            args.repeat, args.num_batches = 1, 8
        found, rows = {}, []
        for name in ("flickr8k", "coco"):
            if getattr(args, name) is not None:
                with tempfile.TemporaryDirectory() as temporary:
                    found[name] = compare(name, args, Path(temporary))
                rows += rows_of(name, found[name]["runs"])
        options = {"workers": args.workers, "repeat": args.repeat, "num_batches": args.num_batches}
        title = f"batches of {BATCH} photos of {SIDE_PX} px on one core, {args.workers} workers"
        report(f"stream_{args.workers}", title, rows, {"options": options, **found})


if __name__ == "__main__":
    main()
