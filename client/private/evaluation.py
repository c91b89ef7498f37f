"""What may a site tell of how good a model is on its patients? A sum of bounded vectors, one for each patient.

A patient's vector is the mean over the patient's images of the task's sums, each number cut to its public cap and
divided by it (`models.bounds`), and the whole cut to its public reach. A patient whose numbers are not all finite
counts as zero (RULES N4, N6). Nothing here leaves: the sum goes to the airlock, which puts the noise on.

No two patients share a pass through the network: histograms have edges, and what float32 rounds may depend on who is
beside. Passes have one shape, and there are at least as many as the largest hospital has patients (RULES N4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from client.feed import Feed, compute
from client.imaging import Cohort
from models.bounds import Bounds
from models.tasks import Task
from privacy.study import Study

if TYPE_CHECKING:
    from torch import nn

Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Passes:
    """How an evaluation goes through the network, by public constants.

    Attributes:
        places: images in one pass; black ones stand where a patient has fewer.
        least: passes, whoever is there.
    """

    places: int = 4
    least: int = 0

    @classmethod
    def of(cls, study: Study) -> Passes:
        """One pass for each patient of the largest hospital. One with more images than `places` needs further passes,
        and time tells if they are more than are spare (docs/privacy.md).
        """
        return cls(study.privacy.images_per_patient, study.privacy.site_patients_bound)


def patient_sum(
    network: nn.Module,
    task: Task,
    cohort: Cohort,
    patients: Sequence[Indices],
    bounds: Bounds,
    check: Callable[[], None] = lambda: None,
    passes: Passes = Passes(),
) -> tuple[Doubles, Doubles]:
    """The bounded sum over patients, and the plain one that stays at the site.

    Args:
        patients: the positions of each patient's images.
        check: called before each pass; raises to stop.

    Returns:
        float64 [size], of which each patient adds at most `bounds.reach` in L2 norm; and float64 [size], the task's own
        sums over the same images.
    """
    import torch

    device = next(network.parameters()).device
    feed, black = Feed(cohort, task, device), torch.zeros((passes.places, *cohort.images.shape[1:]), device=device)
    bounded, plain = np.zeros(task.size), np.zeros(task.size)

    def looked_at(chosen: Indices) -> Doubles:
        """The task's sums over some images; on the processor, where an odd target harms nothing but its own patient."""
        images, targets = feed.batch(chosen)
        padded = black.clone()
        padded[: len(chosen)] = images
        outputs, targets = compute(network, padded)[: len(chosen)].cpu(), targets.cpu()
        losses = task.losses(outputs, targets)
        return task.statistics(outputs.numpy(), targets.numpy(), losses.numpy(), cohort.spacing[chosen])

    network.eval()
    made = 0
    with torch.inference_mode():
        compute(network, black)  # what fails here fails whoever is there, and may be told
        for images in patients:
            mine = np.zeros(task.size)
            for start in range(0, len(images), passes.places):
                check()
                made += 1
                try:
                    mine += looked_at(images[start : start + passes.places])
                except Exception:  # noqa: BLE001  whatever is made of odd images, the release goes on (RULES N4)
                    mine[...] = np.nan
            plain += np.nan_to_num(mine)
            bounded += bound(mine / max(1, len(images)), bounds)
        for _ in range(made, passes.least):
            check()
            compute(network, black)
    return bounded, plain


def bound(mean: Doubles, bounds: Bounds) -> Doubles:
    """One patient's part, float64 [size]: of L2 norm at most `bounds.reach`, zero where a number is not finite."""
    if not np.isfinite(mean).all():
        return np.zeros_like(mean)
    part = np.clip(mean / bounds.caps, -1.0, 1.0)
    norm = float(np.linalg.norm(part))
    return part if norm <= bounds.reach else part * (bounds.reach / norm)
