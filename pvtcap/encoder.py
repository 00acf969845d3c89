"""The PVT v2 encoder (timm), headless: photos to a grid of features.

Shapes: B batch, H W image side in pixels, P = (H / stride)² patches, E encoder width.
Source: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", 2022; timm's ``pvt_v2_b0`` … ``b5``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn

from pvtcap import onednn
from pvtcap.errors import ConfigError, did_you_mean

_MOST_FEATURES = 2**30
_MOST_IN_CACHE = 1_600_000


class FeedForward(MlpWithDepthwiseConv):
    """timm's, but quicker where it is frozen on a CPU: in parts, with biases added and GELU taken on the way.

    Eight photos of 384 px are 150 MB of wide features at the first stage. Part by part, they stay in the cache, and the
    kernel has no new pages to make. For float32, and one bit or two away from timm's.
    """

    def forward(self, x_BND: Tensor, feat_size: list[int]) -> Tensor:
        """(B, N, D) → (B, N, D), N being the product of ``feat_size``."""
        if torch.is_grad_enabled() or not (onednn.suits(self.fc1.weight) and self._is_plain(x_BND)):
            found: Tensor = super().forward(x_BND, feat_size)
            return found
        height, width = feat_size
        out_BND = torch.empty_like(x_BND)
        for photos, top, bottom in _parts(len(x_BND), height, width * self.fc1.out_features):
            # The convolution looks one row up and down; at the photo's own edges it pads.
            first, last = max(top - 1, 0), min(bottom + 1, height)
            wide = onednn.linear(x_BND[photos, first * width : last * width], self.fc1.weight, self.fc1.bias)
            kept = self._convolved(wide, last - first, width)[:, top - first : bottom - first].flatten(1, 2)
            out_BND[photos, top * width : bottom * width] = onednn.linear(kept, self.fc2.weight, self.fc2.bias)
        return out_BND

    def _convolved(self, wide_BNW: Tensor, height: int, width: int) -> Tensor:
        """(B, height, width, W), after GELU."""
        return onednn.convolution_gelu(wide_BNW.view(len(wide_BNW), height, width, -1), self.dwconv)

    def _is_plain(self, x_BND: Tensor) -> bool:
        plain = x_BND.dtype == torch.float32 and not self.training
        return plain and isinstance(self.relu, nn.Identity) and type(self.act) is nn.GELU


def _parts(photos: int, height: int, row: int) -> Iterator[tuple[slice, int, int]]:
    """Photos that belong together, and the first and last row of theirs; ``row`` is how many numbers a row has."""
    rows = max(1, _MOST_IN_CACHE // row)
    together = max(1, rows // height)
    rows = -(-height // -(-height // rows))  # as even as can be
    for photo in range(0, photos, together):
        for top in range(0, height, rows):
            yield slice(photo, photo + together), top, min(top + rows, height)


class Encoder(nn.Module):
    """``stages`` 4 gives patches of 32 px, 3 of 16 px, 2 of 8 px. ``width`` is E, read from timm, never assumed."""

    def __init__(self, name: str, stages: int = 4) -> None:
        super().__init__()
        known = timm.list_models("pvt_v2_*")
        if name not in known:
            raise ConfigError(
                "not a PVT v2 encoder of timm",
                where="model.encoder",
                got=name,
                do=did_you_mean(name, known) or f"Known: {', '.join(known)}.",
            )
        self.name = name
        self.pvt: Any
        pvt: Any = timm.create_model(name, pretrained=False, num_classes=0)
        pvt.stages = pvt.stages[:stages]
        del pvt.head_drop, pvt.head
        for module in pvt.modules():
            if type(module) is MlpWithDepthwiseConv:
                module.__class__ = FeedForward
                # For torch's CPU kernels a single photo is no channels_last one by itself: it took twice the time.
                module.dwconv.to(memory_format=torch.channels_last)
        self.width: int = pvt.feature_info[stages - 1]["num_chs"]
        self.mean: Tensor
        self.std: Tensor
        mean, std = pvt.pretrained_cfg["mean"], pvt.pretrained_cfg["std"]
        self.pvt = pvt
        self._stands_for: str | None = None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, photos_B3HW: Tensor) -> Tensor:
        """uint8 photos (B, 3, H, W) → features (B, E, H / stride, W / stride), in the parameters' dtype."""
        assert self.pvt is not None, "photos for an encoder that stands aside for features"
        dtype = self.pvt.patch_embed.proj.weight.dtype
        normalised = (photos_B3HW.float() - self.mean) / self.std
        features: Tensor = self.pvt.stages(self.pvt.patch_embed(normalised.to(dtype)))
        return features

    @staticmethod
    def portions(photos_B3HW: Tensor) -> tuple[Tensor, ...]:
        """The photos in as few parts as ``forward`` should get them in, of one size if it can be.

        The first stage's widest features are up to 32 numbers a pixel of a photo. From 2^31 of them GPUs have no quick
        kernels (benchmarks/LOG.md), and half as many fill the device as well.
        """
        num_photos, _, height, width = photos_B3HW.shape
        most = max(1, _MOST_FEATURES // (32 * height * width))
        fewest = max(1, -(-num_photos // most))
        even = (parts for parts in range(fewest, 2 * fewest) if num_photos % parts == 0)
        return photos_B3HW.tensor_split(next(even, fewest))

    def fingerprint(self) -> str:
        """sha256 over names, shapes and float32 values: the identity of frozen weights that no checkpoint carries."""
        if self._stands_for is not None:
            return self._stands_for
        digest = hashlib.sha256()
        for name, value in sorted(self.pvt.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} ".encode())
            digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def stand_aside(self, sha256: str) -> None:
        """Drop the weights: features come in place of photos, made by an encoder with this fingerprint."""
        self.pvt, self._stands_for = None, sha256
