"""Packed rows without their padding, and the attention of their tokens.

The stream pads the captions of each photo to the batch's longest row. All that a decoder does with a token by itself,
which is nearly all that it does, is done here for the N tokens that there are, one behind the other; only attention
has to know of rows.

Shapes: B photos, T tokens of the longest row, N tokens in all, P patches, D width, H heads of width d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Self

import torch
from numpy.random import SFC64
from torch import Tensor
from torch.nn import functional

from pvtcap.batch import Batch
from pvtcap.text import IGNORE, SHARED


@dataclass(frozen=True)
class Rows:
    """Where each of N tokens stands in B rows of T."""

    slots_N: Tensor
    """int64: its number among the B T places of padded rows."""
    mask_B1TT: Tensor
    """bool: ``packed_mask`` of the padded rows."""
    numbers_BT: Tensor
    """int64: which token each of those places has; 0 in padding, as good as any other there."""
    padding_BT: Tensor
    """bool."""
    firsts_N: Tensor
    """int32: the number of the first token of its caption."""
    starts: Tensor
    """int32 (B + 1): the number of each row's first token, and N."""
    own_B: Tensor
    """int32: the number of each row's first token that is not shared by all its captions."""

    @classmethod
    def of(cls, segments_BT: Tensor, slots_N: Tensor) -> Self:
        """``segments_BT`` are -1 in padding; ``slots_N`` the places that are not."""
        length, device = segments_BT.shape[1], segments_BT.device
        padding_BT = segments_BT < 0
        numbers_N = torch.arange(len(slots_N), device=device)
        numbers_BT = torch.zeros_like(segments_BT).flatten().index_copy_(0, slots_N, numbers_N).view(segments_BT.shape)
        used_B = length - padding_BT.sum(1)
        starts = functional.pad(used_B.cumsum(0), (1, 0))
        segments_N = segments_BT.flatten()[slots_N]
        rows_N = slots_N // length
        begins_N = functional.pad((rows_N[1:] != rows_N[:-1]) | (segments_N[1:] != segments_N[:-1]), (1, 0), value=True)
        firsts_N = torch.where(begins_N, numbers_N, 0).cummax(0).values
        return cls(
            slots_N,
            packed_mask(segments_BT),
            numbers_BT,
            padding_BT,
            firsts_N.int(),
            starts.int(),
            (starts[:-1] + (segments_BT == SHARED).sum(1)).int(),
        )


@dataclass(frozen=True)
class Packed:
    """A batch's N tokens, their positions within their captions (both (1, N)), and what is to be predicted."""

    tokens_1N: Tensor
    positions_1N: Tensor
    rows: Rows
    labelled_M: Tensor
    """The number of the token that each of M labels should follow."""
    labels_M: Tensor
    row_of_label_M: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """On a GPU this waits for what is still being computed there."""
        slots_N = (batch.segments.flatten() >= 0).nonzero().squeeze(1)
        row_of_label_M, turns_M = (batch.labels != IGNORE).nonzero(as_tuple=True)
        rows = Rows.of(batch.segments, slots_N)
        return cls(
            batch.tokens.flatten()[slots_N][None],
            batch.positions.flatten()[slots_N][None],
            rows,
            rows.numbers_BT[row_of_label_M, batch.predictors[row_of_label_M, turns_M]],
            batch.labels[row_of_label_M, turns_M],
            row_of_label_M,
        )


def packed_mask(segments_BT: Tensor) -> Tensor:
    """True (B, 1, T, T) where a token may look: at itself and before it, within its caption and what all share.

    Padding has a segment of its own and so always sees itself: a row without any True would make attention NaN.
    """
    seen_BTT = (segments_BT[:, :, None] == segments_BT[:, None, :]) | (segments_BT == SHARED)[:, None, :]
    length = segments_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
    return (seen_BTT & causal_TT)[:, None]


