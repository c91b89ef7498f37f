"""What does a site add to one optimiser step? The sum over sampled patients of their clipped mean gradients, exactly.

Each patient of the frozen cohort is in the step with chance q (`client.private.sample`). Up to m of a patient's images,
in k augmented forms each, are averaged first, then clipped (`client.private.gradients`): unit is the patient, and a
patient changes the sum by at most C however many images there are. Work is padded to a public number of batches of one
shape, so that what is done does not depend on who was sampled (RULES N4). What comes out has no noise yet and goes
nowhere but to the airlock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from client.feed import Augment, Feed
from client.imaging import Cohort
from client.private import sample
from client.private.gradients import PatientGradients, capped_loss
from models import bounds
from models.tasks import Task
from privacy.entries import decimal_fraction
from privacy.mechanisms import LOSS_PART
from privacy.study import Study

if TYPE_CHECKING:
    from torch import Tensor, nn

DEVIATIONS = 3.0
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Constants:
    """The public constants of a step, all of them from the signed study.

    Attributes:
        rate: q.
        clip: C.
        loss_part: how much of it the capped loss may be.
        images: m, at most so many images of a patient.
        copies: k, augmented forms of each.
        places: images in one batch.
        least: batches of a step, whoever is sampled: enough for `DEVIATIONS` above the mean of a hospital of the
            largest size. In one step of about a thousand such a hospital needs more, and time tells (RULES N4).
    """

    rate: Fraction
    clip: float
    loss_part: float
    images: int
    copies: int
    places: int
    least: int

    @classmethod
    def of(cls, study: Study) -> Constants:
        """The constants of a study."""
        privacy, places = study.privacy, study.optimiser.batch_size
        rate, clip = decimal_fraction(privacy.sampling_rate), decimal_fraction(privacy.clip)
        forms = privacy.images_per_patient * privacy.augmentations
        mean = float(rate * privacy.site_patients_bound)
        expected = math.ceil(mean + DEVIATIONS * math.sqrt(mean * (1.0 - float(rate))))
        least = math.ceil(expected / max(1, places // forms))
        return cls(
            rate, float(clip), float(clip * LOSS_PART), privacy.images_per_patient, privacy.augmentations,
            places, least,
        )  # fmt: skip


class Step:
    """The private steps of one network on one cohort."""

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        cohort: Cohort,
        patients: Sequence[Indices],
        constants: Constants,
        augment: Augment | None = None,
    ) -> None:
        """Prepare.

        Args:
            patients: the positions of each eligible patient's training images.

        Raises:
            ConsiliumError: the network has a part whose gradients cannot be told apart by patient.
        """
        self._patients, self._constants = patients, constants
        loss = capped_loss(bounds.LOSS_CAP, constants.loss_part / bounds.LOSS_CAP)
        self._gradients = PatientGradients(network, task, constants.clip, loss)
        self._seeds = sample.Seeds() if augment is not None else None
        self._cohort, self._device = cohort, next(network.parameters()).device
        self._feed = Feed(cohort, task, self._device, augment)

    def sum(self, check: Callable[[], None] = lambda: None) -> Doubles:
        """One step: float64 [d + 1], the clipped sum of gradients, and behind it that of the capped losses.

        Args:
            check: called between batches; raises to stop.
        """
        constants = self._constants
        chosen = np.flatnonzero(sample.poisson(len(self._patients), constants.rate))
        groups = [sample.some(self._patients[int(at)], constants.images) for at in chosen]
        total = np.zeros(self._gradients.size)
        for batch in sample.batches(groups, constants.copies, constants.places, constants.least):
            check()
            total += self._gradients.sum(*self._padded(batch), batch.owner)
        return total

    def _padded(self, batch: sample.Batch) -> tuple[Tensor, Tensor]:
        """Images and targets of a batch; black images of the first class stand for padding."""
        import torch

        images, targets = (
            torch.zeros(
                (self._constants.places, *array.shape[1:]), dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype
            )
            for array in (self._cohort.images, self._cohort.targets)
        )
        images, targets = images.to(self._device), targets.to(self._device)
        if len(batch.images):
            real_images, real_targets = self._read(batch.images)
            images[: len(batch.images)], targets[: len(batch.images)] = real_images, real_targets
        return images, targets

    def _read(self, chosen: Indices) -> tuple[Tensor, Tensor]:
        """Some images, augmented. One that cannot be is not a number anywhere, so that its patient counts as zero and
        nobody else notices (RULES N4).
        """
        import torch

        try:
            return self._feed.batch(chosen, self._seeds)
        except Exception:  # noqa: BLE001  whatever a library makes of an odd image, the release goes on
            if len(chosen) > 1:
                parts = [self._read(chosen[at : at + 1]) for at in range(len(chosen))]
                images, targets = (torch.cat(part) for part in zip(*parts, strict=True))
                return images, targets
            targets = torch.from_numpy(np.array(self._cohort.targets[chosen])).to(self._device)
            shape = (1, *self._cohort.images.shape[1:])
            return torch.full(shape, torch.nan, device=self._device), targets
