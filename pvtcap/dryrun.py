"""What a training step of a Captioner holds in memory, found without computing it: on torch's ``meta`` device.

The model is built without values and called with tensors without values. Every operation still makes its outputs, of
the true shapes, and the backward pass keeps what it would keep; so the bytes that are alive at a time can be counted in
a second or two, for any size of model, with no weights, GPU or data. Example::

    model = meta_captioner(config, vocab_size=30524)
    found = step_bytes(model, photos=8, tokens=100, labels=80)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pvtcap.captioner import Captioner
from pvtcap.config import Config
from pvtcap.decoder import packed_mask


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a forward and backward pass needs beyond parameters and their gradients.

    ``saved``: alive on a CPU at the end of the forward pass, for the backward pass. ``gpu_peak``: the most alive at any
    time on a GPU, where attention keeps no weights (Dao et al., "FlashAttention", 2022).
    """

    saved: int
    gpu_peak: int


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storage made by operations within it, from when it is made to when it is freed; ``known`` is not."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class _FlashAttention(torch.autograd.Function):
    """What a GPU's attention keeps: its inputs and outputs, and a float32 for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended, sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, attended, sums)
        return attended

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return tuple(torch.empty_like(one) for one in ctx.saved_tensors[:3])


@contextmanager
def _attention_of_a_gpu() -> Iterator[None]:
    """On ``meta``, torch would take the attention of a CPU, with all weights, and several times with dropout."""
    usual = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda query, key, value, *_, **__: _FlashAttention.apply(
        query, key, value
    )
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = usual


def meta_captioner(config: Config, vocab_size: int) -> Captioner:
    """The model without values, in the dtype that it trains in, and in training mode."""
    with torch.device("meta"):
        model = Captioner(config, vocab_size)
    model.decoder.prepare_training(checkpointing=config.train.activation_checkpointing, compiled=False)
    return model.cast(config.precision).train()


def step_bytes(
    model: Captioner, photos: int, image_px: int, tokens: int, labels: int, features: Sequence[int] | None = None
) -> StepBytes:
    """Count a forward and backward pass of ``photos`` rows of ``tokens`` each, ``labels`` of them to predict.

    ``features`` is the shape of what stands for a photo, where the model is shown that. Gradients of parameters are
    freed as soon as they are made: the engine decides what becomes of them, and only the last one made is in ``peak``.
    """
    with torch.device("meta"):
        shown = (
            torch.empty((photos, 3, image_px, image_px), dtype=torch.uint8)
            if features is None
            else torch.empty((photos, *features), dtype=torch.float16)
        )
        rows = torch.zeros((photos, tokens), dtype=torch.int64)
    learning: list[Any] = list(model.trainable().values())  # torch does not type the method
    hooks = [one.register_post_accumulate_grad_hook(lambda made: setattr(made, "grad", None)) for one in learning]
    known = [*model.parameters(), *model.buffers(), shown, rows]
    try:
        with LiveBytes(known) as on_cpu:
            loss = _loss(model, shown, rows, labels)
        with LiveBytes(known) as on_gpu, _attention_of_a_gpu():
            _loss(model, shown, rows, labels).backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
    assert loss.requires_grad, "else nothing would have been kept for a backward pass"
    return StepBytes(on_cpu.now, on_gpu.peak)


def _loss(model: Captioner, shown: Tensor, rows_BT: Tensor, labels: int) -> Tensor:
    """``Captioner.forward``; but rows are chosen by number, since ``meta`` tensors cannot say which have a label."""
    hidden_BTD = model.decoder.lm.bert(
        input_ids=rows_BT,
        attention_mask=packed_mask(rows_BT),
        position_ids=rows_BT,
        encoder_hidden_states=model.patches(shown),
        use_cache=False,
    ).last_hidden_state
    some_N = torch.zeros(labels, dtype=torch.int64, device="meta")
    logits_NV = model.decoder.lm.cls(hidden_BTD.flatten(0, 1)[some_N])
    return functional.cross_entropy(logits_NV.float(), some_N, reduction="sum")
