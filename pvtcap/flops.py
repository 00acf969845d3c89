"""Floating-point operations that a model needs for a step, and what a device could do: model FLOPs utilisation.

As in Chowdhery et al., "PaLM", 2022, appendix B: only what the mathematics asks for, not what is computed again
(activation checkpointing) or for nothing (padding); a product of (m, k) and (k, n) matrices is 2 m k n. With L layers
of width D and feed-forward width F, P patches of a photo, V pieces, E the encoder's width, a forward pass needs for

    a photo     the encoder, counted by torch; the projection 2 P E D (a 3 × 3 one: 9 times); keys and values of the
                patches 4 L P D²
    a token     L (8 D² + 4 D² + 4 D F + 4 P D): self-attention's matrices, cross-attention's queries and outputs,
                feed-forward, and the products with the patches' keys and values
    a label     2 D² + 2 D V: the head

Tokens are a caption's own, one less than it has labels, and once a photo what its captions share (``text``).

A backward pass costs as much again for gradients of inputs, where something before them trains, and again for those of
weights that train. Left out: products of a caption's tokens with each other (4 L D for each pair, less than 1 %).

Utilisation is that over the device's peak and the seconds of the step, waiting for data included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from pvtcap.config import Config
from pvtcap.encoder import Encoder

# Dense TFLOP/s in 16 bits, and in float32 without TF32: NVIDIA's data sheets. A name that contains another comes first.
_PEAKS = {
    "GB200": (2500.0, 80.0),
    "B200": (2250.0, 75.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10": (125.0, 31.2),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}


def peak_flops(config: Config, device_name: str) -> float | None:
    """FLOP/s of a device at best, in the precision of the run: ``train.device_peak_tflops``, or of a known GPU."""
    if config.train.device_peak_tflops is not None:
        return config.train.device_peak_tflops * 1e12
    for name, (in_16_bits, in_float32) in _PEAKS.items():
        if name in device_name:
            return 1e12 * (in_float32 if config.precision == "fp32" else in_16_bits)
    return None


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a forward and backward pass by what they are spent on; a photo's captions share ``prefix`` tokens."""

    photo: float
    token: float
    label: float
    prefix: int

    @classmethod
    def of(cls, config: Config, vocab_size: int, prefix: int, features: bool) -> Self:
        """``features``: photos come encoded."""
        model, learning = config.model, config.train.what.split("+")
        layers, width, wide = model.decoder_layers, model.decoder_width, model.decoder_feedforward
        encoder, encoder_width, patches = encoder_flops(config)
        encoder_trains = "encoder" in learning and not features
        decoder = 3 if "decoder" in learning else 2
        cross = 3 if {"decoder", "cross_attention"} & set(learning) else 2
        kernel = 9 if model.projection == "conv3x3" else 1
        projection = 2 * patches * kernel * encoder_width * width
        if model.projection == "mlp":
            projection += 2 * patches * width * width
        photo = (3 if encoder_trains else 1) * encoder * (not features)
        photo += (3 if encoder_trains else 2) * projection + cross * 4 * layers * patches * width**2
        own, attended = 8 * width**2 + 4 * width * wide, 3 * 4 * patches * width
        token = layers * (decoder * own + cross * 4 * width**2 + attended)
        return cls(photo, token, decoder * (2 * width**2 + 2 * width * vocab_size), prefix)

    def total(self, photos: float, captions: float, labels: float) -> float:
        """Of a step; ``labels`` are the tokens that are predicted, the last of a caption only that."""
        return self.photo * photos + self.token * (labels - captions + self.prefix * photos) + self.label * labels


def encoder_flops(config: Config) -> tuple[float, int, int]:
    """Of one photo's forward pass, counted on tensors without values; the encoder's width; patches a photo."""
    with torch.device("meta"):
        encoder = Encoder(config.model.encoder, config.model.encoder_stages)
        photo = torch.empty((1, 3, config.data.image_px, config.data.image_px), dtype=torch.uint8)
    with counter() as count, torch.no_grad():
        features = encoder(photo)
    return float(count.get_total_flops()), features.shape[1], features.shape[2] * features.shape[3]


def counter() -> FlopCounterMode:
    """torch's counter of operations, which by itself knows nothing of those that ``encoder.FeedForward`` joins."""
    formulas = {"_linear_pointwise": _linear_flops, "_convolution_pointwise": _convolution_flops}
    known = {getattr(torch.ops.mkldnn, name): of for name, of in formulas.items() if hasattr(torch.ops.mkldnn, name)}
    return FlopCounterMode(display=False, custom_mapping=known)


def _linear_flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    found: int = 2 * math.prod(x_shape) * weight_shape[0]
    return found


def _convolution_flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    found: int = conv_flop_count(x_shape, weight_shape, out_shape)
    return found
