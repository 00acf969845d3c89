"""pytest tests/test_captioner.py: the projection, the decoder and its losses, the whole model, and generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from smallmodel import CAPTIONS, TOKENIZER, batch, loss_and_gradients, model_of
from torch.nn.functional import cross_entropy, embedding
from transformers import BertConfig, BertLMHeadModel

from pvtcap import cpuloss
from pvtcap.bertlayers import Head
from pvtcap.captioner import Captioner
from pvtcap.config import Config, EvaluateConfig, ModelConfig
from pvtcap.configfile import parse
from pvtcap.decoder import Decoder
from pvtcap.encoder import Encoder
from pvtcap.packing import Packed
from pvtcap.projection import Projection
from pvtcap.text import CaptionTokenizer


@pytest.fixture
def photos() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.long  # two graphs are compiled
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, of looking at what it compiles
def test_what_is_compiled_for_one_layer_and_length_serves_all(tree: dict[str, Any], photos: torch.Tensor) -> None:
    batches = [batch(CAPTIONS, photos), batch([["red circle", "star"], ["blue"]], photos)]
    usual, compiled = (model_of(tree, model={"dropout": 0.0, "decoder_layers": 3}) for _ in range(2))
    compiled.decoder.prepare_training(checkpointing=False, compiled=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for one in batches:
        loss, gradients = loss_and_gradients(compiled, [one])
        expected_loss, expected = loss_and_gradients(usual, [one])
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # a layer, and the losses


def test_a_loop_of_ones_own_may_cast_to_16_bits_by_itself(tree: dict[str, Any], photos: torch.Tensor) -> None:
    model, one = model_of(tree, model={"dropout": 0.0}), batch(CAPTIONS, photos)
    model.train()
    expected_loss, expected = loss_and_gradients(model, [one])
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, [one])
        captions = model.caption(photos, TOKENIZER, EvaluateConfig())
    assert loss == pytest.approx(expected_loss, rel=0.01) and loss != expected_loss
    assert gradients.keys() == expected.keys()
    ours, theirs = (torch.cat([one.flatten() for one in found.values()]) for found in (gradients, expected))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99
    assert len(captions) == len(photos)


def test_parameter_counts_are_those_of_the_published_parts() -> None:
    with torch.device("meta"):
        projection = Projection("conv3x3", 512, 768)
        decoder = Decoder(ModelConfig(), vocab_size=30524)
    encoder = Encoder("pvt_v2_b1")
    assert encoder.width == 512
    assert sum(p.numel() for p in encoder.parameters()) == 13_496_000
    assert sum(p.numel() for p in projection.parameters()) == 3_539_712
    # 109.5M of BERT-base with a tied head, 28.4M of cross-attention.
    assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(137.9e6, rel=5e-4)
    cross = sum(p.numel() for p in decoder.cross_attention_parameters())
    assert cross == pytest.approx(28.4e6, rel=2e-3)


@pytest.mark.parametrize("kind", ["conv3x3", "linear", "mlp"])
def test_projections_give_patches(kind: str) -> None:
    assert Projection(kind, 16, 24)(torch.rand(2, 16, 3, 5)).shape == (2, 15, 24)


WHAT = {
    "projection": {"projection"},
    "projection+cross_attention": {"projection", "cross"},
    "projection+decoder": {"projection", "cross", "decoder"},
    "projection+decoder+encoder": {"projection", "cross", "decoder", "encoder"},
    "projection+cross_attention+encoder": {"projection", "cross", "encoder"},
}


@pytest.mark.parametrize("what", WHAT)
def test_train_what_decides_what_learns(tree: dict[str, Any], what: str, photos: torch.Tensor) -> None:
    model = model_of(tree, train={"what": what}, model={"encoder_weights": "timm"})
    learning = {"cross" if "crossattention" in name else name.split(".")[0] for name in model.trainable()}
    assert learning == WHAT[what]
    for _ in range(2):  # a new one, too: the engine takes it as it is
        assert model.encoder.training == ("encoder" in what)
        model.train()
    loss_and_gradients(model, [batch(CAPTIONS, photos)])
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(model.trainable())


def test_new_weights_depend_on_the_seed_alone(config: Config) -> None:
    one, same = (Captioner(config, 50).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    other = Captioner(config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})}), 50).state_dict()
    assert not torch.equal(one["projection.net.weight"], other["projection.net.weight"])


def test_label_smoothing_is_for_training_only(tree: dict[str, Any], photos: torch.Tensor) -> None:
    plain = model_of(tree, model={"dropout": 0.0})
    smoothed = model_of(tree, model={"dropout": 0.0}, optim={"label_smoothing": 0.1})
    one = batch(CAPTIONS, photos)
    with torch.no_grad():
        assert float(plain.eval()(one)) == float(smoothed.eval()(one))
        plain.decoder.train()
        smoothed.decoder.train()
        assert float(plain(one)) != float(smoothed(one))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_widened_vocabulary_changes_neither_loss_nor_gradients(smoothing: float, tree: dict[str, Any]) -> None:
    decoder = model_of(tree, model={"dropout": 0.0}, optim={"label_smoothing": smoothing}).double().train().decoder
    head = decoder.lm.cls.predictions.decoder
    assert isinstance(head, Head)
    assert head.out_features % Head.MULTIPLE
    hidden, labels = torch.randn(7, decoder.lm.config.hidden_size).double(), torch.arange(7)
    found = []
    for way in (head.forward, head.widened):
        head.forward = way
        decoder.zero_grad()
        losses = decoder._cross_entropies(hidden, labels)
        losses.sum().backward()
        found.append((losses.detach(), head.weight.grad.clone(), head.bias.grad.clone()))
    for usual, widened in zip(*found, strict=True):
        torch.testing.assert_close(widened, usual, rtol=1e-6, atol=1e-7)
    assert head.widened(hidden).shape[1] % Head.MULTIPLE == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_cpus_cross_entropy_in_one_tensor_is_torchs(smoothing: float) -> None:
    head, hidden = torch.nn.Linear(24, 50), torch.randn(7, 24, requires_grad=True)
    labels, weights = torch.tensor([0, 49, 3, 3, 7, 8, 20]), torch.tensor([1.0, -2, 0, 3, 1, 1, 0.5])

    def torchs() -> torch.Tensor:
        return cross_entropy(head(hidden), labels, reduction="none", label_smoothing=smoothing)

    found = []
    for way in (torchs, lambda: cpuloss.cross_entropies(hidden, head.weight, head.bias, labels, smoothing)):
        losses = way()
        gradients = torch.autograd.grad((losses * weights).sum(), [hidden, head.weight, head.bias], retain_graph=True)
        found.append([losses.detach(), *gradients])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # never wrong in silence
        losses.sum().backward()


def test_a_tied_embeddings_gradient_on_cpus_is_the_dense_one(
    tree: dict[str, Any], photos: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tree, model={"dropout": 0.0})
    found, made = [], []
    for _ in range(2):
        with torch.profiler.profile() as profile:
            found.append(loss_and_gradients(model, [batch(CAPTIONS, photos), batch(CAPTIONS[1:], photos[1:])]))
        made.append(sum(one.name == "aten::embedding_dense_backward" for one in profile.events()))
        monkeypatch.setattr(cpuloss, "looked_up", lambda tokens, weight: (embedding(tokens, weight), weight))
    assert made == [2, 4]  # of positions, and then of words too
    (loss, gradients), (dense_loss, dense) = found
    assert loss == dense_loss
    torch.testing.assert_close(gradients, dense, rtol=1e-5, atol=1e-7)
    assert {one.layout for one in gradients.values()} == {torch.strided}


def test_beam_search_gives_the_likeliest_caption_of_all(tree: dict[str, Any], photos: torch.Tensor) -> None:
    """With as many beams as there are sequences, beam search is exhaustive: checked by scoring them all."""
    small = CaptionTokenizer(["[PAD]", "[UNK]", "[SEP]", "a", "b"])
    model = Captioner(parse(tree, "test"), small.size).double().eval()
    torch.nn.init.normal_(model.decoder.lm.cls.predictions.bias, generator=torch.Generator().manual_seed(5))
    how = EvaluateConfig(num_beams=49, max_length=3, min_length=0)
    with torch.inference_mode():
        patches = model.patches(photos)
        found = model.decoder.generate(patches, small.prefix, small.end_id, small.pad_id, how)
        best = [exhaustive_best(model, patches[row : row + 1], small) for row in range(2)]
    assert [row[: len(ids)] for row, ids in zip(found.tolist(), best, strict=True)] == best


def exhaustive_best(model: Captioner, patches: torch.Tensor, tokenizer: CaptionTokenizer) -> list[int]:
    """The two-token continuation (or one, if it ends) with the highest log-probability a generated token."""

    def log_probabilities(ids: list[int]) -> torch.Tensor:
        logits = model.decoder.lm(input_ids=torch.tensor([ids]), encoder_hidden_states=patches).logits
        return torch.log_softmax(logits[0, -1], dim=-1)

    begin = tokenizer.prefix
    first = log_probabilities(begin)
    scored = {(*begin, tokenizer.end_id): float(first[tokenizer.end_id])}
    for token in range(tokenizer.size):
        if token != tokenizer.end_id:
            second = log_probabilities([*begin, token])
            for last in range(tokenizer.size):
                scored[(*begin, token, last)] = float(first[token] + second[last]) / 2
    return list(max(scored, key=lambda ids: scored[ids]))


def test_generation_keeps_its_bounds_and_warns_of_nothing(
    tree: dict[str, Any], photos: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(tree).eval()
    how = EvaluateConfig(num_beams=3, max_length=9, min_length=7)
    rows = model.decoder.generate(model.patches(photos), TOKENIZER.prefix, TOKENIZER.end_id, TOKENIZER.pad_id, how)
    assert rows.shape[0] == 2
    assert rows.shape[1] <= 9
    assert rows[:, : len(TOKENIZER.prefix)].tolist() == [TOKENIZER.prefix] * 2
    assert all(TOKENIZER.end_id not in row[:7] for row in rows.tolist())
    assert all(isinstance(text, str) for text in model.caption(photos, TOKENIZER, how))
    assert capsys.readouterr().err == ""


def test_a_bert_of_transformers_own_gives_the_same_logits() -> None:
    """The decoder is BertLMHeadModel: unpacked, its loss is that model's own."""
    config = ModelConfig(decoder_layers=2, decoder_width=32, decoder_heads=2, decoder_feedforward=64, dropout=0)
    decoder = Decoder(config, TOKENIZER.size).eval()
    theirs: Any = BertLMHeadModel(
        BertConfig(
            vocab_size=TOKENIZER.size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, is_decoder=True, add_cross_attention=True, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    theirs.load_state_dict(decoder.lm.state_dict())
    one = batch([["red circle on the left"]], torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    patches = torch.rand(1, 4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = decoder(patches, Packed.of(one))
        logits = theirs(input_ids=one.tokens, encoder_hidden_states=patches).logits
    assert one.labels.min() >= 0
    expected = torch.nn.functional.cross_entropy(logits[0, one.predictors[0]], one.labels[0], reduction="sum")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
