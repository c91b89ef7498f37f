"""How much can one patient add to a task's sums? Public caps, so that an evaluation can be noised.

With noise on an evaluation sums one vector for each patient: the mean over the patient's images of each image's sums
(RULES N6). `of` says for every number of a task's layout the cap it is cut to, and how large a patient's vector can be
once each number is divided by its cap. The caps are constants of this file: none is read off anybody's images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

LOSS_CAP = 8.0
"""Largest term of the loss that counts, in nats: the cross-entropy of a certainty of one in 3,000."""
DISTANCE_CAP = 100.0
"""Largest surface distance that counts, in mm."""

_ONE_OF_MANY = frozenset({"confusion", "with", "without", "table", "images", "histogram"})
"""Parts in which an image counts one in one place at most: however long, they have length 1."""
_MOMENTS = {"dice": 1.0, "hd95": DISTANCE_CAP, "hd95_all": DISTANCE_CAP}
"""Parts that hold a figure of an image and its square: the figure's cap."""
_GROUPS = 3
"""Calibration: images, found, and chance of each group; an image is in one group."""


class HasLayout(Protocol):
    """A task, as far as this file needs it."""

    @property
    def layout(self) -> list[tuple[str, int]]:
        """Names and sizes of its sums, in order."""
        ...


@dataclass(frozen=True)
class Bounds:
    """What one patient can add.

    Attributes:
        caps: float64 [size], the largest absolute value of each number of a patient's mean.
        reach: the largest L2 norm of a patient's mean divided by `caps`.
    """

    caps: NDArray[np.float64]
    reach: float


def of(task: HasLayout) -> Bounds:
    """The bounds of a task's sums.

    Raises:
        ValueError: the task has a part whose bound is not known here.
    """
    caps: list[float] = []
    square = 0.0
    for name, size in task.layout:
        part = name.rpartition(":")[2]
        if part in _ONE_OF_MANY or (part in {"examples", "invalid", "exact"} and size == 1):
            caps += [1.0] * size
            square += 1.0
        elif part == "loss":
            caps.append(LOSS_CAP)
            square += 1.0
        elif part == "groups":
            caps += [1.0] * size
            square += _GROUPS
        elif part in _MOMENTS:
            caps += [_MOMENTS[part], _MOMENTS[part] ** 2]
            square += 2.0
        else:
            raise ValueError(f"{name}: how much one patient can add to it is not known")
    return Bounds(np.array(caps), math.sqrt(square))


def settle(task: HasLayout, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Noised sums as counts can be: nothing below zero, each histogram with the total that it came with.

    Cutting every bin at zero would add the noise of the empty ones; instead each histogram becomes the nearest one
    without a number below zero that has the same total (Duchi 2008, doi:10.1145/1390156.1390191). Acts on what is
    released already, so it costs no privacy.

    Args:
        sums: float64 [size]; not changed.
    """
    settled, start = np.empty_like(sums), 0
    for name, size in task.layout:
        part, kind = sums[start : start + size], name.rpartition(":")[2]
        pieces = np.split(part, _GROUPS) if kind == "groups" else [part]
        histogram = kind == "groups" or kind in _ONE_OF_MANY
        found = [_nearest(piece) if histogram else np.maximum(piece, 0.0) for piece in pieces]
        settled[start : start + size] = np.concatenate(found)
        start += size
    return settled


def _nearest(histogram: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest histogram without a number below zero and with the same total, or all zero."""
    total = float(histogram.sum())
    if total <= 0.0:
        return np.zeros_like(histogram)
    falling = np.sort(histogram)[::-1]
    above = (np.cumsum(falling) - total) / np.arange(1, len(falling) + 1)
    shift = above[np.flatnonzero(falling > above)[-1]]
    return np.asarray(np.maximum(histogram - shift, 0.0))
