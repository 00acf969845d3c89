"""How fast are shards built? python benchmarks/build_shards.py --photos DIR [--img2dataset VENV/bin/img2dataset]

The same JPEGs, scaled to a short side of 384 px, in the same number of processes, by

    bare        Pillow alone: read, decode, resize, encode; nothing is stored. The limit.
    folder      pvtcap shards folder, from the disk
    download    pvtcap shards conceptual-captions, from a server on loopback
    img2dataset from the same server, with its webdataset output; run.py makes its environment

Photos are counted by second and by CPU second of the tool and its workers (not of the server, which shares the
machine): start-up is included in both. The median of --repeat runs, which take turns.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from descendants import adopt, children, wait_for_all_but
from PIL import Image
from results import Row, report

ROOT = Path(__file__).parents[1]
SHORT_SIDE_PX, QUALITY = 384, 90
PAIRS = (("folder", "bare", 0.9), ("folder", "img2dataset", 1.5), ("download", "img2dataset", 1.5))


def bare(path: Path) -> int:
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        width, height = image.size
        scale = min(1.0, SHORT_SIDE_PX / min(width, height))
        photo = image.convert("RGB")
    if scale < 1:
        photo = photo.resize((round(width * scale), round(height * scale)), Image.Resampling.HAMMING)
    out = io.BytesIO()
    photo.save(out, "JPEG", quality=QUALITY)
    return out.tell()


def run_bare(paths: list[Path], processes: int) -> None:
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for _ in pool.map(bare, paths, chunksize=16):
            pass


def enlarged(photos: Path, out: Path, long_side_px: int) -> Path:
    out.mkdir()
    for path in photos.glob("*.jpg"):
        with Image.open(path) as image:
            scale = long_side_px / max(image.size)
            size = round(image.width * scale), round(image.height * scale)
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(out / path.name, quality=90)
    return out


def run(*words: object) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def measured(task: Callable[[], None]) -> tuple[float, float]:
    """(seconds, CPU seconds of the processes it started and those that they did)."""
    before = children()
    start = wait_for_all_but(before)
    started = time.perf_counter()
    task()
    seconds = time.perf_counter() - started
    end = wait_for_all_but(before)
    return seconds, end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime


def tasks(args: argparse.Namespace, names: list[str], folder: Path, address: str) -> dict[str, Callable[[], None]]:
    """What to measure, by name; each leaves ``folder``/out behind."""
    rows = [(number, names[number % len(names)]) for number in range(args.num_photos)]
    many = folder / "photos"  # one name a row, as links: every builder sees as many different photos
    many.mkdir()
    for number, name in rows:
        (many / f"{number:06d}.jpg").symlink_to(args.photos.resolve() / name)
    (folder / "captions.csv").write_text("file,caption\n" + "".join(f"{n:06d}.jpg,photo {n}\n" for n, _ in rows))
    (folder / "urls.tsv").write_text(
        "caption\turl\n" + "".join(f"photo {n}\t{address}/ok/{name}?{n}\n" for n, name in rows)
    )
    out, pvtcap = folder / "out", [sys.executable, "-m", "pvtcap", "shards"]
    stored = ["--out", out, "--short-side-px", SHORT_SIDE_PX, "--jpeg-quality", QUALITY, "--processes", args.processes]
    found: dict[str, Callable[[], None]] = {
        "bare": lambda: run_bare(sorted(many.iterdir()), args.processes),
        "folder": lambda: run(*pvtcap, "folder", "--images", many, "--captions", folder / "captions.csv", *stored),
        "download": lambda: run(
            *(*pvtcap, "conceptual-captions", "--tsv", folder / "urls.tsv", "--allow-private-addresses", "127.0.0.0/8"),
            *("--per-host", 64, "--no-drop-duplicates", *stored),
        ),
    }
    if args.img2dataset is not None:
        found["img2dataset"] = lambda: run(
            *(args.img2dataset, "--url_list", folder / "urls.tsv", "--input_format", "tsv", "--url_col", "url"),
            *("--caption_col", "caption", "--output_folder", out, "--output_format", "webdataset"),
            *("--image_size", SHORT_SIDE_PX, "--resize_mode", "keep_ratio", "--resize_only_if_bigger", True),
            *("--encode_quality", QUALITY, "--processes_count", args.processes, "--thread_count", 64),
            *("--number_sample_per_shard", 1000, "--enable_wandb", False),
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of JPEGs larger than 384 px")
    parser.add_argument("--long-side-px", type=int, help="enlarge the photos to this first, as cameras make them")
    parser.add_argument("--num-photos", type=int, default=8192, help="they are used again and again")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--img2dataset", type=Path)
    args = parser.parse_args()
    adopt()
    seen: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, port_file = Path(temporary), Path(temporary) / "port"
        if args.long_side_px is not None:
            args.photos = enlarged(args.photos, folder / "enlarged", args.long_side_px)
        names = sorted(path.name for path in args.photos.glob("*.jpg"))
        server = [sys.executable, str(ROOT / "tests" / "photoserver.py"), str(args.photos), str(port_file)]
        with subprocess.Popen(server) as process:
            try:
                while not port_file.exists():
                    time.sleep(0.05)
                measure = tasks(args, names, folder, f"http://127.0.0.1:{port_file.read_text()}")
                for _ in range(args.repeat):
                    for name, task in measure.items():
                        seen.setdefault(name, []).append(measured(task))
                        check_count(folder / "out", args.num_photos)
                        shutil.rmtree(folder / "out", ignore_errors=True)
            finally:
                process.kill()
    size = "" if args.long_side_px is None else f" of {args.long_side_px:,} px"
    title = f"{args.num_photos:,} photos{size} to {SHORT_SIDE_PX} px, {args.processes} processes"
    name = "build_shards" if args.long_side_px is None else f"build_shards_{args.long_side_px}"
    options = {"photos": args.num_photos, "processes": args.processes, "repeat": args.repeat}
    report(name, title, rows_of(seen, args.num_photos), {"options": options, "seconds_and_cpu_seconds": seen})


def check_count(out: Path, wanted: int) -> None:
    """A tool that lost photos would look fast."""
    if not out.exists():
        return  # the bare limit stores nothing
    tars = [subprocess.run(["tar", "tf", tar], capture_output=True, text=True, check=True) for tar in out.glob("*.tar")]
    found = sum(line.endswith(".jpg") for tar in tars for line in tar.stdout.splitlines())
    assert found == wanted, f"{out}: {found} photos; wanted {wanted}"


def rows_of(seen: dict[str, list[tuple[float, float]]], num_photos: int) -> list[Row]:
    rows = []
    for ours, peer, goal in PAIRS:
        if peer in seen:
            for i, unit in ((0, "photos/s"), (1, "photos a CPU s")):
                runs = {name: [num_photos / run[i] for run in seen[name]] for name in (ours, peer)}
                rows.append(Row.of("shards built", unit, runs, goal=goal))
    return rows


if __name__ == "__main__":
    main()
