"""Which sums over images are enough to know how good a classifier is, and how exact are the figures made of them?

Every array here is additive: the sums of two sites added are the sums of their union. AUROC is not a mean over images
and cannot be added, so each image is counted in one of `BINS` bins of its score, apart for images with and without the
finding; the area follows from the two histograms (Mann-Whitney statistic, Hanley & McNeil 1982,
doi:10.1148/radiology.143.1.7063747). Pairs that fall into one bin count one half, whatever their order, so with p_b
and n_b images in bin b, P = Σ p_b and N = Σ n_b,

    |AUROC of the bins − AUROC of the scores| ≤ ½ Σ_b p_b n_b / (P N),

since in bin b at most p_b n_b pairs are off by at most one half each. The bound is computed with the figure.

The binned score is the margin log p/(1 − p) of the class, not its probability p: the same order, but sure answers do
not crowd into the bins at 0 and 1. Bins are equally wide on [−LIMIT, LIMIT]; what lies beyond stands in the end bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 1000
LIMIT = 12.5
"""Margins beyond ±12.5 (probabilities within 4e-6 of 0 or 1) share the end bins."""

GROUPS = 10
"""Groups of probability, each a tenth wide, in which what was predicted is held against what was found."""

NAMES = {
    "images": "Images",
    "invalid": "Without a score",
    "auroc": "AUROC",
    "auroc_error": "AUROC, error of the bins at most",
    "loss": "Loss",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "f1": "F1",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "calibration_error": "Expected calibration error",
    "exact_match": "All findings right",
    "dice": "Dice",
    "hd95": "HD95, mm",
    "hd95_all": "HD95, mm, the diagonal where it was missed or invented",
    "missed": "Images where it was missed",
    "invented": "Images where it was invented",
}
"""Metrics as people write them. What follows a colon in a metric's name is the class that it is about."""

COUNTS = ("images", "invalid", "missed", "invented")
"""Metrics that are whole numbers of images."""


def title(metric: str) -> str:
    """A metric as people write it: "dice:tumour" is "Dice, tumour"."""
    name, _, about = metric.partition(":")
    return f"{NAMES.get(name, name)}, {about}" if about else NAMES.get(name, name)


Floats = NDArray[np.float64]


def margins(scores: NDArray[Any]) -> Floats:
    """log p/(1 − p) of the softmax probability p of every class.

    Args:
        scores: raw network outputs, finite, [n, K].

    Returns:
        float64 [n, K]; finite where the scores are within float32.
    """
    values = np.asarray(scores, dtype=np.float64)
    others = np.empty_like(values)
    for column in range(values.shape[1]):
        rest = np.delete(values, column, axis=1)
        top = rest.max(axis=1, keepdims=True)
        others[:, column] = top[:, 0] + np.log(np.exp(rest - top).sum(axis=1))
    return values - others


def histogram(margin: NDArray[Any], bins: int = BINS) -> Floats:
    """How many margins fall into each bin: float64 [bins], from margins [n]."""
    position = (np.clip(margin, -LIMIT, LIMIT) + LIMIT) * (bins / (2 * LIMIT))
    index = np.minimum(position.astype(np.int64), bins - 1)
    return np.bincount(index, minlength=bins).astype(np.float64)


def edges(bins: int = BINS) -> Floats:
    """The probabilities at the bins + 1 edges of the bins, rising."""
    return probability(np.linspace(-LIMIT, LIMIT, bins + 1))


def probability(margin: NDArray[Any]) -> Floats:
    """The probability of a margin, float64."""
    return 1.0 / (1.0 + np.exp(-np.clip(np.asarray(margin, np.float64), -700, 700)))


def calibration_sums(margin: NDArray[Any], truth: NDArray[Any]) -> Floats:
    """For each group of probability: images, images with the finding, and the sum of what was predicted.

    Args:
        margin: [n].
        truth: bool [n].

    Returns:
        float64 [3 · GROUPS]; the first two thirds are exact counts.
    """
    chance = probability(margin)
    group = np.minimum((chance * GROUPS).astype(np.int64), GROUPS - 1)
    rows = (np.ones_like(chance), np.asarray(truth, np.float64), chance)
    return np.concatenate([np.bincount(group, weights=row, minlength=GROUPS) for row in rows])


def calibration(sums: NDArray[Any]) -> dict[str, Floats]:
    """The reliability diagram of `calibration_sums` (Guo 2017, arXiv 1706.04599), groups without images left out.

    Returns:
        "predicted" (mean probability), "observed" (share with the finding), "images", each [groups].
    """
    images, found, chance = np.asarray(sums, np.float64).reshape(3, GROUPS)
    known = images > 0
    counts = images[known]
    return {"predicted": chance[known] / counts, "observed": found[known] / counts, "images": counts}


def calibration_error(sums: NDArray[Any]) -> float | None:
    """Expected calibration error: mean |predicted − observed| of the groups, by their images; None without images."""
    diagram = calibration(sums)
    if not diagram["images"].sum() > 0:
        return None
    apart = np.abs(diagram["predicted"] - diagram["observed"])
    return float(apart @ diagram["images"] / diagram["images"].sum())


def auroc(positive: NDArray[Any], negative: NDArray[Any]) -> tuple[float, float] | None:
    """Area under the ROC curve and its error bound; None when one of the histograms is empty.

    Args:
        positive, negative: counts [BINS] of images with and without the finding, bins by rising score.
    """
    with_finding, without = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    pairs = with_finding.sum() * without.sum()
    if not pairs > 0:
        return None
    below = np.cumsum(without) - without
    ties = float(with_finding @ without) / 2
    return float((with_finding @ below + ties) / pairs), float(ties / pairs)


def roc(positive: NDArray[Any], negative: NDArray[Any]) -> tuple[Floats, Floats] | None:
    """The ROC curve as (false positive rate, true positive rate), each [BINS + 1] from 0 to 1; None as for `auroc`."""
    with_finding, without = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    if not (with_finding.sum() > 0 and without.sum() > 0):
        return None
    hits = np.concatenate([[0.0], np.cumsum(with_finding[::-1])]) / with_finding.sum()
    false_alarms = np.concatenate([[0.0], np.cumsum(without[::-1])]) / without.sum()
    return false_alarms, hits


def confusion(predicted: NDArray[Any], targets: NDArray[Any], classes: int) -> Floats:
    """Counts float64 [K, K]: row = true class, column = predicted class."""
    index = np.asarray(targets, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(index, minlength=classes * classes).astype(np.float64).reshape(classes, classes)


def recalls(table: NDArray[Any]) -> list[float | None]:
    """Per true class the share that was recognised; None for a class without images. `table` as from `confusion`."""
    return [float(row[index] / row.sum()) if row.sum() > 0 else None for index, row in enumerate(np.asarray(table))]


def f1_scores(table: NDArray[Any]) -> list[float | None]:
    """Per class 2 TP / (2 TP + FP + FN); None where no image has the class and none was given it."""
    counts = np.asarray(table)
    totals = counts.sum(axis=0) + counts.sum(axis=1)
    return [float(2 * counts[k, k] / totals[k]) if totals[k] > 0 else None for k in range(len(counts))]
