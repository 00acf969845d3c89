"""Encoder features to the decoder's width.

Shapes: B batch, E encoder width, D decoder width, h w feature grid, P = h·w patches.
"""

from __future__ import annotations

from torch import Tensor, nn


class Projection(nn.Module):
    """``conv3x3`` lets a patch see its neighbours (3,539,712 parameters, 512 to 768); ``linear`` and ``mlp`` do not."""

    def __init__(self, kind: str, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.net: nn.Module
        if kind == "conv3x3":
            self.net = nn.Conv2d(encoder_width, decoder_width, kernel_size=3, padding=1)
        elif kind == "linear":
            self.net = nn.Conv2d(encoder_width, decoder_width, kernel_size=1)
        else:
            assert kind == "mlp", "config.ModelConfig lists the kinds"
            self.net = nn.Sequential(
                nn.Conv2d(encoder_width, decoder_width, kernel_size=1),
                nn.GELU(),
                nn.Conv2d(decoder_width, decoder_width, kernel_size=1),
            )

    def forward(self, features_BEhw: Tensor) -> Tensor:
        """(B, E, h, w) → (B, P, D)."""
        projected: Tensor = self.net(features_BEhw)
        return projected.flatten(2).transpose(1, 2)
