"""What is done to a sum before it leaves: saturate, round, integer noise; and what one patient can change of it."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.airlock import Airlock
from privacy.charge import Charge
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.journal import Journal
from privacy.mechanisms import CLIP_ROOM, DEVIATIONS, Mechanism, evaluation, training
from privacy.noise import Source
from privacy.study import Study
from tests import study_kit
from tests.study_kit import FIVE

MECHANISM = Mechanism(Fraction(1), 40, Fraction(16), Fraction(1, 2), 5)
KEY = bytes(range(32))


def draft(mode: str = "shared", steps: int = 1, **more: object) -> str:
    return study_kit.draft(
        sites=FIVE,
        optimiser={"learning_rate": 0.5, "batch_size": 8},
        rounds={"count": 20, "local_steps": steps},
        aggregation={"weights": "equal", "minimum_sites": 4},
        privacy={
            "mode": mode, "noise_multiplier": 1.2, "sampling_rate": 0.1, "site_patients_bound": 100,
            "patients_bound": 500, **more,
        },
        secagg={"mode": "on"},
    )  # fmt: skip


def study(mode: str = "shared", steps: int = 1, **more: object) -> Study:
    return Study.from_toml(draft(mode, steps, **more))


def grid_of(sums: np.ndarray, mechanism: Mechanism = MECHANISM) -> np.ndarray:
    """What the noise is added to: released words less the noise of a known key, in grid steps."""
    noised = mechanism.release(sums, Source.for_tests_only(KEY)).view(np.int32).astype(np.int64)
    return noised - mechanism.release(np.zeros_like(sums), Source.for_tests_only(KEY)).view(np.int32)


vectors = st.lists(st.floats(-30, 30), min_size=40, max_size=40).map(np.array)


@settings(max_examples=60, deadline=None)
@given(vectors, vectors)
def test_N2_one_patient_changes_the_rounded_sum_by_at_most_the_sensitivity(
    others: np.ndarray, patient: np.ndarray
) -> None:
    norm = float(np.linalg.norm(patient))
    patient = patient * min(1.0, float(CLIP_ROOM) / norm) if norm else patient
    change = grid_of(others + patient) - grid_of(others)
    assert np.linalg.norm(change) * float(MECHANISM.grid) <= float(MECHANISM.sensitivity)


@settings(max_examples=40, deadline=None)
@given(vectors)
def test_N2_a_sum_comes_back_within_half_a_grid_step_and_never_beyond_the_saturation(sums: np.ndarray) -> None:
    expected = np.clip(sums, -16, 16)
    assert np.abs(grid_of(sums) * float(MECHANISM.grid) - expected).max() <= float(MECHANISM.grid) / 2


def test_N2_the_sum_of_all_sites_and_twelve_deviations_never_wrap() -> None:
    for mechanism in (MECHANISM, training(study(), 100_000), evaluation(study(), 200, 3.0)):
        total = mechanism.sites * mechanism.saturation / mechanism.grid
        total += DEVIATIONS * Fraction(math.sqrt(mechanism.sites)) * mechanism.deviation
        assert total < 2**31
        finer = mechanism.sites * mechanism.saturation / (mechanism.grid / 2)
        finer += DEVIATIONS * Fraction(math.sqrt(mechanism.sites)) * 2 * mechanism.deviation
        assert finer * Fraction(101, 100) >= 2**31, "the grid is the finest that holds"


def test_N2_the_shares_of_the_least_cohort_without_the_colluders_make_the_whole_noise() -> None:
    mechanism = training(study(), 1000)
    honest = 4 - 1
    assert mechanism.share**2 * honest >= Fraction("1.2") ** 2
    assert mechanism.share**2 * honest <= Fraction("1.2") ** 2 * Fraction(1_000_001, 1_000_000)
    assert mechanism.deviation * mechanism.grid >= mechanism.share * mechanism.sensitivity
    floored = training(study(noise_floor=2), 1000)
    assert floored.share == 2
    assert training(study("per-site", 5), 1000).share == Fraction("1.2")


def test_N2_noise_of_the_stated_size_is_there() -> None:
    mechanism = replace(MECHANISM, numbers=40_000)
    words = mechanism.release(np.zeros(40_000), Source.for_tests_only(KEY))
    spread = mechanism.read(words).std() / float(mechanism.share * mechanism.sensitivity)
    assert spread == pytest.approx(1, abs=0.02)


def test_N4_a_number_that_is_none_counts_as_zero_and_noise_is_sent() -> None:
    sums = np.zeros(40)
    sums[3], sums[5], sums[7] = np.nan, np.inf, -np.inf
    found = grid_of(sums) * float(MECHANISM.grid)
    assert (found[3], found[5], found[7]) == (0, 16, -16)
    assert not np.delete(found, [3, 5, 7]).any()


def test_words_of_several_sites_add_up_modulo_two_to_the_32() -> None:
    sums = [np.linspace(-3, 3, 40) * site for site in range(5)]
    with np.errstate(over="ignore"):
        words = [MECHANISM.release(part, Source.for_tests_only(bytes([site]) * 32)) for site, part in enumerate(sums)]
        total = sum(words, np.zeros(40, np.uint32))
    noise = 6 * math.sqrt(5) * float(MECHANISM.deviation * MECHANISM.grid)
    assert np.abs(MECHANISM.read(total) - sum(sums)).max() < noise


def test_B4_every_share_is_wide_enough_for_the_sum_of_discrete_gaussians() -> None:
    from privacy.accounting import LEAST_SHARE

    assert training(study(), 10_000_000).deviation >= LEAST_SHARE
    assert evaluation(study(), 100, 3.0).deviation >= LEAST_SHARE


def test_a_sum_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="40 numbers"):
        MECHANISM.release(np.zeros(41), Source())


def test_S3_the_airlock_makes_no_noised_release_that_nobody_paid_for(tmp_path: Path) -> None:
    airlock = Airlock(Journal(tmp_path / "journal.jsonl"), tmp_path / "answers")
    with pytest.raises(TypeError, match="nobody paid"):
        airlock.noise("paid", MECHANISM, np.zeros(40))  # type: ignore[arg-type]
    charge = Charge("00" * 32, 1, "train", 1, paid=1, counter=1, fresh=True)
    assert airlock.noise(charge, MECHANISM, np.zeros(40)).shape == (40,)
    first, second = (airlock.noise(charge, MECHANISM, np.zeros(40)) for _ in range(2))
    assert (first != second).any(), "every release has noise of its own"


def test_B2_a_round_that_another_slot_paid_for_is_not_noised_anew(tmp_path: Path) -> None:
    airlock = Airlock(Journal(tmp_path / "journal.jsonl"), tmp_path / "answers")
    retry = Charge("00" * 32, 5, "train", 1, paid=4, counter=2, fresh=False)
    with pytest.raises(Refusal) as refusal:
        airlock.noise(retry, MECHANISM, np.zeros(40))
    assert refusal.value.code is RefusalCode.SLOT_SPENT


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "minimum_sites = 4",
            'minimum_sites = 4\n[publish]\nchoose = "best-validation"',
            "charged evaluation",
        ),
        ('weights = "equal"', 'weights = "examples"', "how many images a hospital has"),
        ("batch_size = 8", "batch_size = 3", "go through the network together"),
        ("local_steps = 1", "local_steps = 2", "one optimiser step"),
        ('[secagg]\nmode = "on"', "", "hides each share"),
        ("minimum_sites = 4", 'minimum_sites = 4\n[local]\nnorms = "local"', "unnoised state"),
        ("count = 20", "count = 20\nseed = 3", "who was sampled"),
        ("sampling_rate = 0.1", "sampling_rate = 0", "nobody would ever train"),
        ("patients_bound = 500\n", "patients_bound = 5000000\n", "promises nothing"),
    ],
)
def test_N3_a_study_that_does_not_fit_its_noise_is_refused_by_name(old: str, new: str, words: str) -> None:
    text = draft()
    assert old in text
    with pytest.raises(ConsiliumError, match=words):
        Study.from_toml(text.replace(old, new, 1))
