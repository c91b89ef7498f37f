"""Sensitivity by replay: one patient more or less changes what reaches the airlock by at most Δ, and nothing else.

The same step is taken over a cohort and over its neighbour, with the same randomness (q = 1, so that nobody's coin can
fall differently). The sabotaged steps at the end are the usual mistakes; each must be caught by the same look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.imaging import Cohort, Membership
from client.private import gradients, sample
from client.private.bench import PrivateBench
from client.private.evaluation import Passes, patient_sum
from client.private.sample import batches, poisson, some
from client.private.step import Constants, Step
from models import bounds, networks, tasks, weights
from models.tasks import Task
from privacy.mechanisms import Mechanism
from privacy.noise import Source
from tests import study_kit
from tests.client.private.private_kit import watched

torch.set_num_threads(1)
CLIP = 0.5
SPEC = {
    "task": {"kind": "classification", "classes": ["normal", "finding"]},
    "network": {"name": "resnet-small", "norm": "group", "parameters": {}},
    "input": {"channels": 1, "size": [8, 8], "transforms": [], "augmentation": []},
    "optimiser": {"batch_size": 16},
    "privacy": {"mode": "shared"},
}
CONSTANTS = Constants(Fraction(1), CLIP, CLIP / 8, images=4, copies=1, places=16, least=4)
TASK: Task = tasks.get(SPEC)
BOUNDS = bounds.of(TASK)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "standardised"])
def network(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(3)
    return networks.build(SPEC | {"network": SPEC["network"] | {"weight_standardisation": request.param}})


@dataclass
class Patient:
    """Images of one patient; `spoil` is what one pixel of the first is, `seed` (or else the place) what all are of."""

    images: int
    bright: float = 0.0
    spoil: float | None = None
    seed: int | None = None


def cohort(patients: list[Patient]) -> Cohort:
    """Patient i is called p<i>; what a patient's images hold, and their class, depends on nobody else."""
    pixels, names, targets = [], [], []
    for number, patient in enumerate(patients):
        seed = number if patient.seed is None else patient.seed
        own = np.random.default_rng(seed).normal(size=(patient.images, 1, 8, 8)).astype(np.float32) + patient.bright
        if patient.spoil is not None:
            own[0, 0, 2, 2] = patient.spoil
        pixels.append(own)
        names += [f"p{number}"] * patient.images
        targets += [seed % 2] * patient.images
    images = np.concatenate(pixels) if pixels else np.zeros((0, 1, 8, 8), np.float32)
    count = len(images)
    return Cohort(
        images=images, targets=np.array(targets, np.int64), patients=tuple(names),
        membership=(Membership.TRAIN,) * count, classes=("normal", "finding"), quarantine=(), scanners=Counter(),
        patient_rule="a test's",
    )  # fmt: skip


@dataclass
class Seen:
    """What one step came to, and everything about it that somebody might notice.

    `noticed`: the shape of the sum, how often the step asked whether to stop, the shapes of what went through the
    network, and every line of our log.
    """

    sums: np.ndarray
    noticed: tuple[object, ...]


def step(
    network: torch.nn.Module,
    patients: list[Patient],
    constants: Constants = CONSTANTS,
    augment: Callable[..., Any] | None = None,
) -> Seen:
    found, asked = cohort(patients), list[bool]()
    with watched(network) as (passes, lines):
        made = Step(network, TASK, found, list(found.groups(Membership.TRAIN).values()), constants, augment)
        sums = made.sum(lambda: asked.append(True))
    return Seen(sums, (sums.shape, len(asked), passes, lines))


def difference(
    network: torch.nn.Module, before: list[Patient], after: list[Patient], take: Callable[..., Seen] = step
) -> tuple[float, Seen, Seen]:
    one, other = take(network, before), take(network, after)
    return float(np.linalg.norm(other.sums - one.sums)), one, other


OTHERS = [Patient(1), Patient(3, 0.5), Patient(2, -0.5), Patient(4, 2.0)]
COMERS = [Patient(1), Patient(4), Patient(16, 3.0), Patient(1, 0.0, np.nan), Patient(4, 0.0, np.inf), Patient(2, 1e30)]


@pytest.mark.parametrize("comer", COMERS, ids=["one image", "four", "sixteen", "NaN", "inf", "huge"])
def test_N2_a_patient_who_comes_changes_the_sum_by_at_most_C_and_nothing_else(
    network: torch.nn.Module, comer: Patient
) -> None:
    change, before, after = difference(network, OTHERS, [*OTHERS, comer])
    assert change <= CLIP
    assert before.noticed == after.noticed
    assert np.isfinite(after.sums).all()


