"""pytest tests/test_captioner.py: the encoder, the projection and the decoder, alone and together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertLMHeadModel

from pvtcap import cpuloss, encoder, packing
from pvtcap.batch import Batch
from pvtcap.bertlayers import Head, WordEmbedding
from pvtcap.captioner import Captioner
from pvtcap.config import Config, EvaluateConfig, ModelConfig
from pvtcap.configfile import parse
from pvtcap.decoder import Decoder
from pvtcap.encoder import Encoder, FeedForward
from pvtcap.errors import ConfigError
from pvtcap.packing import Packed, Rows, attend_to_caption, attend_to_photo, dropout_mask, packed_mask
from pvtcap.projection import Projection
from pvtcap.text import SHARED, CaptionTokenizer

WORDS = ["a", "red", "blue", "green", "large", "small", "circle", "square", "star", "on", "the", "left", "right", "top"]
TOKENIZER = CaptionTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS], prompt="a star on")
CAPTIONS = [
    ["red circle on the left", "large red circle", "circle"],
    ["blue star", "small blue star on the right top", "the star on the right"],
]


def batch(groups: list[list[str]], photos: torch.Tensor) -> Batch:
    rows = TOKENIZER.pack(groups, 20)
    tensors = {
        name: torch.from_numpy(getattr(rows, name))
        for name in ("tokens", "labels", "predictors", "positions", "segments")
    }
    return Batch(photos=photos, samples=(), num_captions=sum(map(len, groups)), **tensors)


@pytest.fixture
def photos() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def model_of(tree: dict[str, Any], **sections: dict[str, Any]) -> Captioner:
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return Captioner(parse(tree, "test"), TOKENIZER.size)


def loss_and_gradients(model: Captioner, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for one in batches:
        loss = model(one)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}


def test_packed_captions_give_the_loss_and_the_gradients_of_unpacked_rows(
    tree: dict[str, Any], photos: torch.Tensor
) -> None:
    # float64 all through but for the normalised photo and the cross-entropy, which are float32 on both sides.
    model = model_of(tree, model={"dropout": 0.0}).double().eval()
    packed = batch(CAPTIONS, photos)
    unpacked = [batch([[caption]], photos[row : row + 1]) for row, group in enumerate(CAPTIONS) for caption in group]
    assert packed.num_labels == sum(one.num_labels for one in unpacked)
    loss, gradients = loss_and_gradients(model, [packed])
    expected_loss, expected = loss_and_gradients(model, unpacked)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected.keys()
    assert any(name.startswith("encoder.") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
        if not name.endswith("key.bias"):  # softmax does not see a constant added to all keys
            assert gradient.abs().max() > 0, name


def test_a_token_sees_its_own_caption_up_to_itself_and_padding_sees_something() -> None:
    mask = packed_mask(torch.tensor([[1, 1, 2, 2, -1], [SHARED, 1, 2, 2, -1]]))[:, 0, :4].int().tolist()
    assert mask[0] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0]]
    assert mask[1] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0]]
    assert packed_mask(torch.full((1, 2), -1))[0, 0].int().tolist() == [[1, 0], [1, 1]]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_on_cpus_drops_that_share_and_enlarges_the_rest(dtype: torch.dtype) -> None:
    states = torch.ones((999, 101), dtype=dtype)  # no multiple of four
    torch.manual_seed(3)
    mask = dropout_mask(states, 0.1)
    zeros = mask == 0
    assert mask.dtype == dtype
    assert zeros.sum().item() == pytest.approx(0.1 * states.numel(), rel=0.05)  # 5 %: five standard deviations
    assert mask[~zeros].unique().tolist() == pytest.approx([1 / 0.9], rel=1e-4 if dtype == torch.float32 else 4e-3)
    # Of pairs of neighbours, in a row and in a column, a hundredth: nothing within a word of four is alike.
    for step in ((0, 1), (0, 2), (0, 3), (1, 0)):
        both = zeros[: 999 - step[0], : 101 - step[1]] & zeros[step[0] :, step[1] :]
        assert both.float().mean().item() == pytest.approx(0.01, rel=0.2)
    torch.manual_seed(3)
    assert torch.equal(dropout_mask(states, 0.1), mask)
    assert dropout_mask(states, 1 - 1e-9).isfinite().all()


def test_padding_of_shorter_rows_changes_no_attention_and_no_gradient() -> None:
    groups = [["red circle on the left", "star"], ["blue"], ["small blue star"]]

    def rows_of(some: list[list[str]]) -> Rows:
        return Packed.of(batch(some, torch.zeros(len(some), 3, 32, 32, dtype=torch.uint8))).rows

    def attended(of_tokens: torch.Tensor, of_photos: torch.Tensor, rows: Rows) -> list[torch.Tensor]:
        """Both attentions, and the gradients of all that they take: (N, H, d) and (B, P, H, d)."""
        weights, *asked = of_tokens.unbind()
        leaves = [one.clone().requires_grad_() for one in (*asked, *of_photos.unbind())]
        both = attend_to_caption(*leaves[:3], rows, 0.0), attend_to_photo(leaves[0], *leaves[3:], rows, 0.0)
        return [*both, *torch.autograd.grad(both, leaves, [weights, weights])]

    rows = rows_of(groups)
    torch.manual_seed(2)
    of_tokens = torch.randn(4, len(rows.slots_N), 2, 4, dtype=torch.float64)
    of_photos = torch.randn(2, len(groups), 5, 2, 4, dtype=torch.float64)
    sizes = rows.starts.diff().tolist()
    assert sizes[0] > sizes[2] > sizes[1]
    alone = [
        attended(tokens, photo, rows_of([group]))
        for tokens, photo, group in zip(of_tokens.split(sizes, 1), of_photos.split(1, 1), groups, strict=True)
    ]
    for together, parts in zip(attended(of_tokens, of_photos, rows), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(together, torch.cat(parts))


def test_attention_with_dropout_on_cpus_is_torchs_but_for_the_weights_that_are_dropped() -> None:
    rows = Packed.of(batch([["red circle on the left", "star"]], torch.zeros(1, 3, 32, 32, dtype=torch.uint8))).rows
    count = len(rows.slots_N)
    torch.manual_seed(1)
    query, key = torch.randn(2, count, 2, count)
    weights_of = torch.eye(count)[:, None].expand(-1, 2, -1)  # as values: what is attended are the weights
    shown = key[None], weights_of[None].contiguous()
    for attend, others in ((attend_to_caption, (key, weights_of)), (attend_to_photo, shown)):
        usual = attend(query, *others, rows, 0.0)
        dropped = attend(query, *others, rows, 0.25)
        stays = dropped != 0
        torch.testing.assert_close(dropped[stays], usual[stays] / 0.75)
        seen = usual != 0
        assert not (stays & ~seen).any()
        assert 0 < (seen & ~stays).sum() < seen.sum()


def test_attention_with_dropout_on_cpus_has_the_gradients_of_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Packed.of(batch(CAPTIONS, torch.zeros(2, 3, 32, 32, dtype=torch.uint8))).rows
    count = len(rows.slots_N)
    torch.manual_seed(4)
    leaves = [torch.randn(count, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    leaves += [torch.randn(2, 5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def formula(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float
    ) -> torch.Tensor:
        scores = query @ key.mT / 2
        weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
        return (weights * dropout_mask(weights, dropout)) @ value

    def found() -> list[torch.Tensor]:
        torch.manual_seed(5)
        both = attend_to_caption(*leaves[:3], rows, 0.3), attend_to_photo(leaves[0], *leaves[3:], rows, 0.3)
        return [*both, *torch.autograd.grad(both, leaves, [leaves[1].detach(), leaves[2].detach()])]

    ours = found()
    monkeypatch.setattr(packing, "_attention", formula)
    torch.testing.assert_close(ours, found())


def test_a_caption_changed_in_a_row_changes_no_other_captions_loss(tree: dict[str, Any], photos: torch.Tensor) -> None:
    model = model_of(tree).eval()

    @torch.no_grad()
    def first_caption_alone(second: str) -> float:
        both = batch([["red circle", second]], photos[:1])
        labels = both.labels.clone()
        labels[:, 3:] = -100  # red, circle, the end
        return float(model(replace(both, labels=labels)))

    assert first_caption_alone("blue star on the left") == first_caption_alone("green star on the left")
    # The photo, on the other hand, matters.
    with torch.no_grad():
        one, other = (float(model(batch([["red circle"]], photos[row : row + 1]))) for row in (0, 1))
    assert one != other


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


@pytest.mark.parametrize(("name", "width"), [("pvt_v2_b0", 256), ("pvt_v2_b1", 512)])
def test_the_encoders_grid_and_width(name: str, width: int, photos: torch.Tensor) -> None:
    assert Encoder(name).eval()(photos).shape == (2, width, 1, 1)
    assert Encoder(name, stages=2).eval()(photos).shape[2:] == (4, 4)


@pytest.mark.parametrize("name", ["pvt_v2_b1", "pvt_v2_b2_li"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_frozen_encoder_gives_what_timms_gives(name: str, count: int, photos: torch.Tensor) -> None:
    ours = Encoder(name).eval()
    theirs = timm.create_model(name, num_classes=0).eval()
    theirs.load_state_dict(ours.pvt.state_dict())
    normalised = (photos[:count].float() - ours.mean) / ours.std
    with torch.no_grad():
        features, expected = ours(photos[:count]), theirs.forward_features(normalised)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    learning = ours.train()(photos[:count])
    assert learning.requires_grad
    torch.testing.assert_close(learning.detach(), expected, rtol=1e-4, atol=1e-5)  # no dropout in it, no drop path


# The first stage of four such photos is 16 rows of 40 places of 256 numbers, and a part has its neighbours' rows too.
@pytest.mark.parametrize(
    ("most", "first"), [(1, (1, 2 * 40)), (5 * 40 * 256, (1, 5 * 40)), (3 * 16 * 40 * 256, (3, 16 * 40))]
)
def test_a_frozen_encoder_gives_the_same_in_parts(
    most: int, first: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, photos = Encoder("pvt_v2_b0").eval(), torch.randint(0, 256, (4, 3, 64, 160), dtype=torch.uint8)
    parts, whole = [], FeedForward._convolved
    monkeypatch.setattr(FeedForward, "_convolved", lambda *call: parts.append(call[1].shape[:2]) or whole(*call))
    with torch.no_grad():
        expected = encoder(photos)
        assert parts[0] == (4, 16 * 40)
        parts.clear()
        monkeypatch.setattr("pvtcap.encoder._MOST_IN_CACHE", most)
        torch.testing.assert_close(encoder(photos), expected, rtol=1e-5, atol=1e-6)
    assert parts[0] == first


def test_an_encoder_that_is_not_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'pvt_v2_b1'"):
        Encoder("pvt_v2_b11")


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
    for way in (torchs, lambda: cpuloss.cross_entropies(hidden, head, labels, smoothing)):
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
        monkeypatch.setattr(WordEmbedding, "forward", torch.nn.Embedding.forward)
    assert made == [2, 4]  # of positions, and then of words too
    (loss, gradients), (dense_loss, dense) = found
    assert loss == dense_loss
    torch.testing.assert_close(gradients, dense, rtol=1e-5, atol=1e-7)
    assert {one.layout for one in gradients.values()} == {torch.strided}


@pytest.mark.parametrize(
    ("photos", "px", "sizes"),
    [
        (0, 32, [0]),
        (1, 384, [1]),
        (227, 384, [227]),
        (256, 384, [128, 128]),
        (512, 384, [128] * 4),
        (509, 384, [170, 170, 169]),
        (2, 10_000, [1, 1]),
    ],
)
def test_photos_reach_the_encoder_in_even_portions(photos: int, px: int, sizes: list[int]) -> None:
    portions = Encoder.portions(torch.empty((photos, 3, px, px), device="meta"))
    assert [len(one) for one in portions] == sizes


def test_portions_of_photos_give_what_all_of_them_give(
    tree: dict[str, Any], photos: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tree).eval()
    whole = model.patches(photos)
    monkeypatch.setattr(encoder, "_MOST_FEATURES", 1)
    assert len(Encoder.portions(photos)) == len(photos)
    torch.testing.assert_close(model.patches(photos), whole, rtol=1e-5, atol=1e-6)


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
