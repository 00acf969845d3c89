"""BLIP's text decoder: a BERT language model with cross-attention, over packed rows of captions.

Shapes: B batch, T packed tokens, P patches, D decoder width, N = tokens with a label, V vocabulary.
Source: Li et al., "BLIP: Bootstrapping Language-Image Pre-training", 2022. transformers' ``BertLMHeadModel`` takes a
``BlipTextLMHeadModel`` state dict as it is, and has scaled-dot-product attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertLMHeadModel, DynamicCache, EncoderDecoderCache, GenerationConfig

from pvtcap.config import EvaluateConfig, ModelConfig
from pvtcap.text import IGNORE


class Decoder(nn.Module):
    """Width and depth from ``config``; ``vocab_size`` counts [DEC] and [ENC]."""

    def __init__(self, config: ModelConfig, vocab_size: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
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
        # BLIP's decoder has no token types. BERT's two would be a constant added to every token.
        types = self.lm.bert.embeddings.token_type_embeddings
        nn.init.zeros_(types.weight)
        types.weight.requires_grad_(False)

    def cross_attention_parameters(self) -> list[nn.Parameter]:
        layers = self.lm.bert.encoder.layer
        return [parameter for layer in layers for parameter in layer.crossattention.parameters()]

    def forward(
        self, patches_BPD: Tensor, tokens_BT: Tensor, labels_BT: Tensor, positions_BT: Tensor, segments_BT: Tensor
    ) -> Tensor:
        """Sum, not mean, of the cross-entropies (nats, float32) of all N labelled tokens. Smoothed only in training."""
        hidden_BTD = self.lm.bert(
            input_ids=tokens_BT,
            attention_mask=packed_mask(segments_BT),
            position_ids=positions_BT,
            encoder_hidden_states=patches_BPD,
            use_cache=False,
        ).last_hidden_state
        labelled_BT = labels_BT != IGNORE
        # The vocabulary is the widest matrix here: only rows that have a label go through it.
        logits_NV = self.lm.cls(hidden_BTD[labelled_BT])
        return functional.cross_entropy(
            logits_NV.float(),
            labels_BT[labelled_BT],
            reduction="sum",
            label_smoothing=self.label_smoothing if self.training else 0.0,
        )

    @torch.inference_mode()
    def generate(self, patches_BPD: Tensor, prefix: list[int], end_id: int, pad_id: int, how: EvaluateConfig) -> Tensor:
        """Beam search → token ids (B, at most ``how.max_length``), prefix included, padded with ``pad_id``."""
        prefix_BT = torch.tensor([prefix], device=patches_BPD.device).expand(len(patches_BPD), -1)
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            num_beams=how.num_beams,
            max_length=how.max_length,
            min_length=how.min_length,
            repetition_penalty=how.repetition_penalty,
            do_sample=False,
            bos_token_id=prefix[0],
            eos_token_id=end_id,
            pad_token_id=pad_id,
        )
        generated: Tensor = self.lm.generate(
            prefix_BT,
            attention_mask=torch.ones_like(prefix_BT),
            encoder_hidden_states=patches_BPD,
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            generation_config=settings,
        )
        return generated


def packed_mask(segments_BT: Tensor) -> Tensor:
    """True (B, 1, T, T) where a token may look: at itself and before it, within its own caption.

    Padding has a segment of its own and so always sees itself: a row without any True would make attention NaN.
    """
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    length = segments_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
    return (same_BTT & causal_TT)[:, None]
