"""The child process of a metric: python -m pvtcap.scorers METRIC FOLDER TIMEOUT_S; see ``metrics``.

It waits for FOLDER/tokens.json, [[references …], candidate] an image, and leaves FOLDER/METRIC.json:

    scores       [corpus value, [a value an image]] for each name of the metric
    statistics   a list of numbers an image, for BLEU and METEOR: see ``bootstrap``; else null
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pvtcap.bootstrap import meteor_counts
from pvtcap.errors import EvaluationError
from pvtcap.java import spice_command
from pvtcap.jobs import last_words

TOKENS = "tokens.json"
Captions = dict[int, list[str]]
Result = tuple[list[tuple[float, Sequence[float]]], list[list[float]] | None]


def _main(metric: str, folder: Path, timeout_s: float) -> NoReturn:
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, lambda number, _: sys.exit(f"asked to stop by {signal.Signals(number).name}"))
        # For a parent that was killed and cannot stop us; twice, as the tokenizer may take as long.
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 10)
        scores, statistics = {"BLEU": _bleu, "METEOR": _meteor, "SPICE": _spice}.get(metric, _mean)(metric, folder)
        results = [(float(value), [float(one) for one in each]) for value, each in scores]
        num_images = len(_tokens(folder)[0])
        for value, each in results:
            if len(each) != num_images or not all(map(math.isfinite, [value, *each])):
                raise EvaluationError("a score is missing or not a finite number", got=f"{value} of {len(each)} images")
        written = json.dumps({"scores": results, "statistics": statistics})
        (folder / f"{metric}.json").write_text(written, encoding="utf-8")
        code = 0
    finally:
        if code:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)  # an ordinary exit runs Meteor.__del__, which waits for the lock that a failure left taken


def _tokens(folder: Path) -> tuple[Captions, Captions]:
    """References and candidates by the image's number, as soon as they are there."""
    while not (folder / TOKENS).exists():
        time.sleep(0.02)
    pairs = json.loads((folder / TOKENS).read_text(encoding="utf-8"))
    return dict(enumerate(refs for refs, _ in pairs)), {i: [c] for i, (_, c) in enumerate(pairs)}


def _mean(metric: str, folder: Path) -> Result:
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references, candidates = _tokens(folder)
    return [{"ROUGE_L": Rouge, "CIDEr": Cider}[metric]().compute_score(references, candidates)], None


def _bleu(metric: str, folder: Path) -> Result:
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer: Any = BleuScorer(n=4)
    references, candidates = _tokens(folder)
    for image, captions in references.items():
        scorer += (candidates[image][0], captions)
    values, each = scorer.compute_score(option="closest", verbose=0)
    statistics = []
    for image in scorer.ctest:
        length = image["testlen"]
        closest = min((abs(one - length), one) for one in image["reflen"])[1]
        statistics.append([length, closest, *image["guess"], *image["correct"]])
    return list(zip(values, each, strict=True)), statistics


def _meteor(metric: str, folder: Path) -> Result:
    from pycocoevalcap.meteor.meteor import Meteor

    statistics: list[list[float]] = []

    class Recording(Meteor):  # type: ignore[misc]  # pycocoevalcap has no types
        """Keeps what the jar answers for each image."""

        def _stat(self, candidate: str, references: list[str]) -> str:
            answer = str(super()._stat(candidate, references))
            statistics.append(meteor_counts(answer))
            return answer

    meteor = Recording()  # reads its tables while the captions are still being tokenized
    try:
        return [meteor.compute_score(*_tokens(folder))], statistics
    except (OSError, ValueError) as error:  # a broken pipe, or an answer that is not a number
        meteor.meteor_p.kill()
        raise EvaluationError("java stopped answering", got=last_words(meteor.meteor_p.stderr.read())) from error
    finally:
        meteor.meteor_p.kill()
        meteor.meteor_p.wait()


def _spice(metric: str, folder: Path) -> Result:
    """The F-score over tuples of objects, attributes and relations. Not through its wrapper, which downloads."""
    references, candidates = _tokens(folder)
    images = [{"image_id": i, "test": candidates[i][0], "refs": captions} for i, captions in references.items()]
    given, out = folder / "spice_in.json", folder / "spice_out.json"
    given.write_text(json.dumps(images), encoding="utf-8")
    code = subprocess.run(spice_command(given, out), cwd=folder, check=False).returncode
    if code:
        raise EvaluationError(f"SPICE's java ended with code {code}")
    by_image = {item["image_id"]: float(item["scores"]["All"]["f"]) for item in json.loads(out.read_bytes())}
    each = [by_image[image] for image in references]
    return [(sum(each) / len(each), each)], None


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
