"""pytest tests/test_weightlayouts.py: files of every layout that exists, with true names and random values.

The real files' names are known from what made them: transformers' classes of BLIP and BERT, timm's PVT v2 with its own
converter from whai362's names, and Salesforce's BLIP source.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_weights import VOCAB, blip, captioner, load_decoder, load_encoder  # noqa: F401  # blip is a fixture
from timm.models.pvt_v2 import checkpoint_filter_fn
from torch import Tensor
from transformers import BertConfig, BertForPreTraining, BlipForConditionalGeneration

from pvtcap import weights
from pvtcap.captioner import Captioner
from pvtcap.configfile import parse
from pvtcap.errors import CheckpointError
from pvtcap.weightnames import decoder_names, encoder_names
from pvtcap.weightreport import source_files, weights_table


def whai362(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names → those of pvt_v2.py in whai362/PVT, in which stages count from 1."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^patch_embed\.", "patch_embed1.", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.", lambda m: f"patch_embed{int(m[1]) + 1}.", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.(\d+)\.", lambda m: f"block{int(m[1]) + 1}.{m[2]}.", name)
        name = re.sub(r"^stages\.(\d)\.norm\.", lambda m: f"norm{int(m[1]) + 1}.", name)
        renamed[name.replace("mlp.dwconv.", "mlp.dwconv.dwconv.")] = value
    return renamed


@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2_li"])
def test_whai362s_names_are_renamed_as_timm_renames_them(name: str) -> None:
    with torch.device("meta"):
        own = timm.create_model(name, pretrained=False)
    state = own.state_dict()
    original = whai362(state)
    assert {"patch_embed1.proj.weight", "block4.1.mlp.dwconv.dwconv.bias", "norm4.weight", "head.bias"} <= set(original)
    theirs = checkpoint_filter_fn(dict(original), own)
    assert theirs.keys() == state.keys()
    ours = encoder_names(original, 4, Path("x"))
    assert ours.state.keys() == theirs.keys() - {"head.weight", "head.bias"}
    assert ours.ignored == {"head": 2}


def test_an_original_pvt_file_fills_the_encoder(tree: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = timm.create_model("pvt_v2_b0", pretrained=False).state_dict()
    torch.save(whai362(state), tmp_path / "pvt_v2_b0.pth")
    model = captioner(tree)
    loaded = load_encoder(model, tree, tmp_path / "pvt_v2_b0.pth")
    assert all(torch.equal(value, state[name]) for name, value in model.encoder.pvt.state_dict().items())
    assert loaded.ignored.keys() == {"head", "stages.2", "stages.3"}
    assert loaded.taken == len(model.encoder.pvt.state_dict())
    torch.save({"pos_embed1": torch.rand(1, 4, 4), "cls_token": torch.rand(1, 1, 4)}, tmp_path / "pvt_tiny.pth")
    with pytest.raises(CheckpointError, match=r"PVT version 1.* one image size; wanted PVT v2"):
        load_encoder(model, tree, tmp_path / "pvt_tiny.pth")


def salesforce(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of models/blip.py's decoder: the text decoder's are Hugging Face's; the vision tower is timm's ViT."""
    decoder = {name: value for name, value in state.items() if name.startswith("text_decoder.")}
    positions = {"text_decoder.bert.embeddings.position_ids": torch.arange(32)[None]}
    vision = {"cls_token": (1, 1, 4), "pos_embed": (1, 5, 4), "blocks.0.attn.qkv.weight": (12, 4), "norm.weight": (4,)}
    return {**positions, **decoder, **{f"visual_encoder.{name}": torch.rand(shape) for name, shape in vision.items()}}