def has_kernels(states: Tensor, head_width: int | None = None) -> bool:
    """Whether kernels of ours may take them: in 16 bits, on a GPU of Ampere's generation or a later one.

    Attention's want heads of certain widths; the others do not care.
    """
    fits = states.is_cuda and states.element_size() == 2 and head_width in (None, 16, 32, 64, 128)
    return fits and _runs_triton(states.device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _runs_triton(device: torch.device) -> bool:
    """Triton comes with torch where that is built for CUDA."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def attend_to_caption(query_NHd: Tensor, key_NHd: Tensor, value_NHd: Tensor, rows: Rows, dropout: float) -> Tensor:
    """Each token to what its mask shows: (N, H, d). ``gpuattention.to_caption`` is quicker."""
    places = _Places.of(rows, query_NHd.shape[1])
    query, key, value = (_padded(one, places) for one in (query_NHd, key_NHd, value_NHd))
    return _unpadded(_attention(query, key, value, rows.mask_B1TT, dropout), places)


def attend_to_photo(query_NHd: Tensor, key_BPHd: Tensor, value_BPHd: Tensor, rows: Rows, dropout: float) -> Tensor:
    """Each token to all patches of its photo: (N, H, d). ``gpuattention.to_photo`` is quicker."""
    places = _Places.of(rows, query_NHd.shape[1])
    key, value = (of_photos.transpose(1, 2) for of_photos in (key_BPHd, value_BPHd))
    return _unpadded(_attention(_padded(query_NHd, places), key, value, None, dropout), places)


def draws_masks(states: Tensor, dropout: float) -> bool:
    """Whether ``dropout_mask`` is the way to drop: on CPUs. torch's compiler has a quicker one of its own."""
    return dropout > 0 and states.device.type == "cpu" and not torch.compiler.is_compiling()


def dropout_mask(states: Tensor, dropout: float) -> Tensor:
    """What ``functional.dropout`` would multiply these with, by 16 random bits each: in a tenth of the time on CPUs.

    ``dropout`` is taken to the nearest of 65,536ths, and what stays is enlarged to suit. The bits are numpy's SFC64,
    with a seed of torch's.
    """
    count, dropped = states.numel(), min(round(dropout * 2**16), 2**16 - 1)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    fours = torch.from_numpy(SFC64(seed).random_raw(-(-count // 4)))
    bits = fours.view(torch.int16)[:count].view(states.shape)
    mask = torch.empty(states.shape, dtype=states.dtype)
    torch.ge(bits, dropped - 2**15, out=mask)
    return mask.mul_(2**16 / (2**16 - dropped))


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """torch's own, but with ``dropout_mask``; with dropout torch has no joint kernel for CPUs either."""
    if not draws_masks(query, dropout):
        return functional.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout)
    attended: Tensor = _DroppingAttention.apply(query, key, value, mask, dropout)
    return attended


class _DroppingAttention(torch.autograd.Function):
    """What autograd would do, in place wherever nobody looks again. (B, H, T, d); ``mask`` is (B, 1, T, T) or None."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        ctx.scale = 1 / math.sqrt(query.shape[-1])
        queries, keys, values = (one.flatten(0, 1) for one in (query, key, value))
        scores = torch.baddbmm(_nothing(queries), queries, keys.mT, beta=0, alpha=ctx.scale)
        if mask is not None:
            scores.view(*query.shape[:2], *scores.shape[1:]).masked_fill_(~mask, -torch.inf)
        weights = torch.softmax(scores, -1, out=scores)
        kept = dropout_mask(weights, dropout)
        dropped = weights * kept
        ctx.save_for_backward(queries, keys, values, weights, kept, dropped)
        return (dropped @ values).view(query.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        queries, keys, values, weights, kept, dropped = ctx.saved_tensors
        heads, gradient = gradients[0].shape[:2], gradients[0].flatten(0, 1)
        of_weights = (gradient @ values.mT).mul_(kept)
        # Where the mask hides a key its weight is 0, and so is this.
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query = torch.baddbmm(_nothing(queries), of_scores, keys, beta=0, alpha=ctx.scale)
        of_key = torch.baddbmm(_nothing(keys), of_scores.mT, queries, beta=0, alpha=ctx.scale)
        found = of_query, of_key, dropped.mT @ gradient
        return *(one.view(*heads, *one.shape[1:]) for one in found), None, None


def _nothing(like: Tensor) -> Tensor:
    """For ``baddbmm`` to add to."""
    return like.new_zeros((1, 1, 1))


@dataclass(frozen=True)
class _Places:
    """Which row of (N H, d) belongs to which of (B H T, d), and the other way around."""

    of_BHT: Tensor
    of_NH: Tensor
    padding_B1T1: Tensor

    @classmethod
    def of(cls, rows: Rows, heads: int) -> Self:
        length = rows.numbers_BT.shape[1]
        heads_H = torch.arange(heads, device=rows.slots_N.device)
        rows_N, turns_N = rows.slots_N // length, rows.slots_N % length
        of_NH = (rows_N[:, None] * heads + heads_H) * length + turns_N[:, None]
        return cls(rows.numbers_BT[:, None] * heads + heads_H[:, None], of_NH, rows.padding_BT[:, None, :, None])


def _padded(states_NHd: Tensor, places: _Places) -> Tensor:
    """(B, H, T, d). In padding stands what nobody looks at."""
    padded: Tensor = _Pad.apply(states_NHd, places)
    return padded


def _unpadded(states_BHTd: Tensor, places: _Places) -> Tensor:
    """(N, H, d)."""
    unpadded: Tensor = _Unpad.apply(states_BHTd, places)
    return unpadded


# Each is the other's backward pass. Autograd's own for indexing adds up place by place, as a number could come twice.
def _rows(states: Tensor, numbers: Tensor) -> Tensor:
    rows = states.reshape(-1, states.shape[-1]).index_select(0, numbers.flatten())
    return rows.view(*numbers.shape, states.shape[-1])


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_NHd: Tensor, places: _Places) -> Tensor:
        ctx.save_for_backward(places.of_NH)
        return _rows(states_NHd, places.of_BHT)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _rows(gradients[0], *ctx.saved_tensors), None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_BHTd: Tensor, places: _Places) -> Tensor:
        ctx.save_for_backward(places.of_BHT, places.padding_B1T1)
        return _rows(states_BHTd, places.of_NH)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        of_BHT, padding_B1T1 = ctx.saved_tensors
        # A photo's keys must not learn from queries that there are not.
        return _rows(gradients[0], of_BHT).masked_fill_(padding_B1T1, 0), None