def test_N2_a_patient_who_comes_alone_is_one_with_the_empty_cohort_for_neighbour(network: torch.nn.Module) -> None:
    change, before, after = difference(network, [], [Patient(4, 1.0)])
    assert not before.sums.any()
    assert 0 < change <= CLIP
    assert before.noticed == after.noticed


def test_N2_the_same_images_under_another_name_are_one_patient_more(network: torch.nn.Module) -> None:
    pair = [OTHERS[0], replace(OTHERS[1], seed=7), *OTHERS[2:], replace(OTHERS[1], seed=7)]
    groups = cohort(pair).groups(Membership.TRAIN)
    for held in (cohort(pair).images, cohort(pair).targets):
        np.testing.assert_array_equal(held[groups["p1"]], held[groups["p4"]])
    once, twice, alone = (step(network, patients).sums for patients in (pair[:-1], pair, pair[1:2]))
    assert 0 < np.linalg.norm(twice - once) <= CLIP
    np.testing.assert_allclose(twice - once, alone, atol=1e-6)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.builds(Patient, st.integers(1, 4), st.floats(-3, 3)), max_size=4),
    st.builds(Patient, st.integers(1, 16), st.floats(-5, 5), st.sampled_from([None, np.nan, np.inf, -np.inf, 1e38])),
)
def test_N2_whoever_is_there_whoever_comes(network: torch.nn.Module, others: list[Patient], comer: Patient) -> None:
    change, before, after = difference(network, others, [*others, comer])
    assert change <= CLIP
    assert before.noticed == after.noticed


@pytest.mark.parametrize("comer", COMERS[:5], ids=["one image", "four", "sixteen", "NaN", "inf"])
def test_N6_a_patient_changes_an_evaluation_by_at_most_its_reach(network: torch.nn.Module, comer: Patient) -> None:
    def evaluated(network: torch.nn.Module, patients: list[Patient]) -> Seen:
        found, asked = cohort(patients), list[bool]()
        groups = list(found.groups(Membership.TRAIN).values())
        with watched(network) as (passes, lines):
            sums, _ = patient_sum(network, TASK, found, groups, BOUNDS, lambda: asked.append(True), Passes(4, least=8))
        return Seen(sums, (sums.shape, len(asked), passes, lines))

    change, before, after = difference(network, OTHERS, [*OTHERS, comer], evaluated)
    assert change <= BOUNDS.reach * (1 + 1e-12)
    assert before.noticed == after.noticed
    assert np.isfinite(after.sums).all()


def test_N4_an_image_that_cannot_be_augmented_counts_its_patient_as_absent_and_nobody_is_told(
    network: torch.nn.Module,
) -> None:
    odd = Patient(2)
    bad = torch.from_numpy(cohort([*OTHERS, odd]).images[-1])

    def augment(images: torch.Tensor, seeds: list[int]) -> tuple[torch.Tensor, None]:
        if any(torch.equal(image, bad) for image in images):
            raise RuntimeError("an odd image")
        return images, None

    without, with_him = (step(network, patients, augment=augment) for patients in (OTHERS, [*OTHERS, odd]))
    np.testing.assert_allclose(with_him.sums, without.sums, atol=1e-6)
    assert with_him.noticed == without.noticed


def test_N1_nothing_random_of_the_network_takes_part_in_a_private_step() -> None:
    """Dropout draws from torch's own generator, for a batch at once; a private step computes as in evaluation."""
    study = study_kit.study(
        sites=("a-site", "b-site", "c-site"),
        network={"name": "efficientnet-b0"},
        input={"size": [32, 32]},
        optimiser={"batch_size": 8},
        rounds={"local_steps": 1},
        aggregation={"weights": "equal", "minimum_sites": 3},
        privacy={"mode": "shared", "sampling_rate": 1, "site_patients_bound": 8},
        secagg={"mode": "on"},
    )
    spec = study.spec()
    torch.manual_seed(1)
    made, images = networks.build(spec), np.random.default_rng(1).normal(size=(6, 1, 32, 32)).astype(np.float32)
    found = Cohort(
        images=images, targets=np.arange(6) % 2, patients=tuple("abcdef"), membership=(Membership.TRAIN,) * 6,
        classes=("normal", "finding"), quarantine=(), scanners=Counter(), patient_rule="a test's",
    )  # fmt: skip
    bench = PrivateBench(study, found, tasks.get(spec), made, None)
    patients = list(found.groups(Membership.TRAIN).values())
    vector = weights.trainable_vector(made)
    first, second = (bench.gradient_sum(vector, patients, lambda: None) for _ in range(2))
    assert not made.training
    np.testing.assert_array_equal(first, second)


# ---- the sample ----------------------------------------------------------------------------------------------


