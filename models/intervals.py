"""How sure is a figure that was made of sums? 95 % confidence intervals, none of which needs a single image.

They tell what another sample of images of the same hospitals would give. Images of one patient resemble each other,
and the sums do not say which belong together, so with several images a patient an interval is too narrow.

| figure | interval |
|---|---|
| a proportion | Wilson 1927, doi:10.1080/01621459.1927.10502953 |
| AUROC | DeLong 1988, doi:10.2307/2531595, its placements taken from the histograms |
| a mean of per-image values | normal, from the sum and the sum of squares |
| a mean of several figures | its standard error is at most the mean of theirs, whatever their correlation |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054
Interval = tuple[float, float]


def wilson(hits: float, count: float) -> Interval | None:
    """The interval of hits/count; None without a count."""
    if not count > 0:
        return None
    share = hits / count
    centre = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def auroc_error(positive: NDArray[Any], negative: NDArray[Any]) -> float | None:
    """The standard error of the AUROC of two histograms [bins]; None with fewer than two images on a side.

    The placement of an image with the finding is the share of those without that score below it, ties one half.
    """
    with_finding, without = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    many, few = with_finding.sum(), without.sum()
    if not (many > 1 and few > 1):
        return None
    below = (np.cumsum(without) - without + without / 2) / few
    above = (many - np.cumsum(with_finding) + with_finding / 2) / many
    return math.sqrt(_variance(below, with_finding) / many + _variance(above, without) / few)


def auroc(positive: NDArray[Any], negative: NDArray[Any]) -> Interval | None:
    """The interval of an AUROC, on the scale of its logit so that it stays within 0 and 1.

    Where every image is in order the error estimates to nothing; the interval is then that of a proportion of the
    smaller group.
    """
    error = auroc_error(positive, negative)
    if error is None:
        return None
    many, few = float(np.sum(positive)), float(np.sum(negative))
    without = np.asarray(negative, np.float64)
    area = float(np.asarray(positive, np.float64) @ (np.cumsum(without) - without / 2)) / (many * few)
    if error == 0 or not 0 < area < 1:
        return wilson(area * min(many, few), min(many, few))
    logit, scaled = math.log(area / (1 - area)), Z * error / (area * (1 - area))
    return 1 / (1 + math.exp(-(logit - scaled))), 1 / (1 + math.exp(-(logit + scaled)))


def mean_error(total: float, squares: float, count: float) -> float | None:
    """The standard error of a mean, from sum, sum of squares and count; None for fewer than two."""
    if not count > 1:
        return None
    return math.sqrt(max(0.0, squares - total * total / count) / (count - 1) / count)


def around(value: float, errors: Sequence[float | None], low: float = 0.0, high: float = math.inf) -> Interval | None:
    """value ± Z times the mean of some standard errors, within [low, high]; None when one is not known."""
    known = [error for error in errors if error is not None]
    if not known or len(known) < len(errors):
        return None
    half = Z * float(np.mean(known))
    return max(low, value - half), min(high, value + half)


def _variance(values: NDArray[Any], counts: NDArray[Any]) -> float:
    """The variance of values that occur `counts` times each, with n − 1."""
    total = counts.sum()
    mean = float(values @ counts) / total
    return float(((values - mean) ** 2) @ counts / (total - 1))
