"""pytest tests/test_generation.py: the captions that BLIP itself generates, computed once a photo, not once a beam."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import BlipConfig, BlipForConditionalGeneration

from pvtcap.config import EvaluateConfig, ModelConfig
from pvtcap.decoder import Decoder

VOCAB, BEGIN, END, PAD = 120, 118, 3, 0
PROMPT = [BEGIN, 11, 12, 13]  # [DEC] a picture of
SIZES: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def blip() -> Any:
    """A small BLIP with weights so large that photos and beams differ, and captions of all lengths."""
    text = {**SIZES, "vocab_size": VOCAB, "encoder_hidden_size": 32, "bos_token_id": BEGIN, "sep_token_id": END}
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    torch.manual_seed(3)
    model: Any = BlipForConditionalGeneration(
        BlipConfig(text_config={**text, "pad_token_id": PAD, "eos_token_id": END}, vision_config=vision)
    ).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5 if "word_embeddings" in name or "vision" in name else 0.2)
    model.text_decoder.cls.predictions.bias.data[END] += 9.0
    return model


@pytest.fixture(scope="module")
def decoder(blip: Any) -> Decoder:
    config = ModelConfig(decoder_layers=3, decoder_width=32, decoder_heads=4, decoder_feedforward=64)
    ours = Decoder(config, VOCAB).eval()
    missing, unexpected = ours.lm.load_state_dict(blip.text_decoder.state_dict(), strict=False)
    assert not unexpected
    assert all("token_type" in name for name in missing)
    return ours


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def patches_of(blip: Any, pixels: torch.Tensor) -> torch.Tensor:
    patches: torch.Tensor = blip.vision_model(pixel_values=pixels)[0]
    return patches


@pytest.mark.parametrize("num_beams", [1, 3, 5])
@pytest.mark.parametrize("prompt", [PROMPT, [BEGIN]], ids=["prompt", "no_prompt"])
@pytest.mark.parametrize(("min_length", "max_length"), [(5, 20), (10, 30), (0, 9)])
def test_the_ids_are_those_of_transformers_own_blip(
    blip: Any,
    decoder: Decoder,
    pixels: torch.Tensor,
    num_beams: int,
    prompt: list[int],
    min_length: int,
    max_length: int,
) -> None:
    # BLIP puts its begin token over the first id and drops the last.
    given = torch.tensor([[101, *prompt[1:], END]]).repeat(len(pixels), 1)
    lengths = {"min_length": min_length, "max_length": max_length}
    theirs = blip.generate(pixels, input_ids=given, num_beams=num_beams, do_sample=False, **lengths)
    how = EvaluateConfig(num_beams=num_beams, **lengths)
    ours = decoder.generate(patches_of(blip, pixels), prompt, END, PAD, how)
    assert ours.tolist() == theirs.tolist()


def test_captions_end_at_different_lengths_and_differ(blip: Any, decoder: Decoder, pixels: torch.Tensor) -> None:
    """Else the test above says little."""
    how = EvaluateConfig(num_beams=3, min_length=5, max_length=20)
    rows = decoder.generate(patches_of(blip, pixels), PROMPT, END, PAD, how).tolist()
    assert len({tuple(row) for row in rows}) == len(rows)
    assert len({row.index(END) if END in row else 20 for row in rows}) > 2


def test_keys_and_values_are_computed_once_a_photo(blip: Any, decoder: Decoder, pixels: torch.Tensor) -> None:
    rows: list[int] = []
    attention = decoder.lm.bert.encoder.layer[0].crossattention.self
    hook = attention.key.register_forward_hook(lambda module, given, out: rows.append(len(given[0])))
    decoder.generate(patches_of(blip, pixels), PROMPT, END, PAD, EvaluateConfig(num_beams=5))
    hook.remove()
    assert rows == [len(pixels)]


def test_nucleus_sampling_is_a_function_of_the_random_state(blip: Any, decoder: Decoder, pixels: torch.Tensor) -> None:
    patches = patches_of(blip, pixels)

    def sampled(seed: int, top_p: float) -> list[list[int]]:
        torch.manual_seed(seed)
        how = EvaluateConfig(num_beams=1, top_p=top_p, min_length=0)
        rows: list[list[int]] = decoder.generate(patches, PROMPT, END, PAD, how).tolist()
        return rows

    assert sampled(1, 0.9) == sampled(1, 0.9) != sampled(2, 0.9)
    greedy = decoder.generate(patches, PROMPT, END, PAD, EvaluateConfig(num_beams=1, min_length=0)).tolist()
    assert sampled(1, 1e-6) == greedy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates_too(blip: Any, decoder: Decoder, pixels: torch.Tensor, dtype: torch.dtype) -> None:
    patches = patches_of(blip, pixels)
    half = Decoder(
        ModelConfig(decoder_layers=3, decoder_width=32, decoder_heads=4, decoder_feedforward=64), VOCAB
    ).eval()
    half.load_state_dict(decoder.state_dict())
    how = EvaluateConfig(num_beams=3)
    rows = half.to(dtype).generate(patches.to(dtype), PROMPT, END, PAD, how)
    whole = decoder.generate(patches, PROMPT, END, PAD, how)
    # Rounding may turn a near tie; the first words after the prompt are not all near ties.
    assert (rows[:, 4] == whole[:, 4]).float().mean() >= 0.5


def test_sampling_and_searching_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match="set num_beams to 1"):
        EvaluateConfig(top_p=0.9)
