"""pytest tests/test_heatmaps.py"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import tiny_tree, torchrun
from PIL import Image

from pvtcap import evaluate as evaluation
from pvtcap.captioner import Captioner
from pvtcap.config import Config
from pvtcap.dist import World
from pvtcap.errors import EvaluationError
from pvtcap.heatmaps import heated, word_maps
from pvtcap.htmlreport import WordPicture, page, shown
from pvtcap.text import CaptionTokenizer


@pytest.fixture
def model(config: Config) -> tuple[Captioner, CaptionTokenizer]:
    tokenizer = CaptionTokenizer.train(["a red circle", "a blue square left of it"], 60, "a picture of")
    return Captioner(config, tokenizer.size).eval(), tokenizer


def test_a_token_looks_where_its_queries_meet_the_keys(model: tuple[Captioner, CaptionTokenizer]) -> None:
    """Against softmax(q kᵀ / √d), from what the layer's own matrices gave."""
    captioner, tokenizer = model
    attention = captioner.decoder.lm.bert.encoder.layer[0].crossattention.self
    seen: dict[str, torch.Tensor] = {}
    for name in ("query", "key"):
        getattr(attention, name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    patches = torch.randn(2, 16, 32)
    tokens = torch.tensor([tokenizer.prefix, tokenizer.prefix])
    found = captioner.decoder.photo_attention(patches, tokens)
    queries, keys = (seen[name].unflatten(2, (2, 16)).transpose(1, 2) for name in ("query", "key"))
    wanted = ((queries @ keys.transpose(2, 3)) / 4).softmax(-1).mean(1)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, len(tokenizer.prefix)))
    assert captioner.decoder.lm.config._attn_implementation == "sdpa"


def test_a_words_map_is_that_of_the_tokens_that_chose_its_pieces(model: tuple[Captioner, CaptionTokenizer]) -> None:
    captioner, tokenizer = model
    caption = "a red circleft."  # a word that is not in the vocabulary, of several pieces
    words = tokenizer.words(caption)
    assert [word for word, _ in words] == ["a", "red", "circleft", "."]
    pieces = [id_ for _, ids in words for id_ in ids]
    assert len(words[2][1]) > 1
    assert tokenizer.pack([[caption]], 40).labels[0].tolist() == [*pieces, tokenizer.end_id]
    photo = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    maps = word_maps(captioner, tokenizer, photo, caption)
    assert [one.word for one in maps] == [word for word, _ in words]
    ids = torch.tensor([[*tokenizer.prefix, *pieces]])
    with torch.inference_mode():
        by_token = captioner.decoder.photo_attention(captioner.patches(photo[None]), ids)[0]
    first = len(tokenizer.prefix) - 1
    assert maps[0].attention.shape == (4, 4)
    np.testing.assert_allclose(maps[0].attention.ravel(), by_token[first], rtol=1e-5)
    many = len(words[2][1])
    np.testing.assert_allclose(maps[2].attention.ravel(), by_token[first + 2 : first + 2 + many].mean(0), rtol=1e-5)
    assert all(abs(one.attention.sum() - 1) < 1e-5 for one in maps)
    assert word_maps(captioner, tokenizer, photo, "") == []


def test_the_photo_is_grey_and_hot_where_it_looks() -> None:
    attention = np.zeros((3, 3), dtype=np.float32)
    attention[0, 2] = 1.0
    hot = np.asarray(heated(Image.new("RGB", (90, 60), (200, 200, 200)), attention), dtype=int)
    assert hot.shape == (60, 90, 3)
    assert hot[59, 0].tolist() == [150, 150, 150]
    assert hot[0, 89].tolist() == pytest.approx([229, 202, 38], abs=1)  # a quarter of the grey, three of the yellow
    even = np.asarray(heated(Image.new("RGB", (9, 6), (200, 200, 200)), np.full((3, 3), 1 / 9, dtype=np.float32)))
    assert (even == 150).all()


def test_the_report_shows_them_folded_up(shapes: Path, tmp_path: Path) -> None:
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    rows = [{"key": f"{n}", "caption": "a <b>", "references": ["r"], "scores": {"CIDEr": n / 9}} for n in range(60)]
    assert {row["key"] for row in shown(rows)} >= {"0", "19", "48", "59"}
    report: dict[str, Any] = {
        "num_photos": 60, "data": "d", "checkpoint": "c", "blank_photos": False, "unavailable": {}, "num_missing": 0,
        "generation": {"num_beams": 3, "top_p": None, "max_length": 9, "precision": "fp32"},
        "scores": {}, "intervals": {}, "statistics": {},
    }  # fmt: skip
    html = page(report, rows, lambda _: jpeg.getvalue(), {"0": [WordPicture("a", b"1"), WordPicture("<b>", b"2")]})
    assert html.count("<details>") == 1
    assert '<span><img src="data:image/jpeg;base64,Mg==" alt="">&lt;b&gt;</span>' in html
    assert "<details>" not in page(report, rows, lambda _: jpeg.getvalue())


def test_evaluate_draws_them_when_asked(shapes: Path, tmp_path: Path) -> None:
    """By the command, of a run of two steps; and it has none to draw over features of photos."""
    tree = tiny_tree(shapes, tmp_path / "run")
    tree["train"] |= {"steps": 2, "what": "projection+decoder"}
    tree["model"] |= {"encoder_stages": 4}
    weights = tmp_path / "encoder.pth"
    torch.save(timm.create_model("pvt_v2_b0", num_classes=0).state_dict(), weights)
    tree["model"]["encoder_weights"] = str(weights)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    for words in (
        ["train", str(tmp_path / "tiny.yaml")],
        ["evaluate", str(tmp_path / "run"), "--data", str(shapes / "val"), "--out", str(tmp_path / "out"),
         "--heat-maps", "--max-length", "6", "--min-length", "5"],
    ):  # fmt: skip
        done = torchrun(1, "-m", "pvtcap", *words)
        assert done.returncode == 0, done.stderr[-4000:]
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("<summary>where it looked</summary>") == 33  # eleven photos, in each section
    features = tmp_path / "features"
    made = torchrun(
        1, "-m", "pvtcap", "features", str(tmp_path / "tiny.yaml"), "--data", str(shapes / "val"), "--out",
        str(features),
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-4000:]
    how = Config.model_validate(tree).evaluate
    with World.start() as world, pytest.raises(EvaluationError, match="drawn over photos"):
        evaluation.run(tmp_path / "run", features, tmp_path / "none", world, how, heat_maps=True)
    assert not (tmp_path / "none").exists()
