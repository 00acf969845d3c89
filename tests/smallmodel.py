"""A small Captioner, its tokenizer, and batches of packed captions, for tests of their parts."""

from __future__ import annotations

from typing import Any

import torch

from pvtcap.batch import Batch
from pvtcap.captioner import Captioner
from pvtcap.configfile import parse
from pvtcap.text import CaptionTokenizer

WORDS = ["a", "red", "blue", "green", "large", "small", "circle", "square", "star", "on", "the", "left", "right", "top"]
TOKENIZER = CaptionTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS], prompt="a star on")
CAPTIONS = [
    ["red circle on the left", "large red circle", "circle"],
    ["blue star", "small blue star on the right top", "the star on the right"],
]


def batch(groups: list[list[str]], photos: torch.Tensor) -> Batch:
    rows = TOKENIZER.pack(groups, 20)
    tensors = {name: torch.from_numpy(values) for name, values in vars(rows).items()}
    return Batch(photos=photos, samples=(), num_captions=sum(map(len, groups)), **tensors)


def model_of(tree: dict[str, Any], **sections: dict[str, Any]) -> Captioner:
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return Captioner(parse(tree, "test"), TOKENIZER.size)


def loss_and_gradients(model: Captioner, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for one in batches:
        loss = model(one)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}
