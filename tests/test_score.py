"""pytest tests/test_score.py: scoring files, intervals, and two systems compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from typer.testing import CliRunner, Result

from pvtcap import bootstrap, metrics, ptb
from pvtcap.cli import app
from pvtcap.comparison import PerImage, differences
from pvtcap.errors import PvtcapError

PUBLISHED = ROOT.parent / "shared" / "data" / "metrics"
COCO = ROOT.parent / "shared" / "data" / "coco" / "annotations" / "captions_val2017.json"
WORDS = ["a", "the", "man", "dog", "cat", "on", "in", "near", "red", "green", "small", "large", "sand", "runs", "sits"]


def sentence(draw: np.random.Generator, longest: int = 9) -> str:
    return " ".join(draw.choice(WORDS, draw.integers(3, longest)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.json and b.json (better: a reference for every second image), references.json; ids as numbers and as text."""
    folder, draw = tmp_path_factory.mktemp("score"), np.random.default_rng(0)
    references = {number: [sentence(draw) for _ in range(3)] for number in range(40)}
    a = {number: sentence(draw) for number in references}
    b = {number: references[number][0] if number % 2 else caption for number, caption in a.items()}
    for name, captions in (("a", a), ("b", b)):
        rows = [{"image_id": str(number), "caption": caption} for number, caption in captions.items()]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    annotations = [{"image_id": number, "caption": one} for number, each in references.items() for one in each]
    (folder / "references.json").write_text(json.dumps({"images": [], "annotations": annotations}))
    return folder


def score(*words: object, fast: bool = True) -> Result:
    only = ["--metric", "BLEU", "--metric", "CIDEr"] if fast else []
    return CliRunner().invoke(app, ["score", *map(str, words), *only], env={"COLUMNS": "200"})


def test_scores_of_files_and_what_they_leave(files: Path, tmp_path: Path) -> None:
    done = score(
        files / "a.json", files / "references.json", "--training", files / "references.json", "--out", tmp_path
    )
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "scores.json").read_text())
    assert list(report["scores"]) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "CIDEr"]
    assert report["statistics"]["novel_share"] == 1
    assert f"{report['scores']['CIDEr']:.4f}" in done.output
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert np.mean([line["scores"]["CIDEr"] for line in lines]) == pytest.approx(report["scores"]["CIDEr"])
    for name, (low, high) in report["intervals"].items():
        assert low - 1e-6 <= report["scores"][name] <= high + 1e-6  # intervals have six digits
    # A folder that score left is one that compare takes.
    again = CliRunner().invoke(app, ["compare", str(tmp_path), f"same={tmp_path}"], env={"COLUMNS": "200"})
    assert "+0.0000" in again.output


def test_two_systems_are_compared_on_the_same_resamples(files: Path) -> None:
    done = score("--compare", files / "a.json", files / "b.json", files / "references.json")
    assert done.exit_code == 0, done.output
    assert "b less a, paired bootstrap" in done.output
    assert "100.0% of resamples" in done.output


