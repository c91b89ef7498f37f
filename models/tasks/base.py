"""What is every task made of? The parts of `models.tasks.Task` that hang on no one question.

`Summed` reads a vector of sums: its size, its figures, and why one of them cannot be known. `Findings` is a `Summed`
whose images each have a score per finding, and whose figures are made of histograms of that score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.statistics import Floats
from models.tasks import common

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Summed(ABC):
    """See `models.tasks.Task`.

    Attributes:
        classes: their names.
        batch_size: the study's batch size, the fixed denominator of the loss.
    """

    classes: tuple[str, ...]
    batch_size: int

    @property
    @abstractmethod
    def layout(self) -> list[tuple[str, int]]:
        """Names and sizes of the statistics in the order of the vector."""

    @property
    def size(self) -> int:
        """Numbers in a statistics vector."""
        return sum(size for _, size in self.layout)

    @abstractmethod
    def losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """One term per image, float32 [n]."""

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of `losses` over the study's batch size. No class weights: they would be counted from patients."""
        return self.losses(outputs, targets).sum() / self.batch_size

    def metrics(self, statistics: NDArray[Any]) -> dict[str, float]:
        """The figures of a statistics vector [size], all finite: images, invalid, and those of `_figures` that can be
        known.

        Raises:
            ValueError: the vector has another size or holds a number that is not finite.
        """
        return self._evaluate(statistics)[0]

    def missing(self, statistics: NDArray[Any]) -> dict[str, str]:
        """Why each metric that `metrics` leaves out cannot be known."""
        return self._evaluate(statistics)[1]

    @property
    @abstractmethod
    def _figures(self) -> Sequence[str]:
        """The figures beside the loss that cannot be known without an image."""

    def _images(self, parts: Mapping[str, Floats]) -> float:
        """How many images the figures are about."""
        return float(parts["examples"][0]) - float(parts["invalid"][0])

    @abstractmethod
    def _measure(self, parts: Mapping[str, Floats], found: dict[str, float], missing: dict[str, str]) -> None:
        """Note each of `_figures`, or why it cannot be known; there are found["images"] > 0 images."""

    def _evaluate(self, vector: NDArray[Any]) -> tuple[dict[str, float], dict[str, str]]:
        parts = common.parts(self.layout, vector)
        images = self._images(parts)
        found, missing = {"images": images, "invalid": float(parts["invalid"][0])}, dict[str, str]()
        if not images > 0:
            return found, dict.fromkeys(("loss", *self._figures), common.NO_IMAGE)
        found["loss"] = float(parts["loss"][0] / images)
        self._measure(parts, found, missing)
        return found, missing


@dataclass(frozen=True)
class Findings(Summed):
    """A `Summed` of images with a score per finding; `noised` says whether the sums will carry noise."""

    noised: bool = False
    primary: str = "auroc"

    @property
    def _found(self) -> tuple[str, ...]:
        """The classes that have a pair of histograms."""
        return self.classes

    @property
    def _bins(self) -> int:
        return common.bins_for(len(self._found), noised=self.noised)


def fit(
    scores: NDArray[Any], targets: NDArray[Any], losses: NDArray[Any], outputs: Sequence[int], answer: Sequence[int]
) -> NDArray[np.bool_]:
    """Which images have finite scores and a finite loss, bool [n].

    Args:
        scores: [n, *outputs].
        targets: [n, *answer].
        losses: [n].
        outputs: the shape of one image's scores.
        answer: the shape of one image's target.

    Raises:
        ValueError: the arrays do not belong together.
    """
    count = losses.shape
    if losses.ndim != 1 or scores.shape != (*count, *outputs) or targets.shape != (*count, *answer):
        raise ValueError(
            f"scores {scores.shape}, targets {targets.shape} and losses {losses.shape} do not belong together"
        )
    finite: NDArray[np.bool_] = np.isfinite(scores).all(axis=tuple(range(1, scores.ndim))) & np.isfinite(losses)
    return finite


def leading(fits: NDArray[np.bool_], losses: NDArray[Any]) -> list[Any]:
    """The sums that `common.LEADING` names, of images that fit [n] or do not, and their losses [n]."""
    return [len(fits), np.count_nonzero(~fits), losses[fits].sum(dtype=np.float64)]
