"""How far a score would move on other photos: bootstrap over images, of one system or of two on the same images.

A resample draws as many images as there are, with replacement. BLEU and METEOR are not means over images, so what
they are computed from (counts of n-grams, matches, lengths) is summed over the resample and the corpus score computed
anew. ROUGE-L, CIDEr and SPICE are means; CIDEr's document frequencies stay those of all references.
Sources: Koehn, "Statistical Significance Tests for Machine Translation Evaluation", 2004; pycocoevalcap's BLEU;
METEOR 1.5's parameters for English.

Shapes: R resamples, N images, K statistics of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES, SEED = 1000, 0
_METEOR_ALPHA, _METEOR_BETA, _METEOR_GAMMA, _METEOR_DELTA = 0.85, 0.2, 0.6, 0.75
_METEOR_STAGES = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase


@dataclass(frozen=True)
class Difference:
    """Score of B less that of A: over all images, its 95% interval, and the share of resamples in which B is better."""

    value: float
    low: float
    high: float
    share_better: float


def intervals(
    per_image: Mapping[str, Sequence[float]], statistics: Mapping[str, Sequence[Sequence[float]]], resamples: int
) -> dict[str, tuple[float, float]]:
    """The 95% interval of each name. ``per_image``: name → N values; ``statistics``: BLEU, METEOR → (N, K)."""
    scores = resampled(per_image, statistics, resamples)
    return {name: _interval(values) for name, values in scores.items()}


def resampled(
    per_image: Mapping[str, Sequence[float]], statistics: Mapping[str, Sequence[Sequence[float]]], resamples: int
) -> dict[str, Floats]:
    """name → the score of each resample, (R,). The same R × N images are drawn whenever N is the same."""
    columns = {name: np.asarray(values, dtype=np.float64)[:, None] for name, values in per_image.items()}
    columns |= {metric: np.asarray(rows, dtype=np.float64) for metric, rows in statistics.items()}
    if not columns:
        return {}
    num_images = len(next(iter(columns.values())))
    draw = np.random.default_rng(SEED)
    sums: dict[str, list[Floats]] = {name: [] for name in columns}
    for _ in range(resamples):
        chosen = draw.integers(0, num_images, num_images)
        for name, rows in columns.items():
            sums[name].append(rows[chosen].sum(axis=0))
    stacked = {name: np.stack(rows) for name, rows in sums.items()}
    scores: dict[str, Floats] = {}
    for name in per_image:
        if name.startswith("Bleu_") and "BLEU" in stacked:
            scores[name] = bleu(stacked["BLEU"])[:, int(name[-1]) - 1]
        elif name == "METEOR" and name in statistics:
            scores[name] = meteor(stacked[name])
        else:
            scores[name] = stacked[name][:, 0] / num_images
    return scores


def difference(a: Floats, b: Floats, value: float) -> Difference:
    """From the scores of two systems on the same resamples; ``value`` is B's score less A's on all images."""
    low, high = _interval(b - a)
    return Difference(value, low, high, float(np.mean(b > a)))


def bleu(sums_RK: Floats) -> Floats:
    """(R, 4): Bleu_1 … Bleu_4 of sums of [length, reference length, 4 × n-grams, 4 × n-grams matched], (R, 10)."""
    small, tiny = 1e-9, 1e-15  # pycocoevalcap's guards against dividing by zero
    precisions = (sums_RK[:, 6:10] + tiny) / (sums_RK[:, 2:6] + small)
    scores = np.cumprod(precisions, axis=1) ** (1 / np.arange(1, 5))
    ratio = (sums_RK[:, 0] + tiny) / (sums_RK[:, 1] + small)
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return np.asarray(scores * brevity[:, None])


def meteor(sums_RK: Floats) -> Floats:
    """(R,): METEOR of sums of ``meteor_counts``, (R, 23).

    That is: words and reference words, function words of both, for each of four stages the content words matched in
    both and the function words matched in both, chunks, words matched in both.
    """
    tiny = 1e-15
    length, reference_length, function, reference_function = sums_RK[:, :4].T
    stages = sums_RK[:, 4:20].reshape(-1, 4, 4)
    delta = _METEOR_DELTA
    matched = (delta * stages[:, :, 0] + (1 - delta) * stages[:, :, 2]) @ _METEOR_STAGES
    reference_matched = (delta * stages[:, :, 1] + (1 - delta) * stages[:, :, 3]) @ _METEOR_STAGES
    precision = matched / (delta * (length - function) + (1 - delta) * function + tiny)
    recall = reference_matched / (
        delta * (reference_length - reference_function) + (1 - delta) * reference_function + tiny
    )
    alpha = _METEOR_ALPHA
    mean = precision * recall / (alpha * precision + (1 - alpha) * recall + tiny)
    chunks, words, reference_words = sums_RK[:, 20:].T
    fragmentation = chunks / ((words + reference_words) / 2 + tiny)
    return np.asarray(mean * (1 - _METEOR_GAMMA * fragmentation**_METEOR_BETA))


def meteor_counts(answer: str) -> list[float]:
    """What the jar answers to SCORE, with no chunk where a caption is its reference word for word: the jar's sums have
    none of those, and so no penalty for them.
    """
    counts = [float(number) for number in answer.split()]
    if len(counts) > 22 and counts[20] == 1 and counts[21:23] == counts[:2]:
        counts[20] = 0.0
    return counts


def _interval(values: Floats) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    # Six digits: what is left of them after sums in another order.
    return round(float(low), 6), round(float(high), 6)
