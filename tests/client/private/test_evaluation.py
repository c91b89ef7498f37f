"""RULES N4 in an evaluation: whatever a task makes of one patient's scores, the others' sum is as it was."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from client.imaging import Cohort, Membership
from client.private import evaluation
from client.private.bench import PrivateBench
from client.private.evaluation import Passes, patient_sum
from models import bounds, networks, tasks, weights
from tests import study_kit
from tests.client.private.private_kit import watched

SPEC = {
    "task": {"kind": "classification", "classes": ["normal", "finding"]},
    "network": {"name": "resnet-small", "norm": "group", "parameters": {}},
    "input": {"channels": 1, "size": [8, 8], "transforms": [], "augmentation": []},
}


CLASSES = ("normal", "finding")


class Odd:
    """A task that fails over images of the second class in one of its methods."""

    def __init__(self, method: str, error: Exception) -> None:
        self._task, self._method, self._error = tasks.get(SPEC), method, error

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._task, name)
        if name != self._method:
            return found

        def odd(outputs: Any, targets: Any, *rest: Any) -> Any:
            if targets.any():
                raise self._error
            return found(outputs, targets, *rest)

        return odd


def cohort(*patients: tuple[int, int]) -> tuple[Cohort, list[Any]]:
    """Patients by number of images and class, and where each one's images are."""
    counts = [images for images, _ in patients]
    generators = [np.random.default_rng(number) for number in range(len(patients))]
    pixels = [made.normal(size=(count, 1, 8, 8)) for made, count in zip(generators, counts, strict=True)]
    names = [str(number) for number, count in enumerate(counts) for _ in range(count)]
    found = Cohort(
        images=np.concatenate([np.zeros((0, 1, 8, 8)), *pixels]).astype(np.float32),
        targets=np.repeat([kind for _, kind in patients], counts).astype(np.int64), patients=tuple(names),
        membership=(Membership.TEST,) * len(names), classes=CLASSES, quarantine=(), scanners=Counter(),
        patient_rule="a test's",
    )  # fmt: skip
    ends = np.cumsum([0, *counts])
    return found, [np.arange(start, end) for start, end in itertools.pairwise(ends)]


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(3)
    return networks.build(SPEC)


@pytest.mark.parametrize("error", [ValueError(), IndexError(), RuntimeError("an odd score"), TypeError()])
@pytest.mark.parametrize("method", ["losses", "statistics"])
def test_N4_a_patient_whose_scores_cannot_be_counted_is_absent_and_nobody_is_told(
    network: torch.nn.Module, method: str, error: Exception
) -> None:
    found, each = cohort((1, 0), (2, 0), (6, 1), (1, 0))
    odd, limits = Odd(method, error), bounds.of(tasks.get(SPEC))
    with watched(network) as (_, told):
        without = patient_sum(network, odd, found, [each[0], each[1], each[3]], limits)
        with_him = patient_sum(network, odd, found, each, limits)
    assert told == []
    assert without[0].any()
    assert np.array_equal(without[0], with_him[0])
    assert np.array_equal(without[1], with_him[1])


def test_N4_images_that_cannot_be_read_are_no_refusal(
    network: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, each = cohort((1, 0))
    monkeypatch.setattr(evaluation.Feed, "batch", lambda *_: (_ for _ in ()).throw(OSError("a bad block")))
    bounded, plain = patient_sum(network, tasks.get(SPEC), found, each, bounds.of(tasks.get(SPEC)))
    assert not bounded.any()
    assert not plain.any()


def test_N4_a_network_that_does_not_compute_is_not_taken_for_odd_images(network: torch.nn.Module) -> None:
    found, each = cohort((1, 0))
    with pytest.raises(RuntimeError):
        patient_sum(network.to(torch.float64), tasks.get(SPEC), found, each, bounds.of(tasks.get(SPEC)))
    network.to(torch.float32)


@pytest.mark.parametrize(
    "patients",
    [(), ((1, 0),), ((4, 1),), ((2, 0), (4, 1), (3, 0)), ((1, 0), (9, 1)), ((1, 0),) * 6],
    ids=["nobody", "one", "as many images as fit", "three", "one with many images", "as many patients as can be"],
)
def test_N4_evaluation_goes_through_the_network_as_often_and_in_one_shape_whoever_is_there(
    network: torch.nn.Module, patients: tuple[tuple[int, int], ...]
) -> None:
    study = study_kit.study(
        privacy={"mode": "per-site", "images_per_patient": 4, "site_patients_bound": 6},
        aggregation={"weights": "equal"},
    )
    found, each = cohort(*patients)
    shapes, asked = list[tuple[int, ...]](), list[bool]()
    hook = network.register_forward_pre_hook(lambda _, received: shapes.append(tuple(received[0].shape)))
    bench = PrivateBench(study, found, tasks.get(SPEC), network, None)
    try:
        bench.evaluated(weights.trainable_vector(network), each, lambda: asked.append(True))
    finally:
        hook.remove()
    assert shapes == [(4, 1, 8, 8)] * 7, "one for the network, and one for each patient that there can be"
    assert len(asked) == 6


def test_a_patients_images_are_all_counted_in_as_many_passes_as_it_takes(network: torch.nn.Module) -> None:
    found, each = cohort((9, 1), (2, 0), (4, 1))
    task = tasks.get(SPEC)
    sums = [patient_sum(network, task, found, each, bounds.of(task), passes=Passes(places, 3)) for places in (1, 4, 64)]
    for bounded, plain in sums:
        np.testing.assert_allclose(bounded, sums[0][0], atol=1e-5)
        np.testing.assert_allclose(plain, sums[0][1], rtol=1e-5)
    assert sums[0][1][0] == 15
    assert sums[0][0][0] == pytest.approx(3.0)
