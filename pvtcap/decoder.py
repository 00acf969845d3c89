"""BLIP's text decoder: a BERT language model with cross-attention, over packed rows of captions.

Shapes: B batch, T packed tokens, P patches, D decoder width, H heads of width d, N = tokens with a label, V vocabulary.
Source: Li et al., "BLIP: Bootstrapping Language-Image Pre-training", 2022. transformers' ``BertLMHeadModel`` takes a
``BlipTextLMHeadModel`` state dict as it is, and has scaled-dot-product attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertLMHeadModel, DynamicCache, EncoderDecoderCache, GenerationConfig
from transformers.models.bert.modeling_bert import BertCrossAttention, BertModel

from pvtcap.config import EvaluateConfig, ModelConfig
from pvtcap.text import IGNORE

# transformers 5.24 changed its name.
_CACHE = "cache" if "cache" in inspect.signature(BertModel.forward).parameters else "past_key_values"


class Decoder(nn.Module):
    """Width and depth from ``config``; ``vocab_size`` counts [DEC] and [ENC]."""

    def __init__(self, config: ModelConfig, vocab_size: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self._compiled = False
        self._losses: Callable[[Tensor, Tensor], Tensor] = self._cross_entropies
        self.row_losses_B = torch.zeros(0)  # of the last forward pass: which photos cost how much
        bert_config: Any = BertConfig(  # type: ignore[call-arg]  # takes any setting
            vocab_size=vocab_size,
            hidden_size=config.decoder_width,
            num_hidden_layers=config.decoder_layers,
            num_attention_heads=config.decoder_heads,
            intermediate_size=config.decoder_feedforward,
            max_position_embeddings=config.decoder_positions,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            layer_norm_eps=1e-12,
            is_decoder=True,
            add_cross_attention=True,
            attn_implementation="sdpa",
        )
        self.lm: Any
        self.lm = BertLMHeadModel(bert_config)
        for layer in self.lm.bert.encoder.layer:
            # Another forward for the same parameters: a module made anew would draw other random weights.
            layer.crossattention.self.__class__ = _PhotoAttention
        self.lm.cls.predictions.decoder.__class__ = Head
        # BLIP's decoder has no token types. BERT's two would be a constant added to every token.
        types = self.lm.bert.embeddings.token_type_embeddings
        nn.init.zeros_(types.weight)
        types.weight.requires_grad_(False)

    def prepare_training(self, *, checkpointing: bool, compiled: bool) -> None:
        """Trade time for memory, or the first steps' time for that of all others; neither changes parameters' names."""
        if checkpointing:
            # transformers 5 changed its name on the way, and v6 takes the first away.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            enable = next(getattr(self.lm, name) for name in names if hasattr(self.lm, name))
            enable({"use_reentrant": False})
        self._compiled = compiled
        if compiled:
            self.lm.bert.compile()
            self._losses = torch.compile(self._cross_entropies)

    def cross_attention_parameters(self) -> list[nn.Parameter]:
        layers = self.lm.bert.encoder.layer
        return [parameter for layer in layers for parameter in layer.crossattention.parameters()]

    def forward(
        self, patches_BPD: Tensor, tokens_BT: Tensor, labels_BT: Tensor, positions_BT: Tensor, segments_BT: Tensor
    ) -> Tensor:
        """Sum, not mean, of the cross-entropies (nats, float32) of all N labelled tokens. Smoothed only in training."""
        mask_B1TT = packed_mask(segments_BT)
        self._differs(tokens_BT, 1)
        self._differs(positions_BT, 1)
        self._differs(mask_B1TT, 2, 3)
        hidden_BTD = self.lm.bert(
            input_ids=tokens_BT,
            attention_mask=mask_B1TT,
            position_ids=positions_BT,
            encoder_hidden_states=patches_BPD,
            use_cache=False,
        ).last_hidden_state
        labelled_BT = labels_BT != IGNORE
        # The vocabulary is the widest matrix here: only rows that have a label go through it.
        rows_N, places_N = labelled_BT.nonzero(as_tuple=True)
        hidden_ND, labels_N = hidden_BTD[rows_N, places_N], labels_BT[rows_N, places_N]
        self._differs(hidden_ND, 0)
        self._differs(labels_N, 0)
        losses_N = self._losses(hidden_ND, labels_N)
        self.row_losses_B = losses_N.new_zeros(len(labels_BT)).index_add_(0, rows_N, losses_N.detach())
        return losses_N.sum()

    def _differs(self, tensor: Tensor, *dimensions: int) -> None:
        """From batch to batch: compile for any such size at once, and not anew for the second."""
        if self._compiled:
            torch._dynamo.maybe_mark_dynamic(tensor, dimensions)

    def _cross_entropies(self, hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
        """Cross-entropies (N, float32) of what follows these tokens."""
        logits_NV = self.lm.cls(hidden_ND)
        smoothing = self.label_smoothing if self.training else 0.0
        if smoothing:  # is spread over all pieces, and over none that only Head has
            logits_NV = logits_NV[:, : self.lm.config.vocab_size]
        return functional.cross_entropy(logits_NV.float(), labels_N, reduction="none", label_smoothing=smoothing)

    @torch.inference_mode()
    def generate(self, patches_BPD: Tensor, prefix: list[int], end_id: int, pad_id: int, how: EvaluateConfig) -> Tensor:
        """Token ids (B, at most ``how.max_length``), prefix included, padded with ``pad_id``.

        Beam search, greedy with one beam, or with ``how.top_p`` nucleus sampling (Holtzman et al., 2020) by torch's
        random state. What a photo's K beams share is computed once a photo: cross-attention's keys and values, and the
        prefix. Ends as soon as no beam of the batch can improve.
        """
        cache = _PhotoCache(
            [layer.crossattention.self.keys_values(patches_BPD) for layer in self.lm.bert.encoder.layer]
        )
        cached = {_CACHE: cache}
        prefix_BT = torch.tensor([prefix], device=patches_BPD.device).expand(len(patches_BPD), -1)
        # Nobody reads them, as the cache has what they give; but without any, BERT skips its cross-attention.
        some_B1D = patches_BPD[:, :1]
        if len(prefix) > 1:
            self.lm.bert(input_ids=prefix_BT[:, :-1], encoder_hidden_states=some_B1D, **cached)
            cache.self_attention_cache.batch_repeat_interleave(how.num_beams)
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            num_beams=how.num_beams,
            max_length=how.max_length,
            min_length=how.min_length,
            repetition_penalty=how.repetition_penalty,
            do_sample=how.top_p is not None,
            bos_token_id=prefix[0],
            eos_token_id=end_id,
            pad_token_id=pad_id,
            **({} if how.top_p is None else {"top_p": how.top_p, "top_k": 0}),
        )
        generated: Tensor = self.lm.generate(
            prefix_BT,
            attention_mask=torch.ones_like(prefix_BT),
            encoder_hidden_states=some_B1D,
            generation_config=settings,
            **cached,
        )
        return generated

    @torch.inference_mode()
    def photo_attention(self, patches_BPD: Tensor, tokens_BT: Tensor) -> Tensor:
        """How much a token looks at each patch: (B, T, P), float32, mean over layers and heads; rows sum to 1."""
        self.lm.set_attn_implementation("eager")  # sdpa does not tell
        try:
            outputs = self.lm.bert(
                input_ids=tokens_BT, encoder_hidden_states=patches_BPD, use_cache=False, output_attentions=True
            )
        finally:
            self.lm.set_attn_implementation("sdpa")
        weights_LBHTP = torch.stack(outputs.cross_attentions)
        return weights_LBHTP.float().mean(dim=(0, 2))


class _PhotoCache(EncoderDecoderCache):
    """Self-attention's keys and values of each beam, cross-attention's of each photo: (B, heads, P, head width)."""

    def __init__(self, photos: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__(DynamicCache(), DynamicCache())
        self.photos = photos

    def reorder_cache(self, beam_idx: Any) -> None:
        """Beams change places within their photo, so what belongs to the photo stays."""
        self.self_attention_cache.reorder_cache(beam_idx)


class _PhotoAttention(BertCrossAttention):
    """BERT's cross-attention; from a ``_PhotoCache``, a photo's beams are so many more queries to its row of keys."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        cache = kwargs.get(_CACHE)
        if not isinstance(cache, _PhotoCache):
            attended: tuple[Tensor, Tensor | None] = super().forward(hidden_states, *args, **kwargs)
            return attended
        assert self.layer_idx is not None, "BERT numbers its layers"
        keys_BHPd, values_BHPd = cache.photos[self.layer_idx]
        queries_BHQd = self._heads(self.query(hidden_states).view(len(keys_BHPd), -1, hidden_states.shape[-1]))
        context_BHQd = functional.scaled_dot_product_attention(queries_BHQd, keys_BHPd, values_BHPd)
        return context_BHQd.transpose(1, 2).reshape(hidden_states.shape), None

    def keys_values(self, patches_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """(B, heads, P, head width) each."""
        return self._heads(self.key(patches_BPD)), self._heads(self.value(patches_BPD))

    def _heads(self, states_BTD: Tensor) -> Tensor:
        batch, length, _ = states_BTD.shape
        split = states_BTD.view(batch, length, self.num_attention_heads, self.attention_head_size)
        return split.transpose(1, 2).contiguous()


class Head(nn.Linear):
    """The product with the vocabulary; in training on a GPU in 16 bits, one with a few pieces more.

    GPUs read 16 bytes at a time where each row begins at a multiple of 16 bytes, and BERT's 30,522 or BLIP's 30,524
    pieces do not: such a product takes three times as long (benchmarks/LOG.md). The pieces that are put in have weights
    of 0 and a logit that leaves them a probability of 0, so neither losses nor gradients know of them.
    """

    MULTIPLE, NEVER = 8, -1e4  # float16 holds it

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """(N, V); as said, in training some columns more."""
        if self.training and hidden_ND.is_cuda and hidden_ND.element_size() == 2:
            return self.widened(hidden_ND)
        return super().forward(hidden_ND)

    def widened(self, hidden_ND: Tensor) -> Tensor:
        """(N, V rounded up to a multiple of 8)."""
        more = -self.out_features % self.MULTIPLE
        weight_WD = functional.pad(self.weight, (0, 0, 0, more))
        return functional.linear(hidden_ND, weight_WD, functional.pad(self.bias, (0, more), value=self.NEVER))


def packed_mask(segments_BT: Tensor) -> Tensor:
    """True (B, 1, T, T) where a token may look: at itself and before it, within its own caption.

    Padding has a segment of its own and so always sees itself: a row without any True would make attention NaN.
    """
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    length = segments_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
    return (same_BTT & causal_TT)[:, None]
