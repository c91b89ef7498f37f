"""What does an opened sum say when every hospital has put its share of noise on it?

The face is that of any opened sum (`server.aggregate.Total`), so that the step and the figures need not know. What a
step is divided by is a public constant of the study, never a count of patients; the numbers of an evaluation are
brought back to their units. All of it acts on what was released already, so it costs no privacy.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from models import additive, bounds, schedule
from models.tasks import Task
from privacy.entries import decimal_fraction
from privacy.mechanisms import DEVIATIONS, LOSS_PART, Mechanism, evaluation, training
from privacy.secagg.fixed import Opened
from privacy.study import Study

Doubles = npt.NDArray[np.float64]


class Noised:
    """How the sums of one study with shared noise are read.

    Args:
        size: d, numbers of the gradient.
    """

    def __init__(self, study: Study, task: Task, size: int) -> None:
        self._study, self._bounds = study, bounds.of(task)
        self.training: Mechanism = training(study, size)
        self.evaluation: Mechanism = evaluation(study, len(self._bounds.caps), self._bounds.reach)

    def step(self, opened: Opened, start: int, stop: int, round_: int) -> Doubles:
        """A part of the step of a round (from 1): −η(round) · Σ / expected patients, float64 [stop - start]."""
        optimiser, rounds = self._study.optimiser, self._study.rounds
        rate = schedule.rate(float(optimiser.learning_rate), optimiser.schedule, (round_ - 1) / rounds.count)
        found = self.training.read(opened.words[start : min(stop, opened.size)])
        found *= -rate / self._study.privacy.expected_patients
        return found

    def statistics(self, opened: Opened) -> Doubles:
        """The statistics of a sum, float64 [m], laid out as `models.additive` says; patients count where images do.

        Of a training sum they hold the loss, summed over patients and divided by how many are expected; of an
        evaluation the task's sums.
        """
        words = opened.words[opened.size :]
        statistics = np.zeros(len(words), np.float64)
        leading = len(additive.LEADING)
        if opened.size:
            privacy = self._study.privacy
            unit = bounds.LOSS_CAP / float(decimal_fraction(privacy.clip) * LOSS_PART)
            loss = float(self.training.read(words[additive.LOSS : additive.LOSS + 1])[0]) * unit
            statistics[:leading] = 0.0, max(0.0, loss), privacy.expected_patients
            return statistics
        statistics[leading:] = self.evaluation.read(words[leading:]) * self._bounds.caps
        return statistics

    def excess(self, opened: Opened) -> str:
        """Why an opened training sum cannot come from sites that keep to the study; "" when it can."""
        mechanism, norm = self.training, opened.whole_norm() * float(self.training.grid)
        noise = float(mechanism.deviation * mechanism.grid) * math.sqrt(opened.sites)
        most = self._study.privacy.patients_bound * float(mechanism.clip)
        most += noise * (math.sqrt(opened.size) + DEVIATIONS)
        if norm <= most:
            return ""
        return (
            f"the opened sum has norm {norm:.4g}, and sites that keep to the study cannot exceed {most:.4g}; "
            "one of them runs something else"
        )
