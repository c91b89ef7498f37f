"""The local step: what it samples, how it moves, what it says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from client.imaging import Cohort, Membership
from client.training import Plan, batches, evaluate, train
from models import networks, tasks, weights
from privacy.errors import Refusal, RefusalCode
from privacy.study import Study

torch.set_num_threads(1)

SPEC: dict[str, Any] = {
    "task": {"kind": "classification", "classes": ["normal", "finding"]},
    "network": {"name": "resnet-small"},
    "input": {"channels": 1, "size": [8, 8]},
    "optimiser": {"batch_size": 8},
}
PLAN = Plan("sgd", 0.05, 0.0, 0.0, 8, schedule="constant", local_steps=5, rounds=4, proximal_mu=0.0)


def cohort(count: int = 30, training: int = 20) -> Cohort:
    generator = np.random.default_rng(5)
    labels = np.arange(count, dtype=np.int64) % 2
    images = (generator.normal(size=(count, 1, 8, 8)) + labels[:, None, None, None]).astype(np.float32)
    sides = tuple(Membership.TRAIN if i < training else Membership.VALIDATION for i in range(count))
    names = tuple(f"p{i}" for i in range(count))
    return Cohort(images, labels, names, sides, ("normal", "finding"), (), Counter(), "one image, one patient")


@pytest.fixture
def network() -> torch.nn.Module:
    module = networks.build(SPEC)
    weights.load_state(module, weights.initial_state(SPEC, 3))
    return module


def step(network: torch.nn.Module, plan: Plan, **options: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """Received and update vectors of one local training from the same start."""
    weights.load_state(network, weights.initial_state(SPEC, 3))
    received = weights.trainable_vector(network)
    vector = received.copy()
    trained = train(network, tasks.get(SPEC), cohort(), plan, 1, vector, **options)
    return received, vector, trained


@pytest.mark.parametrize("optimiser", ["sgd", "adam", "adamw"])
def test_the_update_is_trained_minus_received(network: torch.nn.Module, optimiser: str) -> None:
    received, update, trained = step(network, replace(PLAN, optimiser=optimiser, learning_rate=0.005))
    np.testing.assert_allclose(weights.trainable_vector(network), received + update, atol=1e-6)
    assert np.abs(update).max() > 1e-4
    assert (trained.examples, trained.steps) == (20, 5)
    assert 0 < trained.loss_sum < 5 * 5


def test_training_learns(network: torch.nn.Module) -> None:
    task, data = tasks.get(SPEC), cohort()
    before = task.metrics(evaluate(network, task, data, Membership.VALIDATION))["loss"]
    step(network, replace(PLAN, local_steps=60))
    after = task.metrics(evaluate(network, task, data, Membership.VALIDATION))["loss"]
    assert after < before


def test_N1_the_sample_is_not_a_function_of_anything_sent(network: torch.nn.Module) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    first = step(network, PLAN)[1]
    torch.manual_seed(0)
    np.random.seed(0)
    assert not np.array_equal(first, step(network, PLAN)[1])


def test_a_seed_makes_training_repeat_itself_and_each_site_round_and_purpose_draws_its_own(
    network: torch.nn.Module,
) -> None:
    plan = replace(PLAN, seed=7)
    first = step(network, plan, chance=plan.chance("north", "train", 1))[1]
    np.random.seed(3)
    torch.rand(5)
    assert np.array_equal(first, step(network, plan, chance=plan.chance("north", "train", 1))[1])
    others = (("south", "train", 1), ("north", "personal", 1), ("north", "train", 2))
    assert not any(np.array_equal(first, step(network, plan, chance=plan.chance(*other))[1]) for other in others)
    assert not torch.are_deterministic_algorithms_enabled(), "only while it trains"


def test_scaffolds_shift_is_added_to_every_gradient(network: torch.nn.Module) -> None:
    """One step of plain SGD at rate η moves by −η (g + shift)."""
    plan = replace(PLAN, local_steps=1, seed=1)
    size = weights.Layout.of(network).count
    shift = np.random.default_rng(2).normal(size=size).astype(np.float32)
    chance = plan.chance("north", "train", 1).bit_generator.state
    updates = []
    for given in (None, shift):
        generator = np.random.Generator(np.random.PCG64())
        generator.bit_generator.state = chance
        updates.append(step(network, plan, chance=generator, shift=given)[1])
    np.testing.assert_allclose(updates[1] - updates[0], -0.05 * shift, atol=1e-6)


BATCH = {**SPEC, "network": {"name": "resnet-small", "norm": "batch"}}


def batch_norms(plan: Plan, shift: float = 0.0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The statistics and the weights of a network with batch norms after one step from the same start."""
    module = networks.build(BATCH)
    weights.load_state(module, weights.initial_state(BATCH, 3))
    vector = weights.trainable_vector(module)
    far, shifts = vector + 1, np.full_like(vector, shift)
    train(module, tasks.get(BATCH), cohort(), replace(plan, local_steps=1, seed=7), 1, vector, anchor=far, shift=shifts)
    state = {name: value.detach().clone() for name, value in module.named_parameters()}
    statistics = {name: value for name, value in state.items() if "running_" in name}
    return statistics, {name: value for name, value in state.items() if name not in statistics}