def pretraining(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """models/blip_pretrain.py's: also a text encoder, momentum copies, heads and queues."""
    extra = {"text_encoder.embeddings.word_embeddings.weight": (4, 4), "text_encoder_m.embeddings.position_ids": (1, 4),
             "vision_proj.weight": (2, 4), "text_proj.weight": (2, 4), "itm_head.weight": (2, 4), "image_queue": (2, 3),
             "text_queue": (2, 3), "queue_ptr": (1,), "temp": ()}  # fmt: skip
    return {**salesforce(state), **{name: torch.rand(shape) for name, shape in extra.items()}}


def assert_says_what_blip_says(model: Captioner, theirs: BlipForConditionalGeneration) -> None:
    tokens, patches = torch.randint(5, VOCAB, (2, 7)), torch.rand(2, 4, 32)
    with torch.no_grad():
        expected = theirs.text_decoder(input_ids=tokens, encoder_hidden_states=patches).logits
        logits = model.eval().decoder.lm(input_ids=tokens, encoder_hidden_states=patches).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def decoder_file(blip: BlipForConditionalGeneration, layout: str, folder: Path) -> Path:  # noqa: F811
    state = blip.state_dict()
    alone = {n.removeprefix("text_decoder."): value for n, value in state.items() if n.startswith("text_decoder.")}
    tree: dict[str, Any] = {
        "salesforce": {"model": salesforce(state)},
        "salesforce training": {"model": salesforce(state), "optimizer": {"state": {}}, "config": {"x": 1}, "epoch": 4},
        "salesforce pretraining": {"model": pretraining(state)},
        "text decoder alone": alone,
        "combined, whole BLIP": {"pvt": {}, "blip": dict(state), "projection": {}},
        "combined, text decoder": {"pvt": {}, "blip": alone, "projection": {}},
        "pvtcap's export": {f"decoder.lm.{name}": value for name, value in alone.items()},
    }[layout]
    torch.save(tree, folder / "x.pth")
    return folder / "x.pth"


@pytest.mark.parametrize(
    ("layout", "ignored"),
    [
        ("salesforce", {"visual_encoder": 4, "position_ids": 1}),
        ("salesforce training", {"visual_encoder": 4, "position_ids": 1}),
        ("salesforce pretraining", {"text_encoder": 1, "text_encoder_m": 1, "image_queue": 1, "queue_ptr": 1}),
        ("text decoder alone", {}),
        ("combined, whole BLIP", {"vision_model": 18}),
        ("combined, text decoder", {}),
        ("pvtcap's export", {}),
    ],
)
def test_decoders_of_every_layout_say_what_blip_says(
    tree: dict[str, Any],
    blip: BlipForConditionalGeneration,  # noqa: F811
    tmp_path: Path,
    layout: str,
    ignored: dict[str, int],
) -> None:
    model = captioner(tree)
    loaded = load_decoder(model, tree, decoder_file(blip, layout, tmp_path))
    assert ignored.items() <= dict(loaded.ignored).items()
    assert not loaded.new
    assert_says_what_blip_says(model, blip)


def test_a_file_stores_the_tied_table_once_or_twice_but_not_two_of_them(
    tree: dict[str, Any],
    blip: BlipForConditionalGeneration,  # noqa: F811
    tmp_path: Path,
) -> None:
    words, head = ("text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.decoder.weight")
    for left_out in (words, head):
        torch.save({n: value for n, value in blip.state_dict().items() if n != left_out}, tmp_path / "x.pth")
        model = captioner(tree)
        load_decoder(model, tree, tmp_path / "x.pth")
        assert_says_what_blip_says(model, blip)
    torch.save({**blip.state_dict(), head: torch.rand(VOCAB, 32)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="an output layer of its own"):
        load_decoder(captioner(tree), tree, tmp_path / "x.pth")


@pytest.fixture
def bert() -> Any:
    """bert-base-uncased's own class, small; its vocabulary lacks [DEC] and [ENC]."""
    torch.manual_seed(8)
    return BertForPreTraining(
        BertConfig(
            vocab_size=VOCAB - 2, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=32, attn_implementation="eager",
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("names", ["today's", "TensorFlow's", "BertModel's"])
def test_bert_begins_a_decoder_whose_cross_attention_is_new(
    tree: dict[str, Any], bert: Any, tmp_path: Path, names: str
) -> None:
    state = dict(bert.state_dict())
    if names == "TensorFlow's":  # as in the hub's bert-base-uncased
        state = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
                 for n, value in state.items()}  # fmt: skip
    elif names == "BertModel's":
        state = {n.removeprefix("bert."): value for n, value in state.items() if n.startswith("bert.")}
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = captioner(tree).eval()
    loaded = load_decoder(model, tree, tmp_path)
    assert all(".crossattention." in name or (names == "BertModel's" and name[:4] == "cls.") for name in loaded.new)
    assert len([name for name in loaded.new if ".crossattention." in name]) == 10
    assert f"vocabulary extended from {VOCAB - 2} to {VOCAB}: the rows of [DEC] and [ENC] are new" in loaded.notes
    assert "token type 0 added to the positions" in loaded.notes
    # Its first token, which sees only itself in both, has BERT's own embedding.
    tokens = torch.tensor([[7]])
    with torch.no_grad():
        ours = model.decoder.lm.bert.embeddings(input_ids=tokens)
        torch.testing.assert_close(ours, bert.bert.embeddings(input_ids=tokens), rtol=0, atol=1e-6)
    assert model.decoder.lm.cls.predictions.decoder.weight is model.decoder.lm.bert.embeddings.word_embeddings.weight


def test_new_weights_that_nothing_trains_are_refused(tree: dict[str, Any], bert: Any, tmp_path: Path) -> None:
    torch.save(bert.state_dict(), tmp_path / "bert.bin")
    for what, refused in (("projection", True), ("projection+cross_attention+encoder", False)):
        changed = {**tree, "train": {"what": what}, "model": {**tree["model"], "encoder_weights": "timm"}}
        config = parse({**changed, "model": {**changed["model"], "decoder": str(tmp_path / "bert.bin")}}, "test")
        model = Captioner(config, VOCAB)
        if not refused:
            weights.load_decoder(model, config)
            continue
        with pytest.raises(CheckpointError, match="new weights in the decoder that nothing would train"):
            weights.load_decoder(model, config)


@pytest.mark.parametrize(
    ("kind", "named", "shape"),
    [
        ("linear", {"weight": (32, 64), "bias": (32,)}, (32, 64, 1, 1)),
        ("linear", {"proj.weight": (32, 64, 1, 1), "proj.bias": (32,)}, (32, 64, 1, 1)),
        ("conv3x3", {"conv.weight": (32, 64, 3, 3), "conv.bias": (32,)}, (32, 64, 3, 3)),
        ("mlp", {"0.weight": (32, 64), "0.bias": (32,), "10.weight": (32, 32), "10.bias": (32,)}, (32, 64, 1, 1)),
    ],
)
def test_projections_under_other_names(
    tree: dict[str, Any], tmp_path: Path, kind: str, named: dict[str, tuple[int, ...]], shape: tuple[int, ...]
) -> None:
    state = {name: torch.rand(size) for name, size in named.items()}
    torch.save({"pvt": {}, "blip": {}, "projection": state}, tmp_path / "combined.pth")
    model = {**tree["model"], "projection": kind, "projection_weights": str(tmp_path / "combined.pth")}
    config = parse({**tree, "model": model}, "test")
    made = Captioner(config, VOCAB)
    assert weights.load_projection(made, config).taken == len(named)
    first = made.projection.net if kind != "mlp" else made.projection.net[0]  # type: ignore[index]
    assert first.weight.shape == shape
    assert torch.equal(first.weight.detach().flatten(), next(iter(state.values())).flatten())
    torch.save({"projection": {"a": torch.rand(2)}}, tmp_path / "combined.pth")
    with pytest.raises(CheckpointError, match="not a projection; got a; wanted one or two layers"):
        weights.load_projection(made, config)


def test_numbers_that_are_none_and_halves(
    tree: dict[str, Any],
    blip: BlipForConditionalGeneration,  # noqa: F811
    tmp_path: Path,
) -> None:
    name = "text_decoder.cls.predictions.transform.dense.bias"
    state = {n: value.clone() for n, value in blip.state_dict().items()}
    halves = {n: value.half() for n, value in state.items()}
    save_file(halves, tmp_path / "half.safetensors")
    model = captioner(tree)
    loaded = load_decoder(model, tree, tmp_path / "half.safetensors")
    assert "float16 converted to float32" in loaded.notes
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert_says_what_blip_says(model, blip.half().float())
    state[name][:3] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match=r"not finite: 'cls\.predictions.*; got 3 of its 32 numbers"):
        load_decoder(captioner(tree), tree, tmp_path / "nan.safetensors")
    # A vocabulary that lacks more than the two tokens is another model's.
    state[name].zero_()
    short = "text_decoder.bert.embeddings.word_embeddings.weight"
    kept = {n: value for n, value in state.items() if "cls.predictions.decoder" not in n}
    save_file({**kept, short: torch.rand(VOCAB - 5, 32)}, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match=rf"word_embeddings.*got shape \({VOCAB - 5}, 32\)"):
        load_decoder(captioner(tree), tree, tmp_path / "short.safetensors")


def test_the_table_and_the_checksums(
    tree: dict[str, Any],
    blip: BlipForConditionalGeneration,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = parse({**tree, "model": {**tree["model"], "decoder": str(tmp_path / "blip")}}, "test")
    model = Captioner(config, VOCAB)
    loaded = [weights.load_encoder(model.encoder, config)]
    loaded += [load(model, config) for load in (weights.load_projection, weights.load_decoder)]
    lines = weights_table(loaded).splitlines()
    assert re.match(r"encoder +0 +0 +\d+ +0  scratch$", lines[1])
    assert re.match(rf"decoder +\d+ +[\d,]+ +0 +18  {tmp_path}/blip/model.safetensors$", lines[3])
    assert lines[4].strip() == "ignored: vision_model (18)"
    (file,) = source_files(loaded)
    assert (file.part, file.file) == ("decoder", str(tmp_path / "blip/model.safetensors"))
    assert len(file.sha256) == 64
    assert file.size_bytes == (tmp_path / "blip/model.safetensors").stat().st_size


def test_every_name_of_the_full_size_models_has_a_place() -> None:
    """blip-image-captioning-base and bert-base-uncased by their classes: 12 layers, without values."""
    from pvtcap.config import ModelConfig
    from pvtcap.decoder import Decoder

    with torch.device("meta"):
        own = set(Decoder(ModelConfig(), 30524).lm.state_dict())
        blip_like = {f"text_decoder.{name}": torch.empty(0) for name in own if "token_type" not in name}
        bert = BertForPreTraining(BertConfig()).state_dict()
    assert set(decoder_names(blip_like, Path("x")).state) == {name for name in own if "token_type" not in name}
    named = decoder_names(bert, Path("x"))
    assert own - set(named.state) == {name for name in own if ".crossattention." in name or "token_type" in name}
    assert set(named.state) <= own
