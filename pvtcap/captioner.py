"""The whole model: frozen encoder, projection, decoder. Shapes as in those three files."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pvtcap.batch import Batch
from pvtcap.config import Config, EvaluateConfig
from pvtcap.decoder import Decoder
from pvtcap.encoder import Encoder
from pvtcap.packing import Packed
from pvtcap.projection import Projection
from pvtcap.text import CaptionTokenizer


class Captioner(nn.Module):
    """Built with new weights; ``weights`` fills them. ``train.what`` decides which parameters ask for gradients."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        torch.manual_seed(config.run.seed)
        model = config.model
        self.encoder = Encoder(model.encoder, model.encoder_stages)
        self.projection = Projection(model.projection, self.encoder.width, model.decoder_width)
        self.decoder = Decoder(model, vocab_size, config.optim.label_smoothing)
        self._freeze(config.train.what.split("+"))
        self.train()  # modules begin in training mode, a frozen encoder too

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropies of the batch's labels (nats): divide by a count of labels outside."""
        packed = Packed.of(batch)  # waits, so before all else
        return self.decoder(self.patches(batch.photos), packed)  # type: ignore[no-any-return]

    def patches(self, photos: Tensor) -> Tensor:
        """uint8 photos (B, 3, H, W), or float features of theirs (B, E, h, w) → what the decoder attends to, (B, P, D).

        Features are taken in the parameters' dtype, as the encoder would give them.
        """
        if photos.is_floating_point():
            features_BEhw = photos.to(next(self.projection.parameters()).dtype)
        else:
            with torch.set_grad_enabled(self.encoder_trains and torch.is_grad_enabled()):
                features_BEhw = torch.cat([self.encoder(some) for some in self.encoder.portions(photos)])
        return self.projection(features_BEhw)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def caption(self, photos: Tensor, tokenizer: CaptionTokenizer, how: EvaluateConfig) -> list[str]:
        """One caption a photo; ``photos`` as in ``patches``. The module must be whole (no ZeRO-3) and in eval mode."""
        return self.caption_patches(self.patches(photos), tokenizer, how)

    @torch.inference_mode()
    def caption_patches(self, patches_BPD: Tensor, tokenizer: CaptionTokenizer, how: EvaluateConfig) -> list[str]:
        """``caption`` from what ``patches`` gave."""
        rows = self.decoder.generate(patches_BPD, tokenizer.prefix, tokenizer.end_id, tokenizer.pad_id, how)
        return [tokenizer.decode(row) for row in rows.tolist()]

    def cast(self, precision: str) -> Captioner:
        """Parameters in fp32, bf16 or fp16; photos are still normalised in float32."""
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def train(self, mode: bool = True) -> Captioner:
        """A frozen encoder stays in eval mode: it must give the same features in training as in evaluation."""
        super().train(mode)
        self.encoder.train(mode and self.encoder_trains)
        return self

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name; a shared one (BERT's tied embedding) once."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def _freeze(self, learning: list[str]) -> None:
        self.encoder_trains = "encoder" in learning
        self.encoder.requires_grad_(self.encoder_trains)
        if "decoder" not in learning:
            self.decoder.requires_grad_(False)
        if "cross_attention" in learning:
            for parameter in self.decoder.cross_attention_parameters():
                parameter.requires_grad_(True)
