"""All benchmarks, short: make bench, or python benchmarks/run.py --flickr8k DIR --coco DIR [--only NAME …]

About twenty minutes on two cores. Each file beside this one asks one question and can be run by itself, longer, with
options of its own. Peers are installed from PyPI into environments of their own in benchmarks/environments, once. What
needs photos that were not named is left out, and said. In the end: one table, benchmarks/results/short, and a picture.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

from results import Row, machine, print_rows

HERE = Path(__file__).parent
SHORT = HERE / "results" / "short"
ENVIRONMENTS = HERE / "environments"
# What pip installs into each environment; "torch": it looks for torch and what comes with it where ours is.
INSTALLED = {
    "accelerate": [["--no-deps", "accelerate"]],
    "img2dataset": [["img2dataset"]],
    "open_clip": [
        ["--no-deps", "open_clip_torch"],
        ["webdataset<=0.2.86", "ftfy", "regex", "pandas", "numpy<3"],
    ],
    "streaming": [
        ["--no-deps", "mosaicml-streaming"],
        [
            "numpy<2.2",
            "transformers<5",
            "matplotlib<4",
            "google-cloud-storage<3.3",
            "paramiko<4",
            "boto3",
            "oci",
            "Brotli",
            "python-snappy",
            "tqdm",
            "xxhash<4",
            "zstd",
            "catalogue",
            "azure-storage-blob",
            "azure-storage-file-datalake",
            "azure-identity",
        ],
    ],
}
WITH_TORCH = ("accelerate", "open_clip", "streaming")


@dataclass(frozen=True)
class Benchmark:
    """A file beside this one, its words, and the photos and peers without which it is left out."""

    name: str
    words: str
    photos: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()


BENCHMARKS = (
    Benchmark(
        "build_shards",
        "--photos {coco}/val2017 --num-photos 1024 --repeat 1 --img2dataset {img2dataset}/bin/img2dataset",
        ("coco",),
        ("img2dataset",),
    ),
    Benchmark(
        "stream",
        "--quick --flickr8k {flickr8k} --coco {coco}/val2017 --streaming {streaming} --open-clip {open_clip}",
        ("flickr8k", "coco"),
        ("streaming", "open_clip"),
    ),
    Benchmark(
        "features",
        "--photos {flickr8k}/images --captions {flickr8k}/Flickr8k.token.txt "
        "--list {flickr8k}/Flickr_8k.trainImages.txt "
        "--num-photos 192 --image-px 224 --steps 8 --repeat 1",
        ("flickr8k",),
    ),
    Benchmark("train_step", "--repeat 1"),
    Benchmark("floors", "--repeat 3"),
    Benchmark(
        "whole_job",
        "--flickr8k {flickr8k} --peer {accelerate} --minutes 1.5 --captions 5",
        ("flickr8k",),
        ("accelerate",),
    ),
    Benchmark(
        "coca",
        "--flickr8k {flickr8k} --open-clip {open_clip} --rows 40 --steps 4",
        ("flickr8k",),
        ("open_clip",),
    ),
    Benchmark("evaluate", "--repeat 1 --references {coco}/annotations/captions_val2017.json", ("coco",)),
)


def environment_of(peer: str) -> Path:
    """The peer's environment, made when it is not there."""
    home = ENVIRONMENTS / peer
    if not (home / "installed").exists():
        print(f"installing {peer} into {home} …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        for words in INSTALLED[peer]:
            quiet = ["install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([str(home / "bin" / "pip"), *quiet, *words], check=True)
        if peer in WITH_TORCH:
            (packages,) = home.glob("lib/python3.*/site-packages")
            (packages / "zz_torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (home / "installed").touch()
    return home


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flickr8k", type=Path, help="folder with images/, Flickr8k.token.txt and its lists")
    parser.add_argument("--coco", type=Path, help="folder with val2017/ and annotations/captions_val2017.json")
    parser.add_argument("--only", nargs="+", choices=[one.name for one in BENCHMARKS])
    parser.add_argument("--picture", type=Path, default=SHORT / "ratios.png")
    args = parser.parse_args()
    rows: list[Row] = []
    failed = []
    for one in BENCHMARKS:
        if args.only and one.name not in args.only:
            continue
        if missing := [f"--{name}" for name in one.photos if getattr(args, name) is None]:
            print(f"{one.name}: left out without {' and '.join(missing)}", flush=True)
            continue
        places = {name: getattr(args, name) for name in one.photos} | {name: environment_of(name) for name in one.peers}
        words = [word.format(**places) for word in one.words.split()]
        started = time.perf_counter()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "BENCHMARK_RESULTS": str(SHORT)}
        code = subprocess.run([sys.executable, str(HERE / f"{one.name}.py"), *words], env=environment, check=False)
        print(f"{one.name}: {time.perf_counter() - started:.0f} s", flush=True)
        if code.returncode:
            failed.append(one.name)
        else:
            newest = max(SHORT.glob(f"{one.name}*.json"), key=lambda path: path.stat().st_mtime)  # stream_1.json
            rows += [Row(**row) for row in json.loads(newest.read_text())["rows"]]
    if rows:
        print_rows(machine(), rows)
        draw(rows, args.picture)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def draw(rows: list[Row], path: Path) -> None:
    """Bars of all ratios on a logarithmic axis; a mark where the goal is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row.question}: {row.name} / {row.peer}, {row.unit}" for row in rows]
    colours = ["tab:gray" if row.goal is None else "tab:green" if row.ratio >= row.goal else "tab:red" for row in rows]
    axes.barh(names, [row.ratio - 1 for row in rows], left=1, color=colours)
    goals = [(number, row.goal) for number, row in enumerate(rows) if row.goal is not None]
    axes.plot([goal for _, goal in goals], [number for number, _ in goals], "k|", markersize=12, label="goal")
    for number, row in enumerate(rows):
        axes.annotate(f"{row.ratio:.2f}", (row.ratio, number), (3, 0), textcoords="offset points", va="center", size=8)
    axes.set(xscale="log", title=f"how many times better than the peer or the limit\n{machine()}")
    axes.margins(x=0.12, y=0.01)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=90)
    print(path)


if __name__ == "__main__":
    main()