def test_N1_each_patient_is_in_with_the_plans_chance_whatever_the_others_do() -> None:
    drawn = poisson(200_000, Fraction(1, 20))
    assert drawn.mean() == pytest.approx(0.05, abs=6 * (0.05 * 0.95 / 200_000) ** 0.5)
    first = poisson(3, Fraction(1, 2), lambda count: bytes(range(count)))
    again = poisson(4, Fraction(1, 2), lambda count: bytes(range(count)))
    assert again[:3].tolist() == first.tolist(), "one patient more moves nobody else's coin"


def test_N1_a_coin_is_never_more_likely_than_the_plan_says() -> None:
    rate = Fraction(1, 3)
    threshold = int(rate * sample.WORD)
    words = [threshold - 1, threshold, threshold + 1]
    coins = poisson(3, rate, lambda _: b"".join(word.to_bytes(8, "little") for word in words))
    assert coins.tolist() == [True, False, False]
    assert Fraction(threshold, sample.WORD) <= rate


def test_N1_of_many_images_each_is_as_likely_as_any_other() -> None:
    counts = np.zeros(6)
    for _ in range(3000):
        counts[some(np.arange(6), 2)] += 1
    assert counts.sum() == 6000
    assert np.abs(counts - 1000).max() < 6 * (3000 * (1 / 3) * (2 / 3)) ** 0.5


def test_N4_batches_have_one_shape_and_a_public_number_and_no_patient_is_in_two() -> None:
    patients = [np.arange(4 * i, 4 * i + size) for i, size in enumerate((1, 4, 3, 2))]
    for chosen in ([], patients[:1], patients):
        made = list(batches(chosen, 2, 16, 3))
        assert len(made) == 3
        assert {batch.owner.shape for batch in made} == {(16,)}
        held = [place for batch in made for place in sorted(set(batch.images.tolist()))]
        assert sorted(held) == sorted(np.concatenate([*chosen, np.zeros(0, int)]).astype(int).tolist())
        assert all((batch.owner >= 0).sum() == len(batch.images) for batch in made)
    assert len(list(batches(patients, 4, 16, 1))) > 1, "more work than the least is done all the same"


# ---- sabotage: each mistake is caught ------------------------------------------------------------------------


def test_sabotage_clipping_to_twice_the_bound_is_caught(network: torch.nn.Module) -> None:
    def twice(network: torch.nn.Module, patients: list[Patient]) -> Seen:
        return step(network, patients, replace(CONSTANTS, clip=2 * CLIP))

    change, *_ = difference(network, OTHERS, [*OTHERS, Patient(4, 3.0)], twice)
    assert change > CLIP


def test_sabotage_clipping_each_image_is_caught(network: torch.nn.Module) -> None:
    """Record-level clipping: every image is somebody of his own."""

    def records(network: torch.nn.Module, patients: list[Patient]) -> Seen:
        found = cohort(patients)
        each = [np.array([place]) for place in range(len(found))]
        return Seen(Step(network, TASK, found, each, CONSTANTS).sum(), ())

    change, *_ = difference(network, OTHERS, [*OTHERS, Patient(16, 3.0)], records)
    assert change > CLIP


def test_sabotage_dividing_by_the_real_batch_is_caught(network: torch.nn.Module) -> None:
    """The mean over who is there, times a public number: all the others' parts move with one patient."""

    def mean(network: torch.nn.Module, patients: list[Patient]) -> Seen:
        seen = step(network, patients)
        return replace(seen, sums=seen.sums * 4 / max(1, len(patients)))

    worst = max(difference(network, others, [*others, Patient(4, 3.0)], mean)[0] for others in ([], [Patient(1)]))
    assert worst > CLIP


def _spread(release: Callable[[np.ndarray], np.ndarray], mechanism: Mechanism) -> float:
    """The noise of a release over what it is claimed to be."""
    return float(release(np.zeros(mechanism.numbers)).std() / float(mechanism.share * mechanism.sensitivity))


@pytest.mark.parametrize(("share", "caught"), [(1, False), (Fraction(1, 2), True), (Fraction(1, 100), True)])
def test_sabotage_half_the_noise_and_next_to_none_are_caught(share: Fraction, caught: bool) -> None:
    claimed = Mechanism(Fraction(1), 20_000, Fraction(16), Fraction(1), 5)
    used = replace(claimed, share=Fraction(share))
    spread = _spread(lambda sums: used.read(used.release(sums, Source())), claimed)
    assert (spread < 0.97) is caught


def test_sabotage_of_the_clip_factor_inside_the_engine_is_caught(
    network: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "SLACK", -1.0)
    change, *_ = difference(network, OTHERS, [*OTHERS, Patient(4, 3.0)])
    assert change > CLIP
