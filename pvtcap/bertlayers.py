"""BERT's layers as pvtcap's decoder has them: for packed captions, for generation, and for what is quick on a GPU.

Each takes the place of transformers' own class in a model that is there, and keeps its parameters.

Shapes: N tokens of B photos, P patches of a photo, D width, H heads of width d, M tokens with a label, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, EncoderDecoderCache
from transformers.models.bert.modeling_bert import (
    BertCrossAttention,
    BertModel,
    BertOutput,
    BertSelfAttention,
    BertSelfOutput,
)

from pvtcap.onednn import Linear
from pvtcap.packing import Rows, attend_to_caption, attend_to_photo, draws_masks, dropout_mask, has_kernels

# transformers 5.24 changed its name.
CACHE = "cache" if "cache" in inspect.signature(BertModel.forward).parameters else "past_key_values"


class PhotoCache(EncoderDecoderCache):
    """Self-attention's keys and values of each beam, cross-attention's of each photo: (B, heads, P, head width)."""

    def __init__(self, photos: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__(DynamicCache(), DynamicCache())
        self.photos = photos

    def reorder_cache(self, beam_idx: Any) -> None:
        """Beams change places within their photo, so what belongs to the photo stays."""
        self.self_attention_cache.reorder_cache(beam_idx)


class CaptionAttention(BertSelfAttention):
    """BERT's self-attention; of packed tokens (1, N, D), each to its own caption and what that shares."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        rows: Rows | None = kwargs.pop("rows", None)
        if rows is None:
            attended: tuple[Tensor, Tensor | None] = super().forward(hidden_states, *args, **kwargs)
            return attended
        return self._to_captions(hidden_states[0], rows, self.dropout.p * self.training).view(hidden_states.shape), None

    def _to_captions(self, hidden_ND: Tensor, rows: Rows, dropout: float) -> Tensor:
        heads = self.num_attention_heads, self.attention_head_size
        linears = self.query, self.key, self.value
        if not has_kernels(hidden_ND, heads[1]):
            query, key, value = (linear(hidden_ND).view(-1, *heads) for linear in linears)
            return attend_to_caption(query, key, value, rows, dropout).flatten(1)
        from pvtcap import gpuattention

        states_N3Hd = _joined(hidden_ND, *linears).view(-1, 3, *heads)
        return gpuattention.to_caption(
            states_N3Hd, rows.starts, rows.firsts_N, rows.own_B, rows.mask_B1TT.shape[-1], dropout
        ).flatten(1)


