"""What is computed for a study with noise? One step's sum, a round of noised steps, or an evaluation's sum.

Nothing here adds noise: a sum goes to `release`, which is the airlock's, and what comes back may be used freely.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from client.feed import Augment
from client.imaging import Cohort
from client.optimiser import Optimiser
from client.private import fitness
from client.private.evaluation import Passes, patient_sum
from client.private.step import Constants, Step
from client.training import Plan
from models import bounds, weights
from models.tasks import Task
from privacy.entries import decimal_fraction
from privacy.mechanisms import LOSS_PART
from privacy.messages import Vector
from privacy.study import Study

if TYPE_CHECKING:
    from torch import nn

Doubles = npt.NDArray[np.float64]
Patients = Sequence[npt.NDArray[np.int64]]
Check = Callable[[], None]


class PrivateBench:
    """The noised side of one warm study.

    Args:
        network: on its device.
        augment: for training images.

    Raises:
        ConsiliumError: gradients of single patients cannot be taken of the network; nothing was charged yet.
    """

    def __init__(self, study: Study, cohort: Cohort, task: Task, network: nn.Module, augment: Augment | None) -> None:
        fitness.demand(network)
        self._study, self._cohort, self._task, self._network = study, cohort, task, network
        self._augment, self._constants = augment, Constants.of(study)
        self.bounds = bounds.of(task)

    def gradient_sum(self, parameters: Vector, patients: Patients, check: Check) -> Doubles:
        """One step's sum at the received parameters: float64 [d + 1], clipped gradients and clipped losses."""
        weights.load_trainable(self._network, parameters)
        return self._step(patients).sum(check)

    def evaluated(self, parameters: Vector, patients: Patients, check: Check) -> tuple[Doubles, str]:
        """An evaluation's bounded sum over patients, float64 [size], and the plain figures, JSON for this site only."""
        weights.load_trainable(self._network, parameters)
        passes = Passes.of(self._study)
        bounded, plain = patient_sum(self._network, self._task, self._cohort, patients, self.bounds, check, passes)
        try:
            figures = json.dumps(self._task.metrics(plain), sort_keys=True)
        except Exception:  # noqa: BLE001  what the images hold never stops a release (RULES N4)
            figures = ""
        return bounded, figures

    def trained(
        self,
        round_number: int,
        parameters: Vector,
        patients: Patients,
        release: Callable[[Doubles], Doubles],
        check: Check,
    ) -> float:
        """A round of noised steps; the update is written over `parameters`.

        Args:
            release: puts the noise on a step's sum.

        Returns:
            The sum over steps of the noised mean loss, in nats.
        """
        import torch

        privacy, plan = self._study.privacy, Plan.of(self._study)
        weights.load_trainable(self._network, parameters)
        step, layout = self._step(patients), weights.Layout.of(self._network)
        own = dict(self._network.named_parameters())
        moved = [own[name] for name in layout.split(parameters)]
        optimiser = Optimiser(plan.optimiser, moved, plan.momentum, plan.weight_decay)
        held = [parameter.detach().clone() for parameter in moved]
        unit = bounds.LOSS_CAP / float(decimal_fraction(privacy.clip) * LOSS_PART)
        loss = 0.0
        for number in range(plan.local_steps):
            check()
            noised = release(step.sum(check)) / privacy.expected_patients
            loss += max(0.0, float(noised[-1])) * unit
            parts = layout.split(noised[:-1].astype(np.float32))
            for parameter, start, part in zip(moved, held, parts.values(), strict=True):
                parameter.grad = torch.from_numpy(np.array(part)).to(parameter.device)
                if plan.proximal_mu:
                    parameter.grad.add_(parameter.detach() - start, alpha=plan.proximal_mu)
            optimiser.step(plan.rate(round_number, number))
        optimiser.clear()
        parameters[...] = weights.trainable_vector(self._network) - parameters
        return loss if math.isfinite(loss) else 0.0

    def _step(self, patients: Patients) -> Step:
        # as in evaluation: dropout would draw from a generator that is not the system's, for a whole batch at once
        self._network.eval()
        return Step(self._network, self._task, self._cohort, patients, self._constants, self._augment)
