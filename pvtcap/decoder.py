"""BLIP's text decoder: a BERT language model with cross-attention, over packed captions.

Shapes: B photos, N tokens of all captions, M of them with a label, P patches, D decoder width, H heads of width d, V
vocabulary; T tokens where captions are made.
Source: Li et al., "BLIP: Bootstrapping Language-Image Pre-training", 2022. transformers' ``BertLMHeadModel`` takes a
``BlipTextLMHeadModel`` state dict as it is, and has scaled-dot-product attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertLMHeadModel, GenerationConfig

from pvtcap import cpuloss, onednn
from pvtcap.bertlayers import (
    CACHE,
    AttentionOutput,
    CaptionAttention,
    FeedForwardOutput,
    Head,
    PhotoAttention,
    PhotoCache,
    ResidualNorm,
)
from pvtcap.config import EvaluateConfig, ModelConfig
from pvtcap.packing import Packed, has_kernels


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
            layer.attention.self.__class__ = CaptionAttention
            layer.crossattention.self.__class__ = PhotoAttention
            for output in (layer.attention.output, layer.crossattention.output):
                output.__class__, output.LayerNorm.__class__ = AttentionOutput, ResidualNorm
            layer.output.__class__, layer.output.LayerNorm.__class__ = FeedForwardOutput, ResidualNorm
        self.lm.cls.predictions.decoder.__class__ = Head
        onednn.quicken(self.lm)
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
            # One graph for all layers: they are alike, so what is compiled for the first serves the others.
            for layer in self.lm.bert.encoder.layer:
                layer.compile()
            self.lm.bert.embeddings.register_forward_hook(lambda *call: self._differs(call[-1], 1))
            self._losses = torch.compile(self._cross_entropies)

    def cross_attention_parameters(self) -> list[nn.Parameter]:
        layers = self.lm.bert.encoder.layer
        return [parameter for layer in layers for parameter in layer.crossattention.parameters()]

    def forward(self, patches_BPD: Tensor, packed: Packed) -> Tensor:
        """Sum, not mean, of the cross-entropies (nats, float32) of all M labelled tokens. Smoothed only in training."""
        rows = packed.rows
        self._differs(rows.slots_N, 0)
        self._differs(rows.firsts_N, 0)
        self._differs(rows.mask_B1TT, 2, 3)
        self._differs(rows.numbers_BT, 1)
        self._differs(rows.padding_BT, 1)
        words: dict[str, Tensor] = {"input_ids": packed.tokens_1N}
        weight_VD = self.lm.cls.predictions.decoder.weight  # of the words as well
        fused = onednn.suits(weight_VD) and not self._compiled
        if fused:
            rows_1ND, weight_VD = cpuloss.looked_up(packed.tokens_1N, weight_VD)
            words = {"inputs_embeds": rows_1ND}
        hidden_ND = self.lm.bert(
            **words,
            token_type_ids=torch.zeros_like(packed.tokens_1N),
            position_ids=packed.positions_1N,
            # Attention looks at ``rows`` instead. A mask of four dimensions keeps BERT from making one of N × N.
            attention_mask=rows.mask_B1TT,
            encoder_hidden_states=patches_BPD,
            use_cache=False,
            rows=rows,
        ).last_hidden_state[0]
        # The vocabulary is the widest matrix here: only tokens that have a label go through it.
        hidden_MD, labels_M = hidden_ND.index_select(0, packed.labelled_M), packed.labels_M
        self._differs(hidden_MD, 0)
        self._differs(labels_M, 0)
        if fused:
            head = self.lm.cls.predictions
            losses_M = cpuloss.cross_entropies(
                head.transform(hidden_MD), weight_VD, head.decoder.bias, labels_M, self._smoothing
            )
        else:
            losses_M = self._losses(hidden_MD, labels_M)
        self.row_losses_B = losses_M.new_zeros(len(patches_BPD)).index_add_(0, packed.row_of_label_M, losses_M.detach())
        return losses_M.sum()

    def _differs(self, tensor: Tensor, *dimensions: int) -> None:
        """From batch to batch: compile for any such size at once, and not anew for the second."""
        if self._compiled:
            torch._dynamo.maybe_mark_dynamic(tensor, dimensions)

    @property
    def _smoothing(self) -> float:
        return self.label_smoothing if self.training else 0.0

    def _cross_entropies(self, hidden_MD: Tensor, labels_M: Tensor) -> Tensor:
        """Cross-entropies (M, float32) of what follows these tokens."""
        logits_MV = self.lm.cls(hidden_MD)
        if has_kernels(logits_MV) and len(labels_M):
            from pvtcap import gpuloss

            return gpuloss.cross_entropies(logits_MV, labels_M, self.lm.config.vocab_size, self._smoothing)
        if self._smoothing:  # is spread over all pieces, and over none that only Head has
            logits_MV = logits_MV[:, : self.lm.config.vocab_size]
        return functional.cross_entropy(logits_MV.float(), labels_M, reduction="none", label_smoothing=self._smoothing)

    @torch.inference_mode()
    def generate(self, patches_BPD: Tensor, prefix: list[int], end_id: int, pad_id: int, how: EvaluateConfig) -> Tensor:
        """Token ids (B, at most ``how.max_length``), prefix included, padded with ``pad_id``.

        Beam search, greedy with one beam, or with ``how.top_p`` nucleus sampling (Holtzman et al., 2020) by torch's
        random state. What a photo's K beams share is computed once a photo: cross-attention's keys and values, and the
        prefix. Ends as soon as no beam of the batch can improve.
        """
        cache = PhotoCache([layer.crossattention.self.keys_values(patches_BPD) for layer in self.lm.bert.encoder.layer])
        cached = {CACHE: cache}
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
