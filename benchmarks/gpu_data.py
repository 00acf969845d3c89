"""What ``gpu.py`` needs before anything is measured: the device, photos as shards, and their features."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from importlib import metadata

import torch
from gpu_part import Found, Part, timed
from memory import write_parts
from train_step import build

from pvtcap import features
from pvtcap.dist import World
from pvtcap.flops import peak_flops

# Words of a caption, as in Flickr30k: 12 and more or fewer, so that rows differ in length and some of each is padding.
LENGTHS = (8, 10, 11, 12, 13, 15, 18)
SHARDS = 8


def data(part: Part) -> Iterator[Found]:
    """The device; photos and what training needs beside them; their features."""
    if part.size["needs_gpu"] and not torch.cuda.is_available():
        raise RuntimeError("no GPU: only --toy runs without one")
    yield {"ready": True}
    kinds = {"device": _device, "shards": _shards, "features": _features}
    for contestant in part.contestants:
        yield kinds[contestant["loop"]](part)


def _device(part: Part) -> Found:
    config, world = part.config(part.contestants[0]), World.alone()
    on_gpu = world.device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    peak = peak_flops(config, name)
    names = ("torch", "deepspeed", "transformers", "timm")
    versions = {one.name: one.version for one in metadata.distributions() if one.name in names}
    return {
        "device": name,
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else None,
        "peak_tflops": None if peak is None else peak / 1e12,
        "product_tflops": _product_tflops(world.device, part.size["product"]),
        "versions": {**versions, "cuda": torch.version.cuda},
    }


def _product_tflops(device: torch.device, side: int) -> float:
    """Of a product of two bf16 matrices of so many rows and columns: 2 × side³ operations."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = timed(lambda: left @ right, device, warm_up=3, steps=10)
    return 2 * side**3 / statistics.median(seconds) / 1e12


def _shards(part: Part) -> Found:
    started, each = time.perf_counter(), math.ceil(part.size["data_photos"] / SHARDS)
    # The builder makes four times the photos that it is asked for.
    build(part.folder, part.size["data_photos"] // 4, part.size["px"], LENGTHS, "--samples-per-shard", str(each))
    encoder = part.size["model"].get("encoder", "pvt_v2_b1")
    write_parts(part.folder, part.folder / "shards", encoder, part.size["pieces"])
    num_bytes = sum(path.stat().st_size for path in (part.folder / "source").iterdir())
    return {
        "making_s": time.perf_counter() - started,
        "bytes_per_photo": num_bytes / part.size["data_photos"],
    }


def _features(part: Part) -> Found:
    """Photos a second that ``pvtcap features`` stores, from the first shard's end to the last one's."""
    (contestant,) = (one for one in part.contestants if one["loop"] == "features")
    config = part.config({**contestant, "input": "photos"})
    out = part.folder / "features"
    with World.start() as world:
        manifest = features.run(config, part.folder / "shards", out, world, features.FeatureOptions())
    # An index is written when its shard is whole: the process's start and the first kernels are not counted.
    stamps = [path.stat().st_mtime for path in sorted(out.glob("*.index.json"))]
    photos = sum(entry.num_samples for entry in manifest.shards[1:])
    return {"photos_per_s": photos / (stamps[-1] - stamps[0])}
