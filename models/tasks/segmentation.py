"""Segmentation: to which one of K classes does every pixel or voxel belong?

The first class is the background, the others are the structures looked for. Dice and HD95 are figures of one image
and one structure, and what is told is their mean over images. Dice is taken over the images in which the truth or the
model marks the structure at all. There,

- Dice is 2 |A ∩ B| / (|A| + |B|), so 0 where one of the two is empty;
- HD95 is the larger of the two 95th percentiles of the distances from one surface to the other (as MONAI's
  `compute_hausdorff_distance`), in mm. Where one of the two is empty there is no distance, so it is told twice: "hd95"
  over the images in which both are there, beside the numbers of images missed and invented; and "hd95_all" over the
  same images as Dice, with the diagonal of the image, which no distance exceeds, where one is empty. A model that
  leaves out the hard images makes the first look better, and never the second.

An image in which both are empty has no surface and a Dice of 0/0. It is counted apart: scored as 1, it would lift the
mean of a set of mostly empty slices whatever the model does with the others.

A statistics vector, float64, is laid out as

    examples 1 · invalid 1 · loss 1 · per structure: images 4 · dice 2 · hd95 2 · hd95_all 2 · histogram of dice 20

images: both marked, missed, invented, neither. dice and both hd95: sum and sum of squares. Counts are exact as float32
up to 2²⁴ images; the sums carry float32's relative error of 6e-8.
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
from models.tasks import common, surfaces
from models.tasks.base import Summed, fit, leading

if TYPE_CHECKING:
    import torch

TARGET: Final = "mask"
MOST_CLASSES = 40
DICE_BINS = 20
_BOTH, _MISSED, _INVENTED, _NEITHER = range(4)
_SMOOTH = 1.0
_FIGURES = {"dice": 1.0, "hd95": np.inf, "hd95_all": np.inf}
"""Per-image figures, and their largest value."""


@dataclass(frozen=True)
class Segmentation(Summed):
    """See `models.tasks.Task`. Targets are label maps, uint8 [n, *size], values indices into `classes`.

    Attributes:
        classes: their names, the background first.
        batch_size: the study's batch size, the fixed denominator of the loss.

    The figures are loss, dice, hd95 and hd95_all (means over structures), and per structure dice:name, hd95:name,
    hd95_all:name, missed:name and invented:name (images).
    """

    primary: str = "dice"
    target: Literal["mask"] = TARGET

    @property
    def layout(self) -> list[tuple[str, int]]:
        """Names and sizes of the statistics in the order of the vector."""
        own = (("images", 4), *((figure, 2) for figure in _FIGURES), ("histogram", DICE_BINS))
        return [*common.LEADING, *((f"{name}:{part}", size) for name in self._structures for part, size in own)]

    @property
    def _structures(self) -> tuple[str, ...]:
        return self.classes[1:]

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Dice loss plus cross-entropy of each image, float32 [n].

        Cross-entropy is the mean over the image's pixels. Dice loss (Milletari 2016, arXiv 1606.04797) is one minus
        the mean over structures of (2 Σ p t + 1) / (Σ p + Σ t + 1): an image without a structure costs nothing if
        nothing is marked, and ever more the more is.

        Args:
            outputs: raw scores [n, K, *size].
            targets: label maps, any integer type [n, *size].
        """
        import torch
        from torch.nn.functional import cross_entropy, one_hot

        truth = targets.long()
        entropy = cross_entropy(outputs, truth, reduction="none").flatten(1).mean(1)
        chance = torch.softmax(outputs, 1).flatten(2)
        marked = one_hot(truth.flatten(1), len(self.classes)).movedim(-1, 1).to(chance.dtype)
        shared, total = (chance * marked).sum(2), chance.sum(2) + marked.sum(2)
        overlap = (2 * shared + _SMOOTH) / (total + _SMOOTH)
        return entropy + 1 - overlap[:, 1:].mean(1)

    def statistics(
        self,
        scores: NDArray[Any],
        targets: NDArray[Any],
        losses: NDArray[Any],
        spacing: NDArray[Any] | None = None,
    ) -> Floats:
        """The sums over some images.

        An image whose scores or loss are not finite is counted as invalid and nowhere else.

        Args:
            scores: raw network outputs [n, K, *size].
            targets: label maps [n, *size].
            losses: terms of the loss [n].
            spacing: mm between neighbours along each side [n, dims]; pixels count as 1 mm where it is None.

        Returns:
            float64 [size]; "examples" is n.

        Raises:
            ValueError: the arrays do not belong together, or a target is no index of a class.
        """
        values, truth, terms = np.asarray(scores), np.asarray(targets), np.asarray(losses)
        side = truth.shape[1:]
        fits = fit(values, truth, terms, (len(self.classes), *side), side)
        if truth.size and not (truth.min() >= 0 and truth.max() < len(self.classes)):
            raise ValueError(f"a target is outside 0 to {len(self.classes) - 1}")
        steps = np.ones((len(truth), truth.ndim - 1)) if spacing is None else np.asarray(spacing, np.float64)
        found, pieces = values.argmax(axis=1), leading(fits, terms)
        for number in range(1, len(self.classes)):
            own = np.zeros(10 + DICE_BINS)
            for index in np.flatnonzero(fits):
                _count(own, found[index] == number, truth[index] == number, steps[index])
            pieces.append(own)
        return common.vector(pieces)

    def intervals(self, statistics: NDArray[Any]) -> dict[str, Interval]:
        """95 % confidence intervals of dice, hd95 and hd95_all, where they can be known."""
        found, parts = self.metrics(statistics), common.parts(self.layout, statistics)
        bounds: dict[str, Interval] = {}
        for figure, high in _FIGURES.items():
            errors = [
                intervals.mean_error(total, squares, _scored(parts[f"{name}:images"], figure))
                for name in self._structures
                for total, squares in (parts[f"{name}:{figure}"].tolist(),)
            ]
            named = [(figure, errors), *((f"{figure}:{n}", [e]) for n, e in zip(self._structures, errors, strict=True))]
            for key, of in named:
                interval = intervals.around(found[key], of, 0.0, high) if key in found else None
                if interval is not None:
                    bounds[key] = interval
        return bounds

    def curves(self, statistics: NDArray[Any]) -> dict[str, Any]:
        """What `models.plots` draws: classes, and per structure with a Dice its histogram, mean and interval."""
        found, bounds = self.metrics(statistics), self.intervals(statistics)
        parts = common.parts(self.layout, statistics)
        boxes = {
            name: {
                "histogram": parts[f"{name}:histogram"],
                "mean": found[f"dice:{name}"],
                "interval": bounds.get(f"dice:{name}"),
                "images": parts[f"{name}:images"],
            }
            for name in self._structures
            if f"dice:{name}" in found
        }
        return {"classes": list(self.classes), "dice": boxes}

    @property
    def _figures(self) -> tuple[str, ...]:
        return (*_FIGURES, *(f"{figure}:{name}" for name in self._structures for figure in _FIGURES))

    def _measure(self, parts: Mapping[str, Floats], found: dict[str, float], missing: dict[str, str]) -> None:
        means: dict[str, list[float | None]] = {figure: [] for figure in _FIGURES}
        for name in self._structures:
            for figure, values in means.items():
                scored = _scored(parts[f"{name}:images"], figure)
                values.append(float(parts[f"{name}:{figure}"][0]) / scored if scored > 0 else None)
        for figure, values in means.items():
            absent = ", ".join(name for name, value in zip(self._structures, values, strict=True) if value is None)
            both = f"{absent} was never both there and marked"
            without = both if figure == "hd95" else f"no image shows {absent}, and none was marked"
            common.keep(found, missing, figure, values, without)
            for name, value in zip(self._structures, values, strict=True):
                common.keep(found, missing, f"{figure}:{name}", [value], without)
        for name in self._structures:
            counts = parts[f"{name}:images"]
            found[f"missed:{name}"], found[f"invented:{name}"] = float(counts[_MISSED]), float(counts[_INVENTED])


