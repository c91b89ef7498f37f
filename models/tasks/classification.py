"""Classification: which one of K classes does an image show?

The last class of two is the finding that is looked for ("normal", "pneumonia"): AUROC, sensitivity, specificity and F1
are about it. With three or more classes AUROC and F1 are means over the classes, each against the rest.

A statistics vector, float64, is laid out as

    examples 1 · invalid 1 · loss 1 · confusion K·K (row = truth) · per finding: with · without · groups 30

with one finding for two classes and K for more. "with" and "without" are histograms of the score of images with the
finding and of the others, of 1,000 bins for two classes and fewer for many (models/statistics.py gives the error of
the AUROC made of them); "groups" are the sums of the calibration. Counts are exact as float32 up to 2²⁴ images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from models import intervals, statistics
from models.fields import Problem
from models.intervals import Interval
from models.statistics import Floats
from models.tasks import common
from models.tasks.base import Findings, fit, leading

if TYPE_CHECKING:
    import torch

TARGET: Final = "class"
MOST_CLASSES = 100


@dataclass(frozen=True)
class Classification(Findings):
    """See `models.tasks.Task`.

    Attributes:
        classes: their names; a target is an index into them.
        batch_size: the study's batch size, the fixed denominator of the loss.
        noised: whether the sums will carry noise.

    The figures are loss, accuracy, balanced_accuracy, f1, auroc, auroc_error (the bound of the bins, not a standard
    error) and calibration_error; for two classes sensitivity and specificity as well. With three or more classes the
    calibration error is the mean over classes (Kull 2019, arXiv 1910.12656).
    """

    target: Literal["class"] = TARGET

    @property
    def outputs(self) -> int:
        """Scores per image."""
        return len(self.classes)

    @property
    def layout(self) -> list[tuple[str, int]]:
        """Names and sizes of the statistics in the order of the vector."""
        findings = [entry for name in self._found for entry in common.finding_layout(name, self._bins)]
        return [*common.LEADING, ("confusion", self.outputs * self.outputs), *findings]

    @property
    def _found(self) -> tuple[str, ...]:
        """The classes that have a pair of histograms."""
        return self.classes[-1:] if self.outputs == 2 else self.classes

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each image: float32 [n] from raw scores [n, K] and class indices int64 [n]."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs, targets, reduction="none")

    def statistics(
        self, scores: NDArray[Any], targets: NDArray[Any], losses: NDArray[Any], spacing: NDArray[Any] | None = None
    ) -> Floats:
        """The sums over some images.

        An image whose scores or loss are not finite is counted as invalid and nowhere else.

        Args:
            scores: raw network outputs [n, K].
            targets: class indices [n].
            losses: terms of the loss [n].
            spacing: not used.

        Returns:
            float64 [size]; "examples" is n.

        Raises:
            ValueError: the arrays do not belong together, or a target is no index of a class.
        """
        values, truth, terms = np.asarray(scores, np.float64), np.asarray(targets, np.int64), np.asarray(losses)
        fits = fit(values, truth, terms, (self.outputs,), ())
        if len(truth) and not (truth.min() >= 0 and truth.max() < self.outputs):
            raise ValueError(f"a target is outside 0 to {self.outputs - 1}")
        values, truth = values[fits], truth[fits]
        margins = statistics.margins(values)
        pieces = [*leading(fits, terms), statistics.confusion(values.argmax(axis=1), truth, self.outputs)]
        for name in self._found:
            index = self.classes.index(name)
            pieces += common.finding_sums(margins[:, index], truth == index, self._bins)
        return common.vector(pieces)

    def intervals(self, statistics: NDArray[Any]) -> dict[str, Interval]:
        """95 % confidence intervals of accuracy, AUROC, balanced accuracy, sensitivity and specificity."""
        found, parts = self.metrics(statistics), common.parts(self.layout, statistics)
        table = parts["confusion"].reshape(self.outputs, self.outputs)
        hits, rows = np.diag(table), table.sum(axis=1)
        bounds: dict[str, Interval | None] = {"accuracy": intervals.wilson(hits.sum(), rows.sum())}
        if "balanced_accuracy" in found:
            shares = hits / rows
            error = float(np.sqrt((shares * (1 - shares) / rows).sum()) / self.outputs)
            bounds["balanced_accuracy"] = intervals.around(found["balanced_accuracy"], [error], high=1.0)
        if self.outputs == 2:
            bounds["specificity"] = intervals.wilson(hits[0], rows[0])
            bounds["sensitivity"] = intervals.wilson(hits[1], rows[1])
        if "auroc" in found:
            bounds["auroc"] = common.auroc_interval(parts, self._found, found["auroc"])
        return {name: interval for name, interval in bounds.items() if interval is not None}

    def curves(self, statistics: NDArray[Any]) -> dict[str, Any]:
        """What `models.plots` draws: classes, confusion [K, K], and per finding its ROC curve and calibration."""
        parts = common.parts(self.layout, statistics)
        return {
            "classes": list(self.classes),
            "confusion": parts["confusion"].reshape(self.outputs, self.outputs),
            **common.finding_curves(parts, self._found),
        }

    @property
    def _figures(self) -> tuple[str, ...]:
        names = ("accuracy", "balanced_accuracy", "f1", "auroc", "auroc_error", "calibration_error")
        return (*names, "sensitivity", "specificity") if self.outputs == 2 else names

    def _images(self, parts: Mapping[str, Floats]) -> float:
        return float(parts["confusion"].sum())

    def _measure(self, parts: Mapping[str, Floats], found: dict[str, float], missing: dict[str, str]) -> None:
        table = parts["confusion"].reshape(self.outputs, self.outputs)
        found["accuracy"] = float(np.trace(table) / found["images"])
        recalls, f1_scores = statistics.recalls(table), statistics.f1_scores(table)
        absent = [name for name, recall in zip(self.classes, recalls, strict=True) if recall is None]
        without = f"no image of class {', '.join(absent)} was scored"
        common.keep(found, missing, "balanced_accuracy", recalls, without)
        if self.outputs == 2:
            common.keep(found, missing, "specificity", recalls[:1], without)
            common.keep(found, missing, "sensitivity", recalls[1:], without)
            f1_scores = f1_scores[1:]
        common.keep(found, missing, "f1", f1_scores, without)
        common.keep_findings(found, missing, parts, self._found, without)


def create(spec: Mapping[str, Any]) -> Classification:
    """The task of a specification that `problems` found nothing wrong with."""
    batch_size = spec.get("optimiser", {}).get("batch_size", 32)
    return Classification(tuple(spec["task"]["classes"]), batch_size, noised=common.noised(spec))


def problems(section: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the task section."""
    example = 'Write the classes in the order of their numbers, the finding last: ["normal", "pneumonia"].'
    return common.class_names(section, 2, MOST_CLASSES, example)
