"""pytest tests/test_weights.py: small files of the true formats, made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import BlipConfig, BlipForConditionalGeneration

from pvtcap import weights
from pvtcap.captioner import Captioner
from pvtcap.config import Config, TextConfig
from pvtcap.configfile import parse
from pvtcap.decoder import Decoder
from pvtcap.errors import CheckpointError, ConfigError, PvtcapError
from pvtcap.weightfiles import read_tensors
from pvtcap.weightreport import Loaded

VOCAB = 60


def captioner(tree: dict[str, Any], **model: Any) -> Captioner:
    tree = {**tree, "model": {**tree["model"], **model}}
    return Captioner(parse(tree, "test"), VOCAB)


def load_encoder(model: Captioner, tree: dict[str, Any], source: object) -> Loaded:
    return weights.load_encoder(
        model.encoder, parse({**tree, "model": {**tree["model"], "encoder_weights": str(source)}}, "test")
    )


def load_decoder(model: Captioner, tree: dict[str, Any], source: object) -> Loaded:
    return weights.load_decoder(model, parse({**tree, "model": {**tree["model"], "decoder": str(source)}}, "test"))


def pvt_weights(path: Path, seed: int = 4) -> None:
    """What timm publishes: the whole classifier, head and last stage included."""
    torch.manual_seed(seed)
    save_file(timm.create_model("pvt_v2_b0", pretrained=False).state_dict(), path)


@pytest.fixture
def pvt_file(tmp_path: Path) -> Path:
    path = tmp_path / "pvt_v2_b0.safetensors"
    pvt_weights(path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timms_files_fill_the_encoder(tree: dict[str, Any], pvt_file: Path, suffix: str) -> None:
    state = read_tensors(pvt_file)
    if suffix == ".pth":
        torch.save(state, pvt_file.with_suffix(suffix))
    for stages in (2, 3, 4):
        model = captioner(tree, encoder_stages=stages)
        load_encoder(model, tree, pvt_file.with_suffix(suffix))
        own = model.encoder.pvt.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in own.items())
        assert any(name.startswith(f"stages.{stages - 1}.") for name in own)


def test_features_are_timms_own(tree: dict[str, Any], pvt_file: Path) -> None:
    model = captioner(tree, encoder_stages=4).eval()
    load_encoder(model, tree, pvt_file)
    theirs = timm.create_model("pvt_v2_b0", pretrained=False).eval()
    theirs.load_state_dict(read_tensors(pvt_file))
    photos = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    normalised = (photos / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(photos), theirs.forward_features(normalised), rtol=1e-4, atol=1e-4)


def test_another_encoders_file_is_refused(tree: dict[str, Any], pvt_file: Path) -> None:
    with pytest.raises(CheckpointError, match="weights of another model") as caught:
        load_encoder(captioner(tree, encoder="pvt_v2_b1"), tree, pvt_file)
    assert str(pvt_file) in str(caught.value)


def blip_folder(folder: Path) -> BlipForConditionalGeneration:
    """A BLIP captioning model of Hugging Face's own class, as small as the test's decoder."""
    text = {"vocab_size": VOCAB, "hidden_size": 32, "encoder_hidden_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 32,
            "bos_token_id": VOCAB - 2, "sep_token_id": 3}  # fmt: skip
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    torch.manual_seed(6)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture
def blip(tmp_path: Path) -> BlipForConditionalGeneration:
    return blip_folder(tmp_path / "blip")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_blip_folder_fills_the_decoder_which_then_says_what_blip_says(
    tree: dict[str, Any], blip: BlipForConditionalGeneration, tmp_path: Path, form: str
) -> None:
    folder = tmp_path / "blip"
    if form == "bin":
        torch.save(blip.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    model = captioner(tree).eval()
    load_decoder(model, tree, folder)
    tokens = torch.randint(5, VOCAB, (2, 7))
    patches = torch.rand(2, 4, 32)
    with torch.no_grad():
        theirs = blip.text_decoder(input_ids=tokens, encoder_hidden_states=patches).logits
        ours = model.decoder.lm(input_ids=tokens, encoder_hidden_states=patches).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_another_number_of_heads_is_noticed_by_the_configuration_beside(
    tree: dict[str, Any], blip: BlipForConditionalGeneration, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: .* attention heads; got 2; wanted 4, as model") as caught:
        weights.load_decoder(*with_heads(tree, 4, tmp_path / "blip"))
    assert "Set model.decoder_heads=2" in str(caught.value)
    (tmp_path / "blip/config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a model's configuration"):
        weights.load_decoder(*with_heads(tree, 2, tmp_path / "blip"))
    (tmp_path / "blip/config.json").unlink()
    weights.load_decoder(*with_heads(tree, 2, tmp_path / "blip"))


def with_heads(tree: dict[str, Any], heads: int, folder: Path) -> tuple[Captioner, Config]:
    config = parse({**tree, "model": {**tree["model"], "decoder_heads": heads, "decoder": str(folder)}}, "test")
    return Captioner(config, VOCAB), config


def test_a_folder_without_a_text_decoder(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="no weights in this folder"):
        load_decoder(captioner(tree), tree, tmp_path / "other")
    save_file({"vision.weight": torch.ones(2)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(CheckpointError, match="no text decoder in this file"):
        load_decoder(captioner(tree), tree, tmp_path / "other")


def test_what_was_trained_comes_back_whole_or_not_at_all(tree: dict[str, Any], tmp_path: Path) -> None:
    model = captioner(tree)
    state = {name: value.detach().clone() for name, value in model.trainable().items()}
    save_file(state, tmp_path / "trainable.safetensors")
    other = Captioner(parse({**tree, "run": {"seed": 9}}, "test"), VOCAB)
    weights.load_trained(other, tmp_path / "trainable.safetensors")
    assert all(torch.equal(value, other.trainable()[name].detach()) for name, value in state.items())
    state.pop("projection.net.bias")
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing \(projection\.net\.bias\)"):
        weights.load_trained(other, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match="weights of another model") as caught:
        weights.load_trained(captioner(tree, decoder_width=64), tmp_path / "trainable.safetensors")
    assert "shape" in str(caught.value)


@pytest.mark.parametrize("source", ["timm", "decoder", "vocab"])
def test_what_is_not_in_the_cache_is_asked_for_in_one_line(
    tree: dict[str, Any], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(PvtcapError) as caught:
        if source == "timm":
            load_encoder(captioner(tree), tree, "timm")
        elif source == "decoder":
            load_decoder(captioner(tree), tree, "Salesforce/blip-image-captioning-base")
        else:
            weights.load_vocab(TextConfig())
    assert "neither in the Hugging Face cache nor reachable" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="no such vocabulary file"):
        weights.load_vocab(TextConfig(vocab="nowhere/vocab.txt"))


def test_the_test_folder_is_true_to_hugging_faces_layout(blip: BlipForConditionalGeneration, tmp_path: Path) -> None:
    assert json.loads((tmp_path / "blip/config.json").read_text())["model_type"] == "blip"
    assert any(name.startswith("text_decoder.") for name in read_tensors(tmp_path / "blip/model.safetensors"))


def test_an_undrawn_model_draws_nothing_and_is_whole_once_it_is_filled(tree: dict[str, Any]) -> None:
    config = parse(tree, "test")
    before = torch.get_rng_state()
    with weights.Undrawn():
        Decoder(config.model, VOCAB)
    assert torch.equal(torch.get_rng_state(), before)
    with weights.Undrawn():
        undrawn = Captioner(config, VOCAB)
    drawn = Captioner(config, VOCAB)
    weights.fill(undrawn, drawn.state_dict(), Path("x"))
    assert all(torch.equal(value, undrawn.state_dict()[name]) for name, value in drawn.state_dict().items())
    for (name, buffer), (_, other) in zip(drawn.named_buffers(), undrawn.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert not undrawn.decoder.lm.bert.embeddings.token_type_embeddings.weight.any()
