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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pvtcap import bertlayers
from pvtcap.bertlayers import ResidualNorm
from pvtcap.captioner import Captioner
from pvtcap.config import Config
from pvtcap.decoder import Decoder
from pvtcap.packing import Packed, Rows


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


class _ResidualNorm(torch.autograd.Function):
    """``gpuresidual`` keeps the sum."""

    @staticmethod
    def forward(ctx: Any, branch: Tensor, residual: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(branch))
        return torch.empty_like(branch)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return tuple(torch.empty_like(*ctx.saved_tensors) for _ in range(2))


class _CrossEntropies(torch.autograd.Function):
    """``gpuloss`` keeps the logits, and the backward pass makes as many gradients."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.new_empty(len(logits), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return torch.empty_like(*ctx.saved_tensors)


@contextmanager
def _replaced(of: object, name: str, by: object) -> Iterator[None]:
    usual = getattr(of, name)
    setattr(of, name, by)
    try:
        yield
    finally:
        setattr(of, name, usual)


@contextmanager
def _kernels_of_a_gpu(decoder: Decoder) -> Iterator[None]:
    """On ``meta``, torch would take what is there for a CPU: all of attention's weights, float32 logits."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return _FlashAttention.apply(query, key, value)

    def losses(hidden_MD: Tensor, labels_M: Tensor) -> Any:
        return _CrossEntropies.apply(decoder.lm.cls(hidden_MD))

    def norm(_: ResidualNorm, branch: Tensor, residual: Tensor, dropout: float) -> Any:
        return _ResidualNorm.apply(branch, residual)

    with ExitStack() as stack:
        if next(decoder.parameters()).element_size() > 2:
            stack.enter_context(_replaced(functional, "scaled_dot_product_attention", attention))
        else:
            stack.enter_context(_replaced(bertlayers, "attend_to_caption", attention))
            stack.enter_context(_replaced(bertlayers, "attend_to_photo", attention))
            stack.enter_context(_replaced(ResidualNorm, "forward", norm))
            stack.enter_context(_replaced(decoder, "_losses", losses))
        yield


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
        packed = _packed(photos, tokens, labels)
    learning: list[Any] = list(model.trainable().values())  # torch does not type the method
    hooks = [one.register_post_accumulate_grad_hook(lambda made: setattr(made, "grad", None)) for one in learning]
    known = [*model.parameters(), *model.buffers(), shown, *_tensors(packed), *_tensors(packed.rows)]
    try:
        with LiveBytes(known) as on_cpu:
            loss = model.decoder(model.patches(shown), packed)
        with LiveBytes(known) as on_gpu, _kernels_of_a_gpu(model.decoder):
            model.decoder(model.patches(shown), packed).backward()
    finally:
        for hook in hooks:
            hook.remove()
    assert loss.requires_grad, "else nothing would have been kept for a backward pass"
    return StepBytes(on_cpu.now, on_gpu.peak)


def _packed(photos: int, tokens: int, labels: int) -> Packed:
    """Full rows; by number, since ``meta`` tensors cannot say what is padding or has a label."""
    segments_BT = torch.zeros((photos, tokens), dtype=torch.int64)
    slots_N, labelled_M = (torch.zeros(count, dtype=torch.int64) for count in (photos * tokens, labels))
    rows = Rows.of(segments_BT, slots_N)
    return Packed(slots_N[None], slots_N[None], rows, labelled_M, labelled_M, labelled_M)


def _tensors(of: Packed | Rows) -> Iterator[Tensor]:
    return (one for one in vars(of).values() if isinstance(one, Tensor))
