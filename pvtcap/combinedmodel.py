"""A blip_pvt_combined.pth as three modules, for scripts that were written around such a file.

    pvt, blip, projection = pvtcap.load_combined_model("blip_pvt_combined.pth")
    features = pvt.forward_features(pixels)            # timm's model: (B, E, h, w)
    ids = blip.generate(projection(features))          # (B, T) token ids, [DEC] first

What the file does not say, its shapes do: which PVT v2, how wide and deep the decoder is, what kind of projection. Only
the number of attention heads leaves no trace; BERT's have 64 numbers each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pvtcap import weights
from pvtcap.config import EvaluateConfig, ModelConfig
from pvtcap.decoder import Decoder
from pvtcap.encoder import Encoder
from pvtcap.errors import CheckpointError
from pvtcap.projection import Projection
from pvtcap.weightfiles import read_tensors
from pvtcap.weightnames import decoder_names, encoder_names, projection_names

_HEAD_WIDTH = 64
# BLIP's: [DEC] behind BERT's 30,522 pieces, [SEP], [PAD].
_BEGIN, _END, _PAD = 30522, 102, 0


class CombinedBlip(nn.Module):
    """BLIP without its vision: ``text_decoder`` is a BertLMHeadModel, ``generate`` begins at projected features."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self._decoder = decoder

    @property
    def text_decoder(self) -> Any:
        return self._decoder.lm

    def forward(self, encoder_hidden_states: Tensor, input_ids: Tensor, **kwargs: Any) -> Any:
        """transformers' output of a decoder: ``logits`` (B, T, V)."""
        return self.text_decoder(input_ids=input_ids, encoder_hidden_states=encoder_hidden_states, **kwargs)

    def generate(
        self,
        encoder_hidden_states: Tensor,
        input_ids: Tensor | None = None,
        *,
        bos_token_id: int = _BEGIN,
        eos_token_id: int = _END,
        pad_token_id: int = _PAD,
        **search: Any,
    ) -> Tensor:
        """Token ids (B, T) for patches (B, P, D). ``input_ids`` is a prompt of one row, (T,) or (1, T), [DEC] included.

        ``search`` are num_beams, max_length, min_length, repetition_penalty; unset ones are pvtcap's defaults.
        """
        prefix = [bos_token_id] if input_ids is None else [int(token) for token in input_ids.flatten()]
        how = EvaluateConfig(**search)
        return self._decoder.generate(encoder_hidden_states, prefix, eos_token_id, pad_token_id, how)


def load_combined_model(
    path: str | Path, device: str | torch.device = "cpu", *, heads: int | None = None
) -> tuple[Any, CombinedBlip, Projection]:
    """(pvt, blip, projection) in eval mode. ``heads``: the decoder's attention heads, if not one for 64 of its width.

    ``pvt`` is timm's model without a classifier: ``pvt.forward_features(pixels)`` takes normalised photos (B, 3, H, W).
    ``projection`` turns its (B, E, h, w) into (B, P, D). Raises CheckpointError when a part is missing or of no known
    shape.
    """
    path = Path(path)
    pvt = _pvt(path)
    projection = _projection(path)
    decoder = _decoder(path, heads)
    modules = [module.to(device).eval() for module in (pvt, CombinedBlip(decoder), projection)]
    return tuple(modules)  # type: ignore[return-value]  # three of these kinds


def _pvt(path: Path) -> Any:
    state = encoder_names(read_tensors(path, "pvt"), 4, path).state
    stages = len({name.split(".")[1] for name in state if name.startswith("stages.")})
    shapes = {name: value.shape for name, value in state.items()}
    for name in timm.list_models("pvt_v2_*"):
        with torch.device("meta"):
            candidate = Encoder(name, max(stages, 1)).pvt
        if {key: value.shape for key, value in candidate.state_dict().items()} == shapes:
            pvt: Any = timm.create_model(name, pretrained=False, num_classes=0)
            pvt.stages = pvt.stages[:stages]
            weights.fill(pvt, state, path)
            return pvt
    raise CheckpointError("no PVT v2 that timm knows", where=path, got=f"{len(state)} tensors in 'pvt'")


def _projection(path: Path) -> Projection:
    state = projection_names(read_tensors(path, "projection"), path).state
    first = next(iter(state.values()))
    kind = "mlp" if len(state) > 2 else "conv3x3" if first.shape[-1] == 3 else "linear"
    projection = Projection(kind, first.shape[1], first.shape[0])
    weights.fill(projection.net, state, path)
    return projection


def _decoder(path: Path, heads: int | None) -> Decoder:
    state = decoder_names(read_tensors(path, "blip"), path).state
    vocab_size, width = state["bert.embeddings.word_embeddings.weight"].shape
    if heads is None and width % _HEAD_WIDTH:
        raise CheckpointError("how many attention heads?", where=path, got=f"width {width}", do="Say heads=….")
    config = ModelConfig(
        decoder_layers=len({name.split(".")[3] for name in state if name.startswith("bert.encoder.layer.")}),
        decoder_width=width,
        decoder_heads=heads or width // _HEAD_WIDTH,
        decoder_feedforward=len(state["bert.encoder.layer.0.intermediate.dense.bias"]),
        decoder_positions=len(state["bert.embeddings.position_embeddings.weight"]),
    )
    decoder = Decoder(config, vocab_size)
    weights.fill_decoder(decoder, state, path)
    return decoder
