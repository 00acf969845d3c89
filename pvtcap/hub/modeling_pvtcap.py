"""An image captioner that pvtcap trained: PVT v2, a projection, and BLIP's text decoder. It needs no pvtcap.

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    model.caption(["photo.jpg", PIL.Image.open("other.png")], tokenizer)

Shapes: B batch, E encoder width, D decoder width, h w feature grid, P = h·w patches, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)


class PvtcapConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """``bert`` is BertConfig's; ``generation`` GenerationConfig's; ``prefix_ids`` begin every caption."""

    model_type = "pvtcap"

    def __init__(
        self,
        encoder: str = "pvt_v2_b1",
        encoder_stages: int = 4,
        encoder_width: int = 512,
        projection: str = "conv3x3",
        bert: dict[str, Any] | None = None,
        image_px: int = 384,
        image_mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        image_std: tuple[float, ...] = (0.229, 0.224, 0.225),
        prefix_ids: tuple[int, ...] = (),
        generation: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.encoder, self.encoder_stages, self.encoder_width = encoder, encoder_stages, encoder_width
        self.projection = projection
        self.bert = bert or {}
        self.image_px, self.image_mean, self.image_std = image_px, list(image_mean), list(image_std)
        self.prefix_ids = list(prefix_ids)
        self.generation = generation or {}
        self.tie_word_embeddings = True
        super().__init__(**kwargs)


class _Encoder(nn.Module):
    def __init__(self, config: PvtcapConfig) -> None:
        super().__init__()
        # transformers builds models without memory at first, which timm's constructor does not bear.
        with torch.device("cpu"):
            pvt: Any = timm.create_model(config.encoder, pretrained=False, num_classes=0)
        pvt.stages = pvt.stages[: config.encoder_stages]
        del pvt.head_drop, pvt.head
        self.pvt: Any = pvt

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        features: Tensor = self.pvt.stages(self.pvt.patch_embed(pixels_B3HW))
        return features


class _Projection(nn.Module):
    def __init__(self, kind: str, encoder_width: int, width: int) -> None:
        super().__init__()
        if kind == "conv3x3":
            self.net: nn.Module = nn.Conv2d(encoder_width, width, 3, padding=1)
        elif kind == "linear":
            self.net = nn.Conv2d(encoder_width, width, 1)
        else:
            self.net = nn.Sequential(nn.Conv2d(encoder_width, width, 1), nn.GELU(), nn.Conv2d(width, width, 1))

    def forward(self, features_BEhw: Tensor) -> Tensor:
        projected: Tensor = self.net(features_BEhw)
        return projected.flatten(2).transpose(1, 2)


class _Decoder(nn.Module):
    def __init__(self, bert: dict[str, Any]) -> None:
        super().__init__()
        config: Any = BertConfig(**{**bert, "attn_implementation": "sdpa"})
        self.lm: Any = BertLMHeadModel(config)


class PvtcapModel(PreTrainedModel):
    """Captions photos. ``caption`` does all of it; ``generate`` begins at pixels, ``forward`` gives logits."""

    config_class = PvtcapConfig
    main_input_name = "pixel_values"
    # BERT's head is its embedding table: in the file once.
    _tied_weights_keys = {  # noqa: RUF012  # transformers reads it off the class
        "decoder.lm.cls.predictions.decoder.weight": "decoder.lm.bert.embeddings.word_embeddings.weight",
        "decoder.lm.cls.predictions.decoder.bias": "decoder.lm.cls.predictions.bias",
    }

    def __init__(self, config: PvtcapConfig) -> None:
        super().__init__(config)
        self.encoder = _Encoder(config)
        self.projection = _Projection(config.projection, config.encoder_width, config.bert["hidden_size"])
        self.decoder = _Decoder(config.bert)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every weight comes from the file."""

    def patches(self, pixel_values: Tensor) -> Tensor:
        """Normalised photos (B, 3, H, W) → what the decoder attends to, (B, P, D)."""
        if pixel_values.shape[-1] % 32 or pixel_values.shape[-2] % 32:
            raise ValueError(f"the sides of pixel_values are multiples of 32, not {tuple(pixel_values.shape[-2:])}")
        patches: Tensor = self.projection(self.encoder(pixel_values.to(self.dtype)))
        return patches

    def forward(self, pixel_values: Tensor, input_ids: Tensor, **kwargs: Any) -> Any:
        """transformers' output of a decoder: ``logits`` (B, T, V), and the mean ``loss`` where labels are given."""
        return self.decoder.lm(input_ids=input_ids, encoder_hidden_states=self.patches(pixel_values), **kwargs)

    @torch.inference_mode()
    def generate(self, pixel_values: Tensor, **settings: Any) -> Any:
        """Token ids (B, T), prefix included; ``settings`` are GenerationConfig's, over those of the training."""
        patches = self.patches(pixel_values)
        prefix = torch.tensor([self.config.prefix_ids], device=patches.device).expand(len(patches), -1)
        wanted = GenerationConfig(  # type: ignore[no-untyped-call]
            **{"do_sample": False, **self.config.generation, **settings}
        )
        return self.decoder.lm.generate(
            prefix,
            attention_mask=torch.ones_like(prefix),
            encoder_hidden_states=patches,
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            generation_config=wanted,
        )

    def preprocess(self, images: Any) -> Tensor:
        """PIL images or paths → normalised pixels (B, 3, S, S): upright, over white, squeezed to a square."""
        return torch.stack([self._pixels(image) for image in images]).to(self.device)

    def caption(self, images: Any, tokenizer: Any, **settings: Any) -> list[str]:
        """One caption for each of a list of PIL images or paths."""
        rows = self.generate(self.preprocess(images), **settings).tolist()
        words = [row[len(self.config.prefix_ids) :] for row in rows]
        return [str(tokenizer.decode(row, skip_special_tokens=True)).replace(" ' ", "'") for row in words]

    def _shrink_on_load(self, image: Any) -> None:
        """As in the training: a large JPEG is read at a half, a quarter or an eighth of its size."""
        orientation = image.getexif().get(0x0112, 1)
        if image.format != "JPEG" or image.mode not in ("RGB", "L") or orientation in range(2, 9):
            return
        divisor = next((by for by in (8, 4, 2) if min(image.size) >= 1.5 * self.config.image_px * by), 1)
        image.draft(image.mode, tuple(-(-side // divisor) for side in image.size))

    def _pixels(self, image: Any) -> Tensor:
        if not isinstance(image, Image.Image):
            with Image.open(image) as opened:
                self._shrink_on_load(opened)
                opened.load()
                image = opened
        rgba = ImageOps.exif_transpose(image).convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        photo = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)[None]
        side = [self.config.image_px] * 2
        square = nn.functional.interpolate(photo, side, mode="bicubic", antialias=True)[0]
        mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (self.config.image_mean, self.config.image_std))
        return (square.float() - mean) / std
