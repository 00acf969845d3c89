"""Attention of packed tokens on a GPU, as Triton kernels: no padding, one kernel forward and two back.

torch's kernels want rows of one length and work in tiles of 128 queries or keys, while a photo has some 70 tokens of
five captions and 144 patches: much of a tile is padding, and with dropout their backward pass takes several times what
the memory needs (benchmarks/LOG.md). Here a program takes one head of 64 queries, or keys, of one photo.

What is computed is Dao, "FlashAttention-2", 2023: softmax as it goes, its sums kept for the backward pass, weights
computed again there, and so is what dropout does to them (``gpudropout``). Gradients are added up within one program,
in one order: the same bits each time.

Shapes: N tokens of B photos, M patches of all of them, H heads of width d.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from pvtcap import gpudropout
from pvtcap.gpudropout import kept, row_bits

# The quickest tiles for heads of 64 on one H200, of those with 16 to 128 queries and keys (benchmarks/LOG.md).
# Products fuse with the sums behind them; Triton 3.9 warns whoever does not ask for it, and later ones would not fuse.
FORWARD = {"num_queries": 64, "num_keys": 32, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
BACKWARD_QUERIES = {"num_queries": 64, "num_keys": 32, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
BACKWARD_KEYS = {"num_queries": 32, "num_keys": 64, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
LOG2E = tl.constexpr(1.4426950408889634)


def to_caption(
    states_N3Hd: Tensor, starts: Tensor, firsts_N: Tensor, own_B: Tensor, longest: int, dropout: float
) -> Tensor:
    """Each token to those from the first of its caption up to itself, and to what the row's captions share: (N, H, d).

    ``states_N3Hd`` are queries, keys and values; ``starts`` (B + 1, int32) the number of each row's first token, and N;
    ``firsts_N`` (int32) that of each token's caption; ``own_B`` (int32) that of each row's first token which is not
    shared; no row has more than ``longest`` tokens.
    """
    attended: Tensor = _ToCaption.apply(states_N3Hd, starts, firsts_N, own_B, longest, dropout)
    return attended


def to_photo(
    query_NHd: Tensor, states_M2Hd: Tensor, starts: Tensor, patch_starts: Tensor, longest: int, patches: int,
    dropout: float,
) -> Tensor:  # fmt: skip
    """Each token to all patches of its photo: (N, H, d).

    ``states_M2Hd`` are the patches' keys and values; ``patch_starts`` (B + 1, int32) the number of each photo's first,
    and M; no photo has more than ``longest`` tokens and ``patches``.
    """
    attended: Tensor = _ToPhoto.apply(query_NHd, states_M2Hd, starts, patch_starts, longest, patches, dropout)
    return attended


class _ToCaption(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, starts: Tensor, firsts: Tensor, own: Tensor, longest: int, dropout: float
    ) -> Tensor:
        ctx.longest, ctx.dropped = longest, gpudropout.dropped(dropout)
        states = states.contiguous()
        attended, *more = _attend(states, states, starts, starts, (firsts, own), longest, ctx.dropped)
        ctx.save_for_backward(states, starts, firsts, own, attended, *more)
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        states, starts, firsts, own, attended, sums_HN, seed = ctx.saved_tensors
        found, gradient, of_states = (attended, sums_HN, seed), gradients[0].contiguous(), torch.empty_like(states)
        longest, captions = (ctx.longest, ctx.longest), (firsts, own)
        _go_back(states, states, starts, starts, captions, longest, ctx.dropped, found, gradient, of_states, of_states)
        return of_states, *[None] * 5


class _ToPhoto(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, states: Tensor, starts: Tensor, patch_starts: Tensor, longest: int, patches: int,
        dropout: float,
    ) -> Tensor:  # fmt: skip
        ctx.longest, ctx.dropped = (longest, patches), gpudropout.dropped(dropout)
        query, states = query.contiguous(), states.contiguous()
        attended, *more = _attend(query, states, starts, patch_starts, None, longest, ctx.dropped)
        ctx.save_for_backward(query, states, starts, patch_starts, attended, *more)
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, states, starts, patch_starts, attended, sums_HN, seed = ctx.saved_tensors
        found, gradient = (attended, sums_HN, seed), gradients[0].contiguous()
        of_query, of_states = torch.empty_like(query), torch.empty_like(states)
        _go_back(
            query, states, starts, patch_starts, None, ctx.longest, ctx.dropped, found, gradient, of_query, of_states
        )
        return of_query, of_states, *[None] * 5


def _attend(
    queries: Tensor, keys: Tensor, starts: Tensor, key_starts: Tensor, captions: tuple[Tensor, Tensor] | None,
    longest: int, dropped: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the queries find, (N, H, d); the logarithms (of 2) of softmax's sums, (H, N); dropout's seed."""
    count, heads, width = len(queries), queries.shape[-2], queries.shape[-1]
    attended = queries.new_empty((count, heads, width))
    sums_HN = torch.empty((heads, count), dtype=torch.float32, device=queries.device)
    seed = gpudropout.seed(queries.device) if dropped else torch.empty_like(starts)
    blocks = -(-longest // FORWARD["num_queries"])
    _forward[(blocks * (len(starts) - 1) * heads,)](
        queries, keys, attended, sums_HN, starts, key_starts, *(captions or (starts, starts)), seed, count, blocks,
        heads, width, width**-0.5, captions is not None, dropped, **FORWARD,
    )  # fmt: skip
    return attended, sums_HN, seed


def _go_back(
    queries: Tensor, keys: Tensor, starts: Tensor, key_starts: Tensor, captions: tuple[Tensor, Tensor] | None,
    longest: tuple[int, int], dropped: int, found: tuple[Tensor, Tensor, Tensor], gradient: Tensor, of_queries: Tensor,
    of_keys: Tensor,
) -> None:  # fmt: skip
    """Fills ``of_queries`` and ``of_keys``, which lie as ``queries`` and ``keys`` do."""
    count, heads, width = gradient.shape
    attended, sums_HN, seed = found
    products_HN = torch.empty_like(sums_HN)
    some = captions or (starts, starts)
    how = heads, width, width**-0.5, captions is not None, dropped
    blocks = -(-longest[0] // BACKWARD_QUERIES["num_queries"])
    _backward_queries[(blocks * (len(starts) - 1) * heads,)](
        queries, keys, attended, gradient, of_queries, sums_HN, products_HN, starts, key_starts, *some, seed, count,
        blocks, *how, **BACKWARD_QUERIES,
    )  # fmt: skip
    blocks = -(-longest[1] // BACKWARD_KEYS["num_keys"])
    _backward_keys[(blocks * (len(starts) - 1) * heads,)](
        queries, keys, gradient, of_keys, sums_HN, products_HN, starts, key_starts, *some, seed, count, blocks, *how,
        **BACKWARD_KEYS,
    )  # fmt: skip


# Where rows lie: queries, keys and values of a caption's token one behind the other; a token's query alone, keys and
# values of a photo's patch one behind the other.
@triton.jit
def _query_places(m, head, d, heads: tl.constexpr, width: tl.constexpr, in_caption: tl.constexpr):  # type: ignore[no-untyped-def]
    parts: tl.constexpr = 3 if in_caption else 1
    return (m.to(tl.int64)[:, None] * (parts * heads) + head) * width + d[None, :]


@triton.jit
def _key_places(n, head, d, heads: tl.constexpr, width: tl.constexpr, in_caption: tl.constexpr):  # type: ignore[no-untyped-def]
    """The values' are ``heads * width`` behind them."""
    parts: tl.constexpr = 3 if in_caption else 2
    first: tl.constexpr = heads if in_caption else 0
    return (n.to(tl.int64)[:, None] * (parts * heads) + first + head) * width + d[None, :]


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    queries, keys, attended, sums, starts, key_starts, firsts, own, seed, count, blocks,
    heads: tl.constexpr, width: tl.constexpr, scale: tl.constexpr, in_caption: tl.constexpr, dropped: tl.constexpr,
    num_queries: tl.constexpr, num_keys: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks % heads
    row = tl.program_id(0) // blocks // heads
    end = tl.load(starts + row + 1)
    m_first = tl.load(starts + row) + block * num_queries
    if m_first >= end:
        return
    m = m_first + tl.arange(0, num_queries)
    d = tl.arange(0, width)
    shared_end = tl.load(own + row)
    q = tl.load(queries + _query_places(m, head, d, heads, width, in_caption), mask=m[:, None] < end, other=0.0)
    if in_caption:
        first = tl.load(firsts + m, mask=m < end, other=0)
        low, high = tl.load(starts + row), tl.minimum(m_first + num_queries, end)
    else:
        first = m
        low, high = tl.load(key_starts + row), tl.load(key_starts + row + 1)
    if dropped > 0:
        bits = row_bits(seed, m * heads + head)
    enlarged: tl.constexpr = 1 / (1 - dropped / 4294967296)  # those that stay
    top = tl.full([num_queries], float("-inf"), tl.float32)
    total = tl.zeros([num_queries], tl.float32)
    sum_of_values = tl.zeros([num_queries, width], tl.float32)
    for n_first in range(low, high, num_keys):
        n = n_first + tl.arange(0, num_keys)
        key_places = _key_places(n, head, d, heads, width, in_caption)
        k = tl.load(keys + key_places, mask=n[:, None] < high, other=0.0)
        v = tl.load(keys + key_places + heads * width, mask=n[:, None] < high, other=0.0)
        seen = n[None, :] < high
        if in_caption:
            of_caption = (n[None, :] >= first[:, None]) | (n[None, :] < shared_end)
            seen = seen & (n[None, :] <= m[:, None]) & of_caption
        scores = tl.where(seen, tl.dot(q, tl.trans(k)) * (scale * LOG2E), float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(highest == float("-inf"), 0.0, highest)  # of a query that has seen no key yet
        weights = tl.exp2(scores - finite[:, None])
        shrunk = tl.exp2(top - finite)
        total = total * shrunk + tl.sum(weights, 1)
        if dropped > 0:
            weights = tl.where(kept(bits[:, None], n[None, :], dropped), weights, 0.0)
        sum_of_values = tl.dot(weights.to(v.dtype), v, sum_of_values * shrunk[:, None])
        top = highest
    found = sum_of_values * (enlarged / total)[:, None]
    places = (m.to(tl.int64)[:, None] * heads + head) * width + d[None, :]
    tl.store(attended + places, found.to(q.dtype), mask=m[:, None] < end)
    tl.store(sums + head * count + m, top + tl.log2(total), mask=m < end)


@triton.jit
def _backward_queries(  # type: ignore[no-untyped-def]
    queries, keys, attended, gradient, of_queries, sums, products, starts, key_starts, firsts, own, seed, count, blocks,
    heads: tl.constexpr, width: tl.constexpr, scale: tl.constexpr, in_caption: tl.constexpr, dropped: tl.constexpr,
    num_queries: tl.constexpr, num_keys: tl.constexpr,
):  # fmt: skip
    """Also stores the products of outputs and their gradients, which ``_backward_keys`` needs."""
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks % heads
    row = tl.program_id(0) // blocks // heads
    end = tl.load(starts + row + 1)
    m_first = tl.load(starts + row) + block * num_queries
    if m_first >= end:
        return
    m = m_first + tl.arange(0, num_queries)
    d = tl.arange(0, width)
    shared_end = tl.load(own + row)
    places = (m.to(tl.int64)[:, None] * heads + head) * width + d[None, :]
    query_places = _query_places(m, head, d, heads, width, in_caption)
    q = tl.load(queries + query_places, mask=m[:, None] < end, other=0.0)
    do = tl.load(gradient + places, mask=m[:, None] < end, other=0.0)
    out = tl.load(attended + places, mask=m[:, None] < end, other=0.0)
    product = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(products + head * count + m, product, mask=m < end)
    log_sum = tl.load(sums + head * count + m, mask=m < end, other=0.0)
    if in_caption:
        first = tl.load(firsts + m, mask=m < end, other=0)
        low, high = tl.load(starts + row), tl.minimum(m_first + num_queries, end)
    else:
        first = m
        low, high = tl.load(key_starts + row), tl.load(key_starts + row + 1)
    if dropped > 0:
        bits = row_bits(seed, m * heads + head)
    enlarged: tl.constexpr = 1 / (1 - dropped / 4294967296)
    dq = tl.zeros([num_queries, width], tl.float32)
    for n_first in range(low, high, num_keys):
        n = n_first + tl.arange(0, num_keys)
        key_places = _key_places(n, head, d, heads, width, in_caption)
        k = tl.load(keys + key_places, mask=n[:, None] < high, other=0.0)
        v = tl.load(keys + key_places + heads * width, mask=n[:, None] < high, other=0.0)
        seen = n[None, :] < high
        if in_caption:
            of_caption = (n[None, :] >= first[:, None]) | (n[None, :] < shared_end)
            seen = seen & (n[None, :] <= m[:, None]) & of_caption
        weights = tl.where(seen, tl.exp2(tl.dot(q, tl.trans(k)) * (scale * LOG2E) - log_sum[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v))
        if dropped > 0:
            dp = tl.where(kept(bits[:, None], n[None, :], dropped), dp * enlarged, 0.0)
        dq = tl.dot((weights * (dp - product[:, None])).to(k.dtype), k, dq)
    tl.store(of_queries + query_places, (dq * scale).to(q.dtype), mask=m[:, None] < end)


@triton.jit
def _backward_keys(  # type: ignore[no-untyped-def]
    queries, keys, gradient, of_keys, sums, products, starts, key_starts, firsts, own, seed, count, blocks,
    heads: tl.constexpr, width: tl.constexpr, scale: tl.constexpr, in_caption: tl.constexpr, dropped: tl.constexpr,
    num_queries: tl.constexpr, num_keys: tl.constexpr,
):  # fmt: skip
    """Of keys and values."""
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks % heads
    row = tl.program_id(0) // blocks // heads
    key_end = tl.load(key_starts + row + 1)
    n_first = tl.load(key_starts + row) + block * num_keys
    if n_first >= key_end:
        return
    n = n_first + tl.arange(0, num_keys)
    d = tl.arange(0, width)
    shared_end = tl.load(own + row)
    key_places = _key_places(n, head, d, heads, width, in_caption)
    k = tl.load(keys + key_places, mask=n[:, None] < key_end, other=0.0)
    v = tl.load(keys + key_places + heads * width, mask=n[:, None] < key_end, other=0.0)
    end = tl.load(starts + row + 1)
    low = n_first if in_caption else tl.load(starts + row)
    enlarged: tl.constexpr = 1 / (1 - dropped / 4294967296)
    dk = tl.zeros([num_keys, width], tl.float32)
    dv = tl.zeros([num_keys, width], tl.float32)
    for m_first in range(low, end, num_queries):
        m = m_first + tl.arange(0, num_queries)
        places = (m.to(tl.int64)[:, None] * heads + head) * width + d[None, :]
        q = tl.load(queries + _query_places(m, head, d, heads, width, in_caption), mask=m[:, None] < end, other=0.0)
        do = tl.load(gradient + places, mask=m[:, None] < end, other=0.0)
        log_sum = tl.load(sums + head * count + m, mask=m < end, other=0.0)
        product = tl.load(products + head * count + m, mask=m < end, other=0.0)
        seen = (m[None, :] < end) & (n[:, None] < key_end)
        if in_caption:
            first = tl.load(firsts + m, mask=m < end, other=0)
            of_caption = (n[:, None] >= first[None, :]) | (n[:, None] < shared_end)
            seen = seen & (n[:, None] <= m[None, :]) & of_caption
        weights = tl.where(seen, tl.exp2(tl.dot(k, tl.trans(q)) * (scale * LOG2E) - log_sum[None, :]), 0.0)
        dp = tl.dot(v, tl.trans(do))
        kept_weights = weights
        if dropped > 0:
            stay = kept(row_bits(seed, m * heads + head)[None, :], n[:, None], dropped)
            kept_weights = tl.where(stay, weights * enlarged, 0.0)
            dp = tl.where(stay, dp * enlarged, 0.0)
        dv = tl.dot(kept_weights.to(do.dtype), do, dv)
        dk = tl.dot((weights * (dp - product[None, :])).to(q.dtype), q, dk)
    tl.store(of_keys + key_places, (dk * scale).to(k.dtype), mask=n[:, None] < key_end)
    tl.store(of_keys + key_places + heads * width, dv.to(v.dtype), mask=n[:, None] < key_end)
