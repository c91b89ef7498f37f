"""Which questions can a model be trained to answer? Each task is one file; `get` finds it.

A task says what is counted at a site (`layout`, `statistics`), how the counts of all sites together become the
figures people read (`metrics`, `curves`), and what is minimised (`loss`). Statistics are sums over images, so the
statistics of two sites added are the statistics of their union, and no site's figures are needed to know the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.fields import Problem, unknown
from models.intervals import Interval
from models.tasks import classification, multilabel, segmentation

if TYPE_CHECKING:
    import torch


Target = Literal["class", "labels", "mask"]
"""What an image's answer is: a class index, int64; 0 or 1 (NaN: not known) per label, float32 [K]; or a label map,
uint8 [*size]."""


class Task(Protocol):
    """What every task can do. Only `losses` and `loss` need torch."""

    @property
    def layout(self) -> list[tuple[str, int]]:
        """Names and sizes of the statistics, in the order of the vector; the first is always ("examples", 1)."""
        ...

    @property
    def size(self) -> int:
        """Numbers in a statistics vector: the sum of the layout's sizes."""
        ...

    @property
    def target(self) -> Target:
        """What the answers look like that `losses` and `statistics` take."""
        ...

    @property
    def primary(self) -> str:
        """The metric by which rounds are compared; higher is better."""
        ...

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """One term per image, float32 [n]; the term of an image depends on that image alone."""
        ...

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of the terms over the study's batch size, a fixed number also where the last batch is short."""
        ...

    def statistics(
        self, scores: NDArray[Any], targets: NDArray[Any], losses: NDArray[Any], spacing: NDArray[Any] | None = None
    ) -> NDArray[np.float64]:
        """The sums over some images, float64 [size]; zeros for no image. Spacing in mm, [n, dims], for masks."""
        ...

    def metrics(self, statistics: NDArray[Any]) -> dict[str, float]:
        """The figures of a statistics vector, all finite; one that cannot be known is left out."""
        ...

    def missing(self, statistics: NDArray[Any]) -> dict[str, str]:
        """Why each metric that was left out cannot be known."""
        ...

    def intervals(self, statistics: NDArray[Any]) -> dict[str, Interval]:
        """95 % confidence intervals (low, high) of those metrics that have one."""
        ...

    def curves(self, statistics: NDArray[Any]) -> dict[str, Any]:
        """What the plots draw."""
        ...


class Kind(Protocol):
    """What the file of a task offers."""

    TARGET: Target

    def create(self, spec: Mapping[str, Any]) -> Task:
        """The task of a specification in which `problems` found nothing."""
        ...

    def problems(self, section: Mapping[str, Any]) -> list[Problem]:
        """What is wrong with the task section."""
        ...


TASKS: dict[str, Kind] = {
    "classification": classification,
    "multilabel": multilabel,
    "segmentation": segmentation,
}
"""Every kind of task that a study can name."""


def get(spec: Mapping[str, Any]) -> Task:
    """The task of a specification.

    Raises:
        ValueError: the kind does not exist.
    """
    wrong = problems(spec["task"])
    if wrong:
        raise ValueError("; ".join(str(problem) for problem in wrong))
    return TASKS[spec["task"].get("kind", "classification")].create(spec)


def problems(section: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the task section."""
    kind = section.get("kind", "classification")
    if not isinstance(kind, str) or kind not in TASKS:
        return [unknown("task.kind", "task", str(kind), TASKS)]
    return TASKS[kind].problems(section)


def target(section: Mapping[str, Any]) -> Target | None:
    """What the answers of a task section look like; None for a kind that does not exist."""
    kind = section.get("kind", "classification")
    return TASKS[kind].TARGET if isinstance(kind, str) and kind in TASKS else None
