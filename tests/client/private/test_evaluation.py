"""RULES N4 in an evaluation: whatever a task makes of one patient's scores, the others' sum is as it was."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from client.imaging import Cohort, Membership
from client.private.evaluation import patient_sum
from models import bounds, networks, tasks

SPEC = {
    "task": {"kind": "classification", "classes": ["normal", "finding"]},
    "network": {"name": "resnet-small", "norm": "group", "parameters": {}},
    "input": {"channels": 1, "size": [8, 8], "transforms": [], "augmentation": []},
}


class Odd:
    """A task that fails over the images of the second class."""

    def __init__(self, error: Exception) -> None:
        self._task, self._error = tasks.get(SPEC), error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def statistics(self, outputs: Any, targets: Any, *rest: Any) -> Any:
        """As the task has them."""
        if targets.any():
            raise self._error
        return self._task.statistics(outputs, targets, *rest)


@pytest.mark.parametrize("error", [ValueError(), IndexError(), RuntimeError("an odd score"), TypeError()])
def test_N4_a_patient_whose_scores_cannot_be_counted_is_absent_and_nobody_is_told(error: Exception) -> None:
    torch.manual_seed(3)
    network, odd = networks.build(SPEC), Odd(error)
    found = Cohort(
        images=np.random.default_rng(1).normal(size=(4, 1, 8, 8)).astype(np.float32),
        targets=np.array([0, 0, 1, 0], np.int64), patients=("a", "b", "c", "d"), membership=(Membership.TEST,) * 4,
        classes=("normal", "finding"), quarantine=(), scanners=Counter(), patient_rule="a test's",
    )  # fmt: skip
    each = [np.array([at]) for at in range(4)]
    limits = bounds.of(tasks.get(SPEC))
    without = patient_sum(network, odd, found, [each[0], each[1], each[3]], limits)
    with_him = patient_sum(network, odd, found, each, limits)
    assert without[0].any()
    assert np.array_equal(without[0], with_him[0])
    assert np.array_equal(without[1], with_him[1])
