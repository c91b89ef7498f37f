"""The coordinator's step against the papers' formulas."""

from __future__ import annotations

import numpy as np
import pytest

from privacy.sections import Aggregation
from server import optimizers


def test_fedavg_with_rate_one_is_the_plain_mean():
    weights = np.array([1.0, -2.0, 0.5], np.float32)
    optimizers.of(Aggregation()).step(weights, np.array([[0.25, 1.0, -0.5]]), [])
    assert weights.tolist() == [1.25, -1.0, 0.0]


def test_fedprox_is_fedavg_at_the_coordinator():
    prox = Aggregation.model_validate({"strategy": "fedprox", "proximal_mu": 0.1, "server_learning_rate": 0.5})
    weights = np.array([1.0, 2.0], np.float32)
    optimizers.of(prox).step(weights, np.array([[2.0, -2.0]]), [])
    assert weights.tolist() == [2.0, 1.0]


def fedadam(rate: float = 0.5, tau: float = 0.1):
    chosen = {"strategy": "fedadam", "server_learning_rate": rate, "tau": tau, "beta_1": 0.9, "beta_2": 0.99}
    return optimizers.of(Aggregation.model_validate(chosen))


def test_fedadam_first_step_by_hand():
    """Reddi 2021, Algorithm 2, one coordinate, Δ = 2: m = 0.2, v = 0.99·0.01 + 0.01·4 = 0.0499."""
    weights, rule = np.array([1.0], np.float32), fedadam()
    memory = rule.fresh(weights)
    rule.step(weights, np.array([[2.0]]), memory)
    assert memory[0][0] == pytest.approx(0.2)
    assert memory[1][0] == pytest.approx(0.0499)
    assert weights[0] == pytest.approx(1.0 + 0.5 * 0.2 / (np.sqrt(0.0499) + 0.1), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_fedadam_closed_form_for_a_constant_update(steps):
    """With Δ constant, m_t = (1 − β₁ᵗ) Δ and v_t = β₂ᵗ τ² + (1 − β₂ᵗ) Δ²."""
    rule, update, weights = fedadam(rate=0.01), 0.3, np.zeros(4, np.float32)
    memory, expected = rule.fresh(weights), 0.0
    for t in range(1, steps + 1):
        rule.step(weights, np.full((1, 4), update), memory)
        first = (1 - 0.9**t) * update
        second = 0.99**t * 0.1**2 + (1 - 0.99**t) * update**2
        expected += 0.01 * first / (np.sqrt(second) + 0.1)
    np.testing.assert_allclose(memory[0], first, rtol=1e-5)
    np.testing.assert_allclose(memory[1], second, rtol=1e-5)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def fedyogi():
    chosen = {"strategy": "fedyogi", "server_learning_rate": 0.5, "tau": 0.1, "beta_1": 0.9, "beta_2": 0.99}
    return optimizers.of(Aggregation.model_validate(chosen))


@pytest.mark.parametrize(("update", "square"), [(2.0, 0.01 + 0.01 * 4), (0.01, 0.01 - 0.01 * 1e-4)])
def test_fedyogi_first_step_by_hand(update, square):
    """Reddi 2021, Algorithm 2: v moves by at most (1 − β₂) Δ², up when Δ² is larger than v and down when smaller."""
    weights, rule = np.array([1.0], np.float32), fedyogi()
    memory = rule.fresh(weights)
    rule.step(weights, np.array([[update]]), memory)
    assert memory[1][0] == pytest.approx(square)
    assert weights[0] == pytest.approx(1.0 + 0.5 * 0.1 * update / (np.sqrt(square) + 0.1), rel=1e-6)


def test_fedavgm_gathers_speed():
    """Hsu 2019: with Δ constant the velocity is Δ (1 − βᵗ) / (1 − β)."""
    rule = optimizers.of(Aggregation.model_validate({"strategy": "fedavgm", "beta_1": 0.5}))
    weights = np.zeros(2, np.float32)
    memory = rule.fresh(weights)
    for _ in range(3):
        rule.step(weights, np.full((1, 2), 4.0), memory)
    assert memory[0].tolist() == [7.0, 7.0]
    assert weights.tolist() == [17.0, 17.0]


def test_scaffold_moves_the_control_by_the_share_of_sites_that_answered():
    """Karimireddy 2020, Algorithm 1, line 17: c ← c + 1/N Σ over the answering Δc = |S|/N × their mean."""
    rule = optimizers.of(Aggregation.model_validate({"strategy": "scaffold"}), sites=5)
    weights = np.array([1.0], np.float32)
    memory = rule.fresh(weights)
    rule.step(weights, np.array([[0.5], [10.0]]), memory, 3)
    assert (weights[0], memory[0][0]) == (1.5, 6.0)
    assert rule.sent == 1


@pytest.mark.parametrize(
    "rule",
    [
        optimizers.Averaging(0.7),
        optimizers.Momentum(0.7, 0.9),
        fedadam(),
        fedyogi(),
        optimizers.Scaffold(0.7, 3),
        optimizers.Averaged(optimizers.Scaffold(0.7, 3), 0.9, 4),
    ],
    ids=["averaging", "momentum", "adam", "yogi", "scaffold", "averaged"],
)
def test_a_model_in_blocks_is_the_model_at_once(rule):
    rng = np.random.default_rng(1)
    whole, blocks = (np.linspace(-1, 1, 101).astype(np.float32) for _ in range(2))
    memory, parts = rule.fresh(whole), rule.fresh(blocks)
    for _ in range(3):
        update = rng.normal(size=(1 + rule.sent, 101))
        rule.step(whole, update.copy(), memory)
        for start in range(0, 101, 17):
            cut = slice(start, start + 17)
            rule.step(blocks[cut], update[:, cut].copy(), [array[cut] for array in parts])
    assert whole.tobytes() == blocks.tobytes()
    assert [m.tobytes() for m in memory] == [m.tobytes() for m in parts]


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "scaffold"])
def test_the_average_follows_any_rule_and_changes_nothing_of_it(strategy):
    """After t rounds the decay is min(β, (1 + t) / (10 + t)): 0.1, 0.1818, 0.25, 0.3, 0.3, ... for β = 0.3."""
    plain = Aggregation.model_validate({"strategy": strategy, "server_learning_rate": 0.5})
    averaged = Aggregation.model_validate({**plain.model_dump(), "ema": "0.3"})
    one, other = (np.linspace(-1, 1, 7).astype(np.float32) for _ in range(2))
    memory, kept = optimizers.of(plain, 3).fresh(one), optimizers.of(averaged, 3).fresh(other)
    expected, rng = one.astype(np.float64), np.random.default_rng(2)
    for done in range(6):
        rule, wrapped = optimizers.of(plain, 3), optimizers.of(averaged, 3, done)
        assert (wrapped.sent, wrapped.memory) == (rule.sent, rule.memory + 1)
        update = rng.normal(size=(1 + rule.sent, 7))
        rule.step(one, update.copy(), memory, 2)
        wrapped.step(other, update.copy(), kept, 2)
        assert other.tobytes() == one.tobytes()
        assert [m.tobytes() for m in kept[:-1]] == [m.tobytes() for m in memory]
        decay = (0.1, 2 / 11, 0.25, 0.3, 0.3, 0.3)[done]
        expected = decay * expected + (1 - decay) * one
        np.testing.assert_allclose(kept[-1], expected, rtol=1e-6)


def test_without_a_decay_there_is_no_average():
    assert optimizers.of(Aggregation(), 3, 5) == optimizers.Averaging(1.0)
    assert optimizers.outcome(Aggregation(), "model", ("memory",)) == "model"
    averaged = Aggregation.model_validate({"ema": 0.9})
    assert optimizers.outcome(averaged, "model", ("memory", "average")) == "average"
    assert optimizers.outcome(averaged, "model", ()) == "model", "no round has counted"