def test_statistics_of_a_batch_norm_are_those_of_the_images_whatever_moves_the_weights() -> None:
    """No optimiser, decay, proximal term or control variate reaches them."""
    plain, weights_then = batch_norms(PLAN)
    assert any(not torch.equal(value, torch.zeros_like(value)) for name, value in plain.items() if "mean" in name)
    for plan, shift in (
        (replace(PLAN, optimiser="adamw", weight_decay=0.5), 0.0),
        (replace(PLAN, optimiser="sgd", momentum=0.9, weight_decay=0.5), 0.0),
        (replace(PLAN, proximal_mu=0.5), 0.0),
        (PLAN, 1.0),
    ):
        found, moved = batch_norms(plan, shift)
        assert all(torch.equal(value, plain[name]) for name, value in found.items())
        assert any(not torch.equal(value, weights_then[name]) for name, value in moved.items())


def test_measuring_leaves_the_statistics_of_a_batch_norm_alone() -> None:
    module = networks.build(BATCH)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    evaluate(module, tasks.get(BATCH), cohort(), Membership.VALIDATION)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_the_anchor_may_be_another_model_than_the_one_it_starts_from(network: torch.nn.Module) -> None:
    """Ditto: with a strong pull and no other force the model goes to the anchor."""
    anchor = weights.trainable_vector(network) + 0.01
    plan = replace(PLAN, learning_rate=0.01, local_steps=60, proximal_mu=20.0)
    received, update, _ = step(network, plan, anchor=anchor)
    assert np.linalg.norm(received + update - anchor) < 0.5 * np.linalg.norm(received - anchor)


def test_a_batch_is_never_short_and_every_image_comes_once_before_any_comes_again() -> None:
    indices = np.array([3, 5, 8, 9, 11])
    drawn = list(islice(batches(indices, 4, np.random.default_rng(1)), 10))
    assert {len(batch) for batch in drawn} == {4}
    flat = np.concatenate(drawn)
    for start in range(0, len(flat), 5):
        assert sorted(flat[start : start + 5]) == indices.tolist()
    assert len(next(batches(indices, 12, np.random.default_rng(1)))) == 12, "a site smaller than one batch"


def test_the_cosine_spans_all_rounds() -> None:
    plan = replace(PLAN, schedule="cosine", learning_rate=1.0, local_steps=10, rounds=2)
    rates = [plan.rate(number, i) for number in (1, 2) for i in range(10)]
    assert rates[0] == 1.0
    assert rates[10] == pytest.approx(0.5)
    assert rates == sorted(rates, reverse=True)
    assert plan.rate(3, 0) == pytest.approx(0.0), "a round beyond the plan trains on nothing"
    assert replace(plan, schedule="constant").rate(2, 9) == 1.0


def test_fedprox_holds_the_model_near_the_received_one(network: torch.nn.Module) -> None:
    plan = replace(PLAN, learning_rate=0.02, local_steps=30)
    free = np.linalg.norm(step(network, plan)[1])
    held = np.linalg.norm(step(network, replace(plan, proximal_mu=20.0))[1])
    assert held < 0.5 * free


def test_the_proximal_term_is_the_gradient_of_half_mu_times_the_squared_distance(network: torch.nn.Module) -> None:
    """From the same weights the term is zero, so the first step of plain SGD does not depend on mu."""
    one_image = cohort(count=10, training=1)
    updates = []
    for mu in (0.0, 50.0):
        weights.load_state(network, weights.initial_state(SPEC, 3))
        vector = weights.trainable_vector(network)
        train(network, tasks.get(SPEC), one_image, replace(PLAN, local_steps=1, proximal_mu=mu), 1, vector)
        updates.append(vector)
    np.testing.assert_allclose(updates[0], updates[1], atol=1e-6)


def test_augmentation_gets_its_own_seed_for_every_image(network: torch.nn.Module) -> None:
    seeds: list[int] = []

    def augment(images: torch.Tensor, given: list[int]) -> tuple[torch.Tensor, None]:
        seeds.extend(given)
        return images, None

    step(network, PLAN, augment=augment)
    assert len(seeds) == len(set(seeds)) == 5 * 8


def test_a_diverging_model_is_refused(network: torch.nn.Module) -> None:
    with pytest.raises(Refusal) as caught:
        step(network, replace(PLAN, learning_rate=1e12, local_steps=20))
    assert caught.value.code is RefusalCode.NON_FINITE


def test_a_site_without_training_images_is_refused(network: torch.nn.Module) -> None:
    with pytest.raises(Refusal) as caught:
        train(network, tasks.get(SPEC), cohort(training=0), PLAN, 1, weights.trainable_vector(network))
    assert caught.value.code is RefusalCode.NO_DATA


def test_the_work_stops_where_it_is_told_to(network: torch.nn.Module) -> None:
    calls: list[int] = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Refusal(RefusalCode.LATE)

    with pytest.raises(Refusal):
        step(network, replace(PLAN, local_steps=1000), check=check)
    assert len(calls) == 3


def test_evaluation_counts_every_image_of_its_side_once(network: torch.nn.Module) -> None:
    task = tasks.get(SPEC)
    whole = evaluate(network, task, cohort(200, 10), Membership.VALIDATION)
    assert task.metrics(whole)["images"] == 190
    assert not evaluate(network, task, cohort(20, 20), Membership.TEST).any()


def test_the_plan_is_read_from_the_study() -> None:
    study = Study.from_toml("""
sites = ["aa", "bb"]
study = { name = "tiny", title = "t", purpose = "p" }
task = { classes = ["a", "b"] }
network = { name = "resnet-small" }
input = { size = [8, 8] }
optimiser = { name = "sgd", learning_rate = 0.5, momentum = 0.9, schedule = "cosine" }
aggregation = { strategy = "fedprox", proximal_mu = 0.01 }
rounds = { count = 7, local_steps = 3 }
""")
    assert Plan.of(study) == Plan(
        "sgd", 0.5, 0.9, 0.0, 32, schedule="cosine", local_steps=3, rounds=7, proximal_mu=0.01
    )
