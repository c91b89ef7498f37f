"""What do the numbers behind an update mean? The one layout of the statistics that a site appends to its answer.

The sites' vectors are added up, and every figure of a round comes from the sum. First the leading fields below, then
the task's own sums over the images that were scored (`Task.layout`). What does not apply to a message is zero: an
evaluation trained on nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

LEADING: tuple[str, ...] = ("train_examples", "train_loss_sum", "train_steps")
"""train_examples: training images of the site, its weight in the mean; train_loss_sum: sum over its local steps of the
batch's mean loss; train_steps: how many steps that were."""
LOSS = LEADING.index("train_loss_sum")


class HasLayout(Protocol):
    """A task, as far as this file needs it."""

    @property
    def layout(self) -> Sequence[tuple[str, int]]:
        """Names and sizes of the task's own sums, in order."""
        ...


def layout(task: HasLayout) -> list[tuple[str, int]]:
    """Names and sizes of all statistics, in the order in which they travel."""
    return [*((name, 1) for name in LEADING), *task.layout]


def size(task: HasLayout) -> int:
    """m, how many numbers that is."""
    return sum(count for _, count in layout(task))


def fill(
    into: npt.NDArray[Any],
    sums: npt.NDArray[np.float64],
    *,
    train_examples: int = 0,
    train_loss_sum: float = 0.0,
    train_steps: int = 0,
) -> None:
    """Write leading fields and a task's sums (float64 [m - 3]) into float32 [m]."""
    into[: len(LEADING)] = (train_examples, train_loss_sum, train_steps)
    into[len(LEADING) :] = sums


def leading(vector: npt.NDArray[Any]) -> dict[str, float]:
    """The leading fields of a statistics vector [m], of one site or summed."""
    return {name: float(value) for name, value in zip(LEADING, vector, strict=False)}


def task_sums(vector: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The part that `Task.metrics` and `Task.curves` read: float64 [m - 3]."""
    return np.asarray(vector[len(LEADING) :], dtype=np.float64)