def test_no_torch_is_imported_and_no_metric_is_forgotten(files: Path, tmp_path: Path) -> None:
    code = "import sys; from pvtcap.cli import main\ntry: main()\nfinally: sys.exit(3 if 'torch' in sys.modules else 0)"
    words = ["score", files / "a.json", files / "references.json", "--out", tmp_path, "--java-heap-mib", "2"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "METEOR is unavailable: " in done.stdout
    assert "tokens by pvtcap's own in Python" in done.stdout
    values = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert [name for name, value in values.items() if value is None] == ["METEOR", "SPICE"]


@pytest.mark.parametrize(
    ("results", "says"),
    [
        ("[", "a.json: not JSON"),
        ("{}", "a.json: not COCO's results; got dict"),
        ('[{"image_id": 1}]', r'a.json, item 0: no caption of an image; got {"image_id": 1}'),
        ('[{"image_id": 1, "caption": "x"}, {"image_id": "1", "caption": "y"}]', "two captions for one image"),
        ('[{"image_id": 1, "caption": "x"}]', "images without a caption; got 39 of 40 (0, 2, 3, …)"),
        ('[{"image_id": 77, "caption": "x"}]', "40 of 40"),
    ],
)
def test_files_that_are_not_what_they_should_be(files: Path, tmp_path: Path, results: str, says: str) -> None:
    (tmp_path / "a.json").write_text(results)
    done = score(tmp_path / "a.json", files / "references.json")
    assert isinstance(done.exception, PvtcapError)
    assert says in str(done.exception)


def test_captions_of_odd_characters_are_scored_and_compared(tmp_path: Path) -> None:
    """Half a surrogate pair, which JSON can carry and UTF-8 cannot, and what Unicode calls the end of a line."""
    captions = ["a \\ud800 dog", "a\\u2028cat runs", "two\\u0085birds fly"]
    rows = ", ".join(f'{{"image_id": {number}, "caption": "{caption}"}}' for number, caption in enumerate(captions))
    (tmp_path / "a.json").write_text(f"[{rows}]")
    (tmp_path / "references.json").write_text(f'{{"annotations": [{rows}]}}')
    done = score(tmp_path / "a.json", tmp_path / "references.json", "--metric", "CIDEr", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert '"caption": "a ? dog"' in (tmp_path / "captions.jsonl").read_text(encoding="utf-8")
    again = CliRunner().invoke(app, ["compare", str(tmp_path), f"same={tmp_path}"], env={"COLUMNS": "200"})
    assert again.exit_code == 0, again.output
    assert "+0.0000" in again.output


def test_a_subset_is_scored_where_it_is_asked_for(files: Path, tmp_path: Path) -> None:
    rows = json.loads((files / "a.json").read_text())[:5]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert score(tmp_path / "a.json", files / "references.json", "--subset", "--out", tmp_path).exit_code == 0
    assert json.loads((tmp_path / "scores.json").read_text())["num_photos"] == 5


def test_words_that_score_does_not_take(files: Path) -> None:
    for words in (
        [files / "a.json"],
        ["--compare", files / "a.json", files / "b.json"] + [files / "references.json"] * 2,
    ):
        assert "other files than 'pvtcap score' takes" in str(score(*words).exception)


def test_a_resamples_bleu_is_the_bleu_of_its_images() -> None:
    draw = np.random.default_rng(1)
    pairs = [(sentence(draw), [sentence(draw) for _ in range(3)]) for _ in range(30)]

    def corpus(chosen: list[int]) -> tuple[Any, list[list[float]]]:
        scorer: Any = BleuScorer(n=4)
        for number in chosen:
            scorer += pairs[number]
        values, _ = scorer.compute_score(option="closest")
        rows = []
        for image in scorer.ctest:
            closest = min((abs(one - image["testlen"]), one) for one in image["reflen"])[1]
            rows.append([image["testlen"], closest, *image["guess"], *image["correct"]])
        return values, rows

    for _ in range(5):
        values, rows = corpus(list(draw.integers(0, 30, 30)))
        assert bootstrap.bleu(np.array([rows], dtype=float).sum(axis=1))[0] == pytest.approx(values, abs=1e-12)


def test_an_interval_covers_what_other_photos_would_give() -> None:
    """Of a mean it is the interval of textbooks: 1.96 standard errors."""
    values = np.random.default_rng(2).normal(size=500)
    low, high = bootstrap.intervals({"CIDEr": list(values)}, {}, 1000)["CIDEr"]
    error = 1.96 * values.std() / np.sqrt(500)
    assert (low, high) == (
        pytest.approx(values.mean() - error, abs=0.02),
        pytest.approx(values.mean() + error, abs=0.02),
    )


def test_systems_on_other_images_are_not_compared() -> None:
    one, other = (PerImage([name], {"CIDEr": 1.0}, {"CIDEr": [1.0]}, {}) for name in "ab")
    with pytest.raises(PvtcapError, match="not the same images; got 1 only in the first, 1 only in the second"):
        differences(one, other)


def test_tokens_without_java() -> None:
    for caption, tokens in (
        (
            "A man's dog isn't here, it's (almost) gone...",
            "a man 's dog is n't here , it 's -lrb- almost -rrb- gone ...",
        ),
        ("The U.S. flag at 11:30 a.m. for $1,000.50!", "the u.s. flag at 11:30 a.m. for $ 1,000.50 !"),
        ('Salt &amp; pepper, a T-shirt and/or 1/2 "cup".', "salt & pepper , a t-shirt and/or 1/2 '' cup '' ."),
        ("I cannot wanna café\n", "i can not wan na café"),
        ("", ""),
    ):
        assert " ".join(ptb.tokenize(caption)) == tokens


def test_meteors_sums_have_no_penalty_for_captions_that_are_their_references() -> None:
    pairs = [
        ("a large green star on the left", ["a large green star on the left"]),
        ("a small red circle on right", ["a small red circle on the right", "there is a circle"]),
        ("the star is big", ["a star that is big"]),
        ("one two three", ["one two three"]),
    ]
    references = {str(number): texts for number, (_, texts) in enumerate(pairs)}
    candidates = {str(number): text for number, (text, _) in enumerate(pairs)}
    scores = metrics.score(references, candidates, ["METEOR"])
    rows = np.array([one["METEOR"] for one in scores.statistics.values()])
    assert bootstrap.meteor(rows.sum(axis=0)[None])[0] == pytest.approx(scores.values["METEOR"], abs=1e-12)
    low, high = scores.intervals["METEOR"]
    assert low < scores.values["METEOR"] < high


@pytest.mark.skipif(not COCO.exists(), reason=f"needs {COCO}")
def test_published_scores_of_coco_captions_example() -> None:
    """Per image, to three decimals: for the 126 images of the example whose references are in val2017's annotations."""
    references: dict[str, list[str]] = {}
    pool = set(json.loads((PUBLISHED / "image_ids_with_refs_in_captions_pool.json").read_text()))
    for row in json.loads(COCO.read_text())["annotations"]:
        if row["image_id"] in pool:
            references.setdefault(str(row["image_id"]), []).append(row["caption"])
    results = json.loads((PUBLISHED / "captions_val2014_fakecap_results.json").read_text())
    candidates = {str(row["image_id"]): row["caption"] for row in results if str(row["image_id"]) in references}
    published = json.loads((PUBLISHED / "captions_val2014_fakecap_evalImgs.json").read_text())
    scores = metrics.score(references, candidates, ["BLEU", "METEOR", "ROUGE_L"])
    assert len(candidates) == 126
    by_image = {str(row["image_id"]): row for row in published}
    for image_id, values in scores.per_image.items():
        # They print three digits, the last one rounded.
        assert values == {name: pytest.approx(by_image[image_id][name], abs=5.001e-4) for name in values}
    # METEOR's own formula, from which the intervals come, is the jar's.
    rows = np.array([one["METEOR"] for one in scores.statistics.values()])
    assert bootstrap.meteor(rows.sum(axis=0)[None])[0] == pytest.approx(scores.values["METEOR"], abs=1e-12)
