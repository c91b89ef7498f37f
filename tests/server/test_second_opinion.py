"""A second accountant must agree before a study with noise is signed, and one that is wrong must be noticed."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from privacy import claims
from privacy.accounting import Event, events
from privacy.claims import epsilon_pld, epsilon_rdp
from privacy.errors import ConsiliumError
from privacy.study import Study
from server.second_opinion import ERROR, MOST_APART, MOST_EPSILON, check, prv
from tests import study_kit
from tests.study_kit import FIVE

torch.set_num_threads(1)


def study(sigma: str = "1.2") -> Study:
    return study_kit.study(
        sites=FIVE,
        rounds={"count": 300, "local_steps": 1},
        aggregation={"weights": "equal", "minimum_sites": 4},
        privacy={"mode": "shared", "noise_multiplier": sigma, "sampling_rate": 0.05},
        secagg={"mode": "on"},
    )


def by_the_central_limit(event: Event, delta: str) -> float:
    """The accountant that is never to be used: Opacus' Gaussian limit, which falls below the true epsilon."""
    from opacus.accountants.analysis import gdp

    return float(
        gdp.compute_eps_poisson(
            steps=event.count,
            noise_multiplier=float(event.noise_multiplier),
            sample_rate=float(event.sampling_rate),
            delta=float(delta),
        )
    )


KNOWN = {
    "A": (Event(Fraction(1), Fraction("0.00512"), 11719), "0.00001", 3.137),
    "B": (Event(Fraction("0.8"), Fraction("0.01"), 2000), "0.00001", 4.293),
    "C": (Event(Fraction(4), Fraction(512, 3000), 300), "0.0001", 2.762),
    "D": (Event(Fraction(3), Fraction("0.08192"), 2468), "0.00001", 6.529),
    "E": (Event(Fraction(20), Fraction(1), 200), "0.00001", 2.943),
    "an evaluation": (Event(Fraction(4), Fraction(1), 2), "0.000001", 1.544),
    "one step": (Event(Fraction(1), Fraction(1, 20), 1), "0.000001", 1.465),
    "one in 100 000": (Event(Fraction(1, 2), Fraction(1, 100_000), 50), "0.000001", 0.013),
}


@pytest.mark.parametrize("name", KNOWN)
def test_b4_two_accountants_agree_on_known_runs(name: str) -> None:
    event, delta, known = KNOWN[name]
    first, second = epsilon_pld(event, delta), prv(event, delta)
    assert second == pytest.approx(known + ERROR, abs=0.002)
    assert first <= second <= first + 2 * ERROR
    assert first <= epsilon_rdp(event, delta)


def test_b4_an_honest_study_passes() -> None:
    check(study())


def test_b4_an_accountant_that_says_too_little_stops_the_signature() -> None:
    with pytest.raises(ConsiliumError, match="Two accountants disagree") as refused:
        check(study(), by_the_central_limit)
    assert "train patients: PLD says" in refused.value.subject


@pytest.mark.parametrize(("off", "refused"), [(MOST_APART * 0.9, False), (MOST_APART * 1.1, True)])
@pytest.mark.parametrize("sign", [1, -1])
def test_b4_the_gate_is_two_hundredths_either_way(off: float, refused: bool, sign: int) -> None:
    def opinion(event: Event, delta: str) -> float:
        return epsilon_pld(event, delta) + sign * off

    if refused:
        with pytest.raises(ConsiliumError, match="Two accountants disagree"):
            check(study(), opinion)
    else:
        check(study(), opinion)


@pytest.mark.parametrize("said", [float("nan"), float("inf"), ValueError("the domain is too small")])
def test_b4_an_accountant_that_cannot_tell_stops_the_signature(said: float | ValueError) -> None:
    def opinion(event: Event, delta: str) -> float:
        if isinstance(said, ValueError):
            raise said
        return said

    with pytest.raises(ConsiliumError, match="accountant"):
        check(study(), opinion)


def test_b4_above_epsilon_twenty_training_is_not_compared_and_evaluations_still_are() -> None:
    asked: list[Event] = []

    def opinion(event: Event, delta: str) -> float:
        asked.append(event)
        return epsilon_pld(event, delta)

    check(study("0.3"), opinion)
    assert [(event.sampling_rate, event.count) for event in asked] == [(1, 2)]


def test_b4_what_pld_puts_below_twenty_is_compared_though_rdp_is_above() -> None:
    made = study("0.64")
    event, delta = events(made, 1)["train"], made.privacy.delta
    assert epsilon_pld(event, delta) < MOST_EPSILON < epsilon_rdp(event, delta)
    check(made)
    with pytest.raises(ConsiliumError, match="Two accountants disagree") as refused:
        check(made, lambda event, delta: epsilon_pld(event, delta) * (0.9 if event.sampling_rate < 1 else 1))
    assert "train patients: PLD says" in refused.value.subject


@pytest.mark.parametrize("noise", ["2", "0.5"], ids=["below twenty", "above"])
def test_b4_a_distribution_that_is_too_high_is_seen(monkeypatch: pytest.MonkeyPatch, noise: str) -> None:
    """What is shown is PLD or RDP, whichever is lower; what is compared is PLD."""
    made, real = study("10000"), claims.losses

    def wrong(event: Event, scale: float) -> Any:
        train = event.sampling_rate < 1
        return real(Event(Fraction(noise), event.sampling_rate, event.count), scale) if train else real(event, scale)

    monkeypatch.setattr(claims, "losses", wrong)
    with pytest.raises(ConsiliumError, match="Two accountants disagree"):
        check(made)


def test_a_study_without_noise_has_nothing_to_check() -> None:
    body = study().body()
    body["privacy"] = {"mode": "none"}

    def opinion(event: Event, delta: str) -> float:
        raise AssertionError("nobody asks")

    check(Study.model_validate(body), opinion)
