"""Multi-label classification: which of K findings does an image show, each for itself?

Every class is a finding with a score of its own; its probability is the sigmoid of the score, and it counts as found
from one half on. An answer that nobody knows is written NaN: it costs nothing and is counted nowhere.

A statistics vector, float64, is laid out as

    examples 1 · invalid 1 · loss 1 · exact 1 · per finding: table 4 · with · without · groups 30

table: missed and found among images with the finding, cleared and false alarms among the others. "exact" counts images
of which every known answer is right. The rest is as in `models.tasks.classification`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from models import intervals
from models.fields import Problem
from models.intervals import Interval
from models.statistics import Floats
from models.tasks import common
from models.tasks.base import Findings, fit, leading

if TYPE_CHECKING:
    import torch

TARGET: Final = "labels"
MOST_CLASSES = 40


@dataclass(frozen=True)
class MultiLabel(Findings):
    """See `models.tasks.Task`. Targets are float32 [n, K]: 1, 0 or NaN.

    Attributes:
        classes: names of the findings.
        batch_size: the study's batch size, the fixed denominator of the loss.
        noised: whether the sums will carry noise.

    The figures are loss, exact_match, and as means over findings auroc, auroc_error, calibration_error,
    balanced_accuracy, f1; per finding auroc:name, sensitivity:name and specificity:name.
    """

    target: Literal["labels"] = TARGET

    @property
    def layout(self) -> list[tuple[str, int]]:
        """Names and sizes of the statistics in the order of the vector."""
        findings = [
            entry for name in self.classes for entry in ((f"{name}:table", 4), *common.finding_layout(name, self._bins))
        ]
        return [*common.LEADING, ("exact", 1), *findings]

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy of each image, the mean over all K findings: float32 [n] from raw scores [n, K]."""
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits

        known = ~torch.isnan(targets)
        terms = binary_cross_entropy_with_logits(outputs, torch.where(known, targets, 0.0), reduction="none")
        return torch.where(known, terms, 0.0).mean(1)

    def statistics(
        self, scores: NDArray[Any], targets: NDArray[Any], losses: NDArray[Any], spacing: NDArray[Any] | None = None
    ) -> Floats:
        """The sums over some images.

        An image whose scores or loss are not finite is counted as invalid and nowhere else.

        Args:
            scores: raw network outputs [n, K].
            targets: 1, 0 or NaN [n, K].
            losses: terms of the loss [n].
            spacing: not used.

        Returns:
            float64 [size]; "examples" is n.

        Raises:
            ValueError: the arrays do not belong together, or a target is another number.
        """
        values, truth, terms = np.asarray(scores, np.float64), np.asarray(targets, np.float64), np.asarray(losses)
        fits = fit(values, truth, terms, (len(self.classes),), (len(self.classes),))
        if not np.isin(truth[~np.isnan(truth)], (0.0, 1.0)).all():
            raise ValueError("a target is neither 0 nor 1 nor NaN")
        values, truth = values[fits], truth[fits]
        known, told = ~np.isnan(truth), values >= 0
        exact = np.count_nonzero((~known | (told == (truth == 1))).all(axis=1))
        pieces = [*leading(fits, terms), exact]
        for index in range(len(self.classes)):
            rows = known[:, index]
            finding, marked, margin = truth[rows, index] == 1, told[rows, index], values[rows, index]
            hits = np.count_nonzero(finding & marked), np.count_nonzero(~finding & marked)
            pieces.append([finding.sum() - hits[0], hits[0], (~finding).sum() - hits[1], hits[1]])
            pieces += common.finding_sums(margin, finding, self._bins)
        return common.vector(pieces)

    def intervals(self, statistics: NDArray[Any]) -> dict[str, Interval]:
        """95 % confidence intervals of the AUROCs, of exact_match, and of each sensitivity and specificity."""
        found, parts = self.metrics(statistics), common.parts(self.layout, statistics)
        bounds = {"exact_match": intervals.wilson(float(parts["exact"][0]), found["images"])}
        if "auroc" in found:
            bounds["auroc"] = common.auroc_interval(parts, self.classes, found["auroc"])
        for name in self.classes:
            missed, hit, cleared, alarms = parts[f"{name}:table"]
            bounds[f"auroc:{name}"] = intervals.auroc(parts[f"{name}:with"], parts[f"{name}:without"])
            bounds[f"sensitivity:{name}"] = intervals.wilson(hit, hit + missed)
            bounds[f"specificity:{name}"] = intervals.wilson(cleared, cleared + alarms)
        return {name: interval for name, interval in bounds.items() if interval is not None}

    def curves(self, statistics: NDArray[Any]) -> dict[str, Any]:
        """What `models.plots` draws: classes, and per finding its ROC curve and calibration."""
        parts = common.parts(self.layout, statistics)
        return {"classes": list(self.classes), **common.finding_curves(parts, self.classes)}

    @property
    def _figures(self) -> tuple[str, ...]:
        means = ("auroc", "auroc_error", "calibration_error", "balanced_accuracy", "f1")
        own = (f"{figure}:{name}" for name in self.classes for figure in ("auroc", "sensitivity", "specificity"))
        return ("exact_match", *means, *own)

    def _measure(self, parts: Mapping[str, Floats], found: dict[str, float], missing: dict[str, str]) -> None:
        found["exact_match"] = float(parts["exact"][0] / found["images"])
        tables = [parts[f"{name}:table"] for name in self.classes]
        absent = [name for name, t in zip(self.classes, tables, strict=True) if not (t[:2].sum() and t[2:].sum())]
        without = f"no image with, or none without, {', '.join(absent)} was scored"
        common.keep_findings(found, missing, parts, self.classes, without)
        recalls = [(_share(t[1], t[0]), _share(t[2], t[3])) for t in tables]
        balanced = [None if None in pair else (pair[0] + pair[1]) / 2 for pair in recalls]  # type: ignore[operator]
        common.keep(found, missing, "balanced_accuracy", balanced, without)
        f1 = [_share(2 * t[1], t[0] + t[3]) for t in tables]
        common.keep(found, missing, "f1", f1, without)
        for name, pair in zip(self.classes, recalls, strict=True):
            single: tuple[dict[str, float], dict[str, str]] = ({}, {})
            common.keep_findings(*single, parts, [name], without)
            common.keep(found, missing, f"auroc:{name}", [single[0].get("auroc")], without)
            common.keep(found, missing, f"sensitivity:{name}", [pair[0]], without)
            common.keep(found, missing, f"specificity:{name}", [pair[1]], without)


def _share(part: float, rest: float) -> float | None:
    return float(part / (part + rest)) if part + rest > 0 else None


def create(spec: Mapping[str, Any]) -> MultiLabel:
    """The task of a specification that `problems` found nothing wrong with."""
    batch_size = spec.get("optimiser", {}).get("batch_size", 32)
    return MultiLabel(tuple(spec["task"]["classes"]), batch_size, noised=common.noised(spec))


def problems(section: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the task section."""
    return common.class_names(section, 1, MOST_CLASSES, 'Name the findings: ["effusion", "nodule"].')
