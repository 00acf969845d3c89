"""What do features gain? python benchmarks/features.py --photos DIR --captions Flickr8k.token.txt --list FILE

Trains the decoder of configs/flickr8k_tiny.yaml on the output of a frozen encoder, pvtcap's own pvt_v2_b1 (PVT-Tiny)
unless --encoder names another (new weights: they cost what trained ones do), on CPUs, once from photos and once from
each kind of feature shards, by the real command in processes of their own that take turns:

    photos    decoded, cropped, resized; the encoder runs each time
    fp16      features from ``pvtcap features``, 2 bytes each
    int8      the same in 1 byte each, and a scale a channel
    limit     the fastest of them without its waiting for data: projection, decoder and optimizer alone

Captions a second are the median of the steps behind the first few; an epoch is as long as that makes it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from results import Row, report
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
WARM_UP_STEPS = 3
KINDS = ("photos", "fp16", "int8")
GOAL, GOAL_PX = 5.0, 384  # captions of BLIP are trained at 384 px; smaller photos leave the encoder less to do


def run(*words: object) -> float:
    """A pvtcap command; the seconds it took."""
    started = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pvtcap", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return time.perf_counter() - started


def build_photos(args: argparse.Namespace, folder: Path) -> Path:
    names = args.list.read_text().split()[: args.num_photos]
    (folder / "list.txt").write_text("\n".join(names) + "\n")
    words = ["--images", args.photos, "--captions", args.captions, "--list", folder / "list.txt"]
    run("shards", "flickr8k", *words, "--short-side-px", 384, "--samples-per-shard", 128, "--out", folder / "photos")
    return folder / "photos"


def configuration(args: argparse.Namespace, folder: Path, image_px: int) -> Path:
    """The tiny configuration with a frozen encoder, at this size."""
    tree: dict[str, Any] = yaml.safe_load((ROOT / "configs/flickr8k_tiny.yaml").read_text())
    weights = folder / "encoder.safetensors"
    if not weights.exists():
        torch.manual_seed(0)
        save_file(timm.create_model(args.encoder, pretrained=False).state_dict(), weights)
    tree["data"] |= {"image_px": image_px, "val": None, "workers": args.workers, "global_batch": args.batch}
    tree["model"] |= {"encoder": args.encoder, "encoder_weights": str(weights), "encoder_stages": args.stages}
    steps = WARM_UP_STEPS + args.steps
    tree["train"] = {"what": "projection+decoder", "steps": steps, "log_every_steps": 1}
    tree["evaluate"] = {}
    path = folder / f"{image_px}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def measured(config: Path, data: Path, out: Path) -> dict[str, list[float]]:
    """Per step behind the warm-up: captions a second, seconds, and the share of them that was waiting for data."""
    run("train", config, f"data.train={data}", f"run.dir={out}")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"][WARM_UP_STEPS:]
    names = ("speed/captions_per_second", "speed/step_seconds", "data/wait_share")
    return {name: [step[name] for step in steps] for name in names}


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def one_size(args: argparse.Namespace, folder: Path, photos: Path, image_px: int) -> dict[str, Any]:
    """By kind: bytes a photo, captions a second, share of waiting, and the seconds it took to make the features."""
    config = configuration(args, folder, image_px)
    data, made_s = {"photos": photos}, {"photos": 0.0}
    for kind in KINDS[1:]:
        data[kind] = folder / f"{kind}-{image_px}"
        words = ["--data", photos, "--out", data[kind], "--dtype", kind, "--views", args.views]
        made_s[kind] = run("features", config, *words)
    runs: dict[str, list[dict[str, list[float]]]] = {kind: [] for kind in KINDS}
    for turn in range(args.repeat):
        for kind in KINDS:
            runs[kind].append(measured(config, data[kind], folder / "runs" / f"{kind}-{image_px}-{turn}"))
    found = {}
    for kind in KINDS:
        rates, waits = (
            [value for one in runs[kind] for value in one[name]]
            for name in ("speed/captions_per_second", "data/wait_share")
        )
        found[kind] = {
            "bytes_per_photo": bytes_of(data[kind]) / args.num_photos,
            "captions_per_s": rates,
            "wait_share": statistics.median(waits),
            "made_s": made_s[kind],
        }
    return found


def rows_of(found: dict[int, dict[str, Any]]) -> list[Row]:
    rows = []
    for image_px, kinds in found.items():
        for kind in KINDS[1:]:
            goal = GOAL if kind == "fp16" and image_px == GOAL_PX else None
            runs = {each: kinds[each]["captions_per_s"] for each in (kind, "photos")}
            rows.append(Row.of(f"training at {image_px} px", "captions/s", runs, goal=goal))
            sizes = {each: [kinds[each]["bytes_per_photo"]] for each in (kind, "photos")}
            rows.append(Row.of(f"disk at {image_px} px", "bytes a photo", sizes, less_is_better=True))
        limit = max(statistics.median(one["captions_per_s"]) / (1 - one["wait_share"]) for one in kinds.values())
        both = {"fp16": kinds["fp16"]["captions_per_s"], "limit": [limit]}
        rows.append(Row.of(f"training at {image_px} px", "captions/s", both))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="Flickr8k's images")
    parser.add_argument("--captions", type=Path, required=True, help="Flickr8k.token.txt")
    parser.add_argument("--list", type=Path, required=True, help="Flickr_8k.trainImages.txt")
    parser.add_argument("--num-photos", type=int, default=512)
    parser.add_argument("--image-px", type=int, nargs="+", default=[64, 224, 384])
    parser.add_argument("--encoder", default="pvt_v2_b1", help="a timm name (default %(default)s)")
    parser.add_argument("--stages", type=int, default=4, help="of the encoder: 4 is the default of pvtcap")
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12, help="that are measured, of each run")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        photos = build_photos(args, folder)
        found = {image_px: one_size(args, folder, photos, image_px) for image_px in args.image_px}
    options = {name: value for name, value in vars(args).items() if name not in ("photos", "captions", "list")}
    title = f"{args.num_photos:,} photos, {args.encoder}, batches of {args.batch}, {args.workers} workers"
    report(
        "features" if args.encoder == "pvt_v2_b1" else f"features_{args.encoder}",
        title,
        rows_of(found),
        {"options": options, "sizes": found},
    )


if __name__ == "__main__":
    main()
