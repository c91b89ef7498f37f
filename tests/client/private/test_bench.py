"""A study's own constants reach every step: whom it takes, how much it pads, what it divides by, what it draws from."""

from __future__ import annotations

import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from client.imaging import Cohort, Membership
from client.private.bench import PrivateBench
from client.private.step import Constants
from models import networks, tasks, weights
from privacy.study import Study
from tests import study_kit
from tests.client.private.private_kit import watched

CLIP, RATE, STEPS, EXPECTED, LEARNING_RATE = 0.3, 0.25, 8, 7, 0.5


def study(mode: str, **privacy: Any) -> Study:
    return study_kit.study(
        "constants",
        ("a-site", "b-site", "c-site"),
        optimiser={"learning_rate": LEARNING_RATE, "batch_size": 16},
        rounds={"count": 4, "local_steps": 1 if mode == "shared" else STEPS},
        aggregation={"weights": "equal", "minimum_sites": 3},
        privacy={
            "mode": mode, "clip": str(CLIP), "sampling_rate": RATE, "images_per_patient": 1, "patients_bound": 5000,
            "expected_patients": EXPECTED, "site_patients_bound": 200, "delta": 0.0001, **privacy,
        },
        secagg={"mode": "on"},
    )  # fmt: skip


class Site:
    """A private bench with its patients, of whom each has as many images as all others."""

    def __init__(self, study: Study, images: np.ndarray, each: int = 1, augment: Callable[..., Any] | None = None):
        spec, count = study.spec(), len(images)
        torch.manual_seed(3)
        self.network = networks.build(spec)
        cohort = Cohort(
            images=images.astype(np.float32), targets=np.zeros(count, np.int64),
            patients=tuple(f"p{at // each}" for at in range(count)), membership=(Membership.TRAIN,) * count,
            classes=("normal", "finding"), quarantine=(), scanners=Counter(), patient_rule="a test's",
        )  # fmt: skip
        self.patients = list(cohort.groups(Membership.TRAIN).values())
        self.bench = PrivateBench(study, cohort, tasks.get(spec), self.network, augment)
        self.start = weights.trainable_vector(self.network)

    def sum(self, patients: int | None = None) -> np.ndarray:
        """One step's sum over the first patients, or all."""
        return self.bench.gradient_sum(self.start.copy(), self.patients[:patients], lambda: None)

    def trained(self, noised: np.ndarray, patients: int | None = None) -> tuple[np.ndarray, float, list[np.ndarray]]:
        """The update and the loss when the airlock gives `noised` for every step's sum, and those sums."""
        given: list[np.ndarray] = []

        def release(sums: np.ndarray) -> np.ndarray:
            given.append(sums)
            return noised.copy()

        vector = self.start.copy()
        loss = self.bench.trained(1, vector, self.patients[:patients], release, lambda: None)
        return vector, loss, given


def test_the_constants_of_a_step_are_the_studys() -> None:
    found = Constants.of(
        study(
            "shared", clip="0.7", sampling_rate="0.03", images_per_patient=3, augmentations=2, site_patients_bound=700
        )
    )
    assert (found.rate, found.clip, found.images, found.copies, found.places) == (Fraction(3, 100), 0.7, 3, 2, 16)
    assert found.loss_part == pytest.approx(0.7 / 8)
    assert found.least == 18, "21 patients and three deviations of √20.37, two of them with six places each in a batch"


@pytest.mark.parametrize("mode", ["shared", "per-site"])
def test_M3_a_patient_is_in_a_step_with_the_studys_chance_and_weighs_its_clip(mode: str) -> None:
    """Equal patients, so that a sum tells how many of them are in it."""
    site = Site(study(mode), np.ones((200, 1, 8, 8)))
    sums = [site.sum() for _ in range(STEPS)] if mode == "shared" else site.trained(np.zeros(len(site.sum())))[2]
    counts = [float(np.linalg.norm(found)) / (CLIP * (1 - 2**-10)) for found in sums]
    assert len(counts) == STEPS
    np.testing.assert_allclose(counts, np.rint(counts), atol=1e-3)
    coins = 200 * STEPS
    assert abs(sum(counts) - coins * RATE) < 6 * (coins * RATE * (1 - RATE)) ** 0.5
    assert len(set(np.rint(counts).tolist())) > 1, "each patient by a coin of his own"


def test_N4_a_step_is_padded_to_what_the_largest_hospital_needs() -> None:
    site = Site(study("shared"), np.ones((60, 1, 8, 8)))
    seen = []
    for patients in (0, 1, 60):
        with watched(site.network) as noticed:
            site.sum(patients)
        seen.append(noticed)
    assert seen[0] == seen[1] == seen[2] == ([(16, 1, 8, 8)] * 5, []), "69 of 200 patients, 16 in a batch"


def test_M5_an_update_is_the_noised_sums_over_a_public_number_whoever_is_there() -> None:
    site = Site(
        study("per-site", sampling_rate=1, site_patients_bound=16), np.random.default_rng(1).normal(size=(9, 1, 8, 8))
    )
    noised = np.random.default_rng(2).normal(size=len(site.start) + 1)
    noised[-1] = 0.01
    updates, losses, given = zip(*(site.trained(noised, patients) for patients in (0, 1, 9)), strict=True)
    assert [bool(sums[0].any()) for sums in given] == [False, True, True]
    for update in updates:
        np.testing.assert_array_equal(update, updates[0])
        np.testing.assert_allclose(update, -LEARNING_RATE * STEPS / EXPECTED * noised[:-1], atol=1e-5)
    assert losses == pytest.approx([STEPS * 0.01 / EXPECTED * 8 / (CLIP / 8)] * 3)


# ---- what a step draws from ----------------------------------------------------------------------------------


@dataclass
class Drawn:
    """What one step drew: the images of each patient that is in it, the seeds of their augmentation; and its sum."""

    images: dict[int, list[int]]
    seeds: list[int]
    sums: list[float]


def test_N1_the_sample_the_images_and_their_augmentation_follow_the_operating_system_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    each, seen = 6, list[tuple[int, int]]()

    def augment(images: torch.Tensor, seeds: list[int]) -> tuple[torch.Tensor, None]:
        seen.extend(zip(images[:, 0, 0, 0].int().tolist(), seeds, strict=True))
        return images + torch.tensor(seeds)[:, None, None, None] / 2**32, None

    places = np.arange(40 * each, dtype=np.float32)[:, None, None, None] * np.ones((1, 1, 8, 8), np.float32)
    own = study("shared", sampling_rate="0.5", images_per_patient=2, augmentations=2)
    site = Site(own, places, each, augment)

    def drawn(key: int, others: int) -> Drawn:
        """One step while the system's generator plays `key`, and every other one starts from `others`."""
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(others)
        played = np.random.default_rng(key).bytes
        monkeypatch.setattr(random, "_urandom", played)  # what `secrets` draws from
        monkeypatch.setattr(os, "urandom", played)
        seen.clear()
        sums, images = site.sum(), defaultdict[int, list[int]](list)
        for image, _ in seen:
            images[image // each].append(image % each)
        return Drawn(dict(images), [seed for _, seed in seen], sums.tolist())

    first, again, other = drawn(1, 1), drawn(1, 2), drawn(2, 2)
    assert first == again
    assert first.images.keys() != other.images.keys()
    assert any(first.images[patient] != other.images[patient] for patient in first.images.keys() & other.images.keys())
    assert len(set(first.seeds + other.seeds)) == len(first.seeds + other.seeds), "no seed serves twice"
