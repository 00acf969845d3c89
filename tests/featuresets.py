"""What tests of features share: the weights of an encoder, a configuration that freezes it, features of the shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_tree
from safetensors.torch import save_file

from pvtcap import features
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.encoder import Encoder

ALONE = World(0, 1, 0, torch.device("cpu"))


def save_encoder(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    state = Encoder("pvt_v2_b0", 2).pvt.state_dict()
    # As weights that have learned: those of a new PVT give features that hardly differ from photo to photo.
    save_file({name: value * 3 if value.ndim > 1 else value for name, value in state.items()}, path)
    return path


def frozen_tree(shapes: Path, folder: Path) -> dict[str, Any]:
    tree = tiny_tree(shapes, folder / "run")
    tree["data"] |= {"crop_min_area": 0.5, "flip_probability": 0.5}
    tree["model"] |= {"encoder_weights": str(folder / "encoder.safetensors"), "dropout": 0.0}
    tree["train"] |= {"what": "projection+decoder"}
    return tree


def make(world: World, tree: dict[str, Any], data: str, out: str, num_views: int = 1, dtype: str = "fp16") -> None:
    options = features.FeatureOptions(num_views, "int8" if dtype == "int8" else "fp16")
    features.run(parse(tree, "test"), Path(data), Path(out), world, options)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """As each rank has under torchrun: sums of floats may depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(folder: Path, shapes: Path) -> Path:
    """Weights of an encoder, and features of the shapes: train with one view and with three, fp16 and int8; val."""
    save_encoder(folder / "encoder.safetensors", 1)
    tree = frozen_tree(shapes, folder)
    for name, part, views, dtype in (
        ("one", "train", 1, "fp16"), ("int8", "train", 1, "int8"), ("three", "train", 3, "fp16"),
        ("val", "val", 1, "fp16"),
    ):  # fmt: skip
        make(ALONE, tree, str(shapes / part), str(folder / name), views, dtype)
    return folder