class PhotoAttention(BertCrossAttention):
    """BERT's cross-attention; of packed tokens, each to its own photo.

    From a ``PhotoCache``, a photo's beams are so many more queries to its row of keys.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        rows: Rows | None = kwargs.pop("rows", None)
        if rows is not None:
            patches, dropout = kwargs["encoder_hidden_states"], self.dropout.p * self.training
            return self._to_photos(hidden_states[0], patches, rows, dropout).view(hidden_states.shape), None
        cache = kwargs.get(CACHE)
        if not isinstance(cache, PhotoCache):
            attended: tuple[Tensor, Tensor | None] = super().forward(hidden_states, *args, **kwargs)
            return attended
        assert self.layer_idx is not None, "BERT numbers its layers"
        keys_BHPd, values_BHPd = cache.photos[self.layer_idx]
        queries_BHQd = self._heads(self.query(hidden_states).view(len(keys_BHPd), -1, hidden_states.shape[-1]))
        context_BHQd = functional.scaled_dot_product_attention(queries_BHQd, keys_BHPd, values_BHPd)
        return context_BHQd.transpose(1, 2).reshape(hidden_states.shape), None

    def _to_photos(self, hidden_ND: Tensor, patches_BPD: Tensor, rows: Rows, dropout: float) -> Tensor:
        heads, photos = (self.num_attention_heads, self.attention_head_size), patches_BPD.shape[:2]
        query_NHd = self.query(hidden_ND).view(-1, *heads)
        if not has_kernels(hidden_ND, heads[1]):
            key, value = (linear(patches_BPD).view(*photos, *heads) for linear in (self.key, self.value))
            return attend_to_photo(query_NHd, key, value, rows, dropout).flatten(1)
        from pvtcap import gpuattention

        states_M2Hd = _joined(patches_BPD.flatten(0, 1), self.key, self.value).view(-1, 2, *heads)
        starts = torch.arange(len(rows.starts), dtype=torch.int32, device=rows.starts.device) * photos[1]
        longest = rows.mask_B1TT.shape[-1]
        return gpuattention.to_photo(query_NHd, states_M2Hd, rows.starts, starts, longest, photos[1], dropout).flatten(
            1
        )

    def keys_values(self, patches_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """(B, heads, P, head width) each."""
        return self._heads(self.key(patches_BPD)), self._heads(self.value(patches_BPD))

    def _heads(self, states_BTD: Tensor) -> Tensor:
        batch, length, _ = states_BTD.shape
        split = states_BTD.view(batch, length, self.num_attention_heads, self.attention_head_size)
        return split.transpose(1, 2).contiguous()


class ResidualNorm(nn.LayerNorm):
    """``LayerNorm(dropout(branch) + residual)``; on a GPU one kernel of ours."""

    def forward(self, branch: Tensor, residual: Tensor, dropout: float) -> Tensor:  # type: ignore[override]
        if has_kernels(branch) and branch.dtype == residual.dtype == self.weight.dtype:
            from pvtcap import gpuresidual

            return gpuresidual.add_and_norm(branch, residual, self, dropout)
        if draws_masks(branch, dropout):
            return super().forward(torch.addcmul(residual, branch, dropout_mask(branch, dropout)))
        return super().forward(functional.dropout(branch, dropout) + residual)


class AttentionOutput(BertSelfOutput):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(hidden_states), input_tensor, self.dropout.p * self.training)  # type: ignore[no-any-return]


class FeedForwardOutput(BertOutput):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(hidden_states), input_tensor, self.dropout.p * self.training)  # type: ignore[no-any-return]


def _joined(states_MD: Tensor, *linears: nn.Linear) -> Tensor:
    """What all give, side by side: one product, and one of gradients, with nothing to add up behind it."""
    weights: list[Tensor] = [one.weight for one in linears]
    if any(hasattr(one, "ds_id") for one in weights):  # ZeRO-3 gathers a module's weights when it is called
        return torch.cat([linear(states_MD) for linear in linears], 1)
    return functional.linear(states_MD, torch.cat(weights), torch.cat([one.bias for one in linears]))


class Head(Linear):
    """The product with the vocabulary; in training on a GPU in 16 bits, one with a few pieces more.

    GPUs read 16 bytes at a time where each row begins at a multiple of 16 bytes, and BERT's 30,522 or BLIP's 30,524
    pieces do not: such a product takes three times as long (benchmarks/LOG.md). The pieces that are put in have weights
    of 0 and a logit that leaves them a probability of 0, so neither losses nor gradients know of them.
    """

    MULTIPLE, NEVER = 8, -1e4  # float16 holds it

    def forward(self, hidden_MD: Tensor) -> Tensor:
        """(M, V); as said, in training some columns more."""
        if self.training and hidden_MD.is_cuda and hidden_MD.element_size() == 2:
            return self.widened(hidden_MD)
        return super().forward(hidden_MD)

    def widened(self, hidden_MD: Tensor) -> Tensor:
        """(M, V rounded up to a multiple of 8)."""
        more = -self.out_features % self.MULTIPLE
        weight_WD = functional.pad(self.weight, (0, 0, 0, more))
        return functional.linear(hidden_MD, weight_WD, functional.pad(self.bias, (0, more), value=self.NEVER))