def _scored(images: Floats, figure: str) -> float:
    """How many images a figure is the mean of."""
    return float(images[_BOTH] if figure == "hd95" else images[:_NEITHER].sum())


def _count(own: Floats, found: NDArray[np.bool_], truth: NDArray[np.bool_], spacing: Floats) -> None:
    """Add one image and one structure to its sums [10 + DICE_BINS]."""
    marked, there = int(np.count_nonzero(found)), int(np.count_nonzero(truth))
    kind = (_BOTH if there else _INVENTED) if marked else (_MISSED if there else _NEITHER)
    own[kind] += 1
    if kind == _NEITHER:
        return
    dice = 2 * np.count_nonzero(found & truth) / (marked + there)
    limit = float(np.linalg.norm(np.array(truth.shape) * spacing))
    apart = min(surfaces.hd95(found, truth, spacing), limit) if kind == _BOTH else limit
    own[4:6] += dice, dice * dice
    if kind == _BOTH:
        own[6:8] += apart, apart * apart
    own[8:10] += apart, apart * apart
    own[10 + min(int(dice * DICE_BINS), DICE_BINS - 1)] += 1


def create(spec: Mapping[str, Any]) -> Segmentation:
    """The task of a specification that `problems` found nothing wrong with."""
    return Segmentation(tuple(spec["task"]["classes"]), spec.get("optimiser", {}).get("batch_size", 32))


def problems(section: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the task section."""
    example = 'Write the background first, then the structures by their numbers in the masks: ["background", "tumour"].'
    return common.class_names(section, 2, MOST_CLASSES, example)
