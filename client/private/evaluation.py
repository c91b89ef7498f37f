"""What may a site tell of how good a model is on its patients? A sum of bounded vectors, one for each patient.

A patient's vector is the mean over the patient's images of the task's sums, each number cut to its public cap and
divided by it (`models.bounds`), and the whole cut to its public reach. A patient whose numbers are not all finite
counts as zero (RULES N4, N6). Nothing here leaves: the sum goes to the airlock, which puts the noise on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from client.feed import Feed, compute
from client.imaging import Cohort
from models.bounds import Bounds
from models.tasks import Task

if TYPE_CHECKING:
    from torch import nn

Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
BATCH = 64
VALUES = 2**21
"""Images and their values that are looked at together, whichever is fewer."""


def patient_sum(
    network: nn.Module,
    task: Task,
    cohort: Cohort,
    patients: Sequence[Indices],
    bounds: Bounds,
    check: Callable[[], None] = lambda: None,
) -> tuple[Doubles, Doubles]:
    """The bounded sum over patients, and the plain one that stays at the site.

    Args:
        patients: the positions of each patient's images.
        check: called between batches; raises to stop.

    Returns:
        float64 [size], of which each patient adds at most `bounds.reach` in L2 norm; and float64 [size], the task's own
        sums over the same images.
    """
    import torch

    feed = Feed(cohort, task, next(network.parameters()).device)
    bounded, plain = np.zeros(task.size), np.zeros(task.size)
    together = max(1, min(BATCH, VALUES // math.prod(cohort.images.shape[1:])))
    network.eval()
    with torch.inference_mode():
        for images in patients:
            mine = np.zeros(task.size)
            for start in range(0, len(images), together):
                check()
                chosen = images[start : start + together]
                batch, targets = feed.batch(chosen)
                outputs = compute(network, batch)
                losses = task.losses(outputs, targets)
                try:
                    mine += task.statistics(
                        outputs.cpu().numpy(), targets.cpu().numpy(), losses.cpu().numpy(), cohort.spacing[chosen]
                    )
                except Exception:  # noqa: BLE001  whatever a task makes of odd scores, the release goes on (RULES N4)
                    mine[...] = np.nan
            plain += np.nan_to_num(mine)
            bounded += bound(mine / max(1, len(images)), bounds)
    return bounded, plain


def bound(mean: Doubles, bounds: Bounds) -> Doubles:
    """One patient's part, float64 [size]: of L2 norm at most `bounds.reach`, zero where a number is not finite."""
    if not np.isfinite(mean).all():
        return np.zeros_like(mean)
    part = np.clip(mean / bounds.caps, -1.0, 1.0)
    norm = float(np.linalg.norm(part))
    return part if norm <= bounds.reach else part * (bounds.reach / norm)
