"""The filter of a patient's lifetime: RULES B1 and B3 as laws over histories, and what a study claims."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy import budget
from privacy.accounting import ORDERS, ROLES, capacity, events
from privacy.budget import NOTHING, Lifetime, Part
from privacy.errors import ConsiliumError
from tests.privacy.grant_kit import study

LIFETIME = Lifetime("8", "0.000001", 4)
AMOUNTS = st.integers(0, 2 * LIFETIME.room)
HISTORIES = st.tuples(*[AMOUNTS for _ in ORDERS])


def part(*units: int, count: int = 1) -> Part:
    return Part(tuple(units) + (0,) * (len(ORDERS) - len(units)), count)


def test_B1_the_whole_plan_is_reserved_with_every_retry_and_evaluation() -> None:
    """T_max releases, whatever will be used: 4 rounds and 2 in reserve, 2 tries of each evaluation."""
    found = budget.plan(study())
    assert {role: found[role].count for role in ROLES} == {"train": 6, "validation": 2, "test": 2}
    for role in ROLES:
        assert found[role].whole == tuple(unit * found[role].count for unit in found[role].unit)


def test_B2_a_per_site_plan_is_every_local_step_of_every_round() -> None:
    assert budget.plan(study(mode="per-site", steps=3))["train"].count == 4 * 3


@given(history=HISTORIES, cost=HISTORIES, other=HISTORIES)
def test_B3_the_fixed_order_decides_alone(history: tuple, cost: tuple, other: tuple) -> None:
    """Whatever stands at the other orders, the decision is the same."""
    at = LIFETIME.at
    swapped = (*other[:at], history[at], *other[at + 1 :])
    assert budget.fits(history, cost, LIFETIME) == budget.fits(swapped, cost, LIFETIME)
    assert budget.fits(history, cost, LIFETIME) == (history[at] + cost[at] <= LIFETIME.room)


@given(histories=st.lists(st.tuples(HISTORIES, st.sampled_from(ROLES)), max_size=8))
def test_B1_each_patient_by_his_own_history(histories: list) -> None:
    """Who else is at the site changes nobody's answer, and nobody is ever above the lifetime."""
    asked = {"train": part(5, 5, 5, count=3), "validation": part(1), "test": part(0)}
    together = budget.compose(histories, asked, LIFETIME)
    for entry in histories:
        alone = budget.compose([entry], asked, LIFETIME)
        assert together[entry] == alone[entry]
        if together[entry] is not None:
            assert together[entry][LIFETIME.at] <= LIFETIME.room


def test_B1_the_same_history_is_composed_once() -> None:
    asked = {role: part(1) for role in ROLES}
    held = [(NOTHING, "train"), (NOTHING, "test")] * 50_000
    assert len(budget.compose(held, asked, LIFETIME)) == 2


@given(history=HISTORIES, cost=HISTORIES)
def test_what_is_refunded_was_reserved(history: tuple, cost: tuple) -> None:
    assert budget.refund(budget.add(history, cost), cost) == history
    beyond = tuple(a + 1 for a in history)
    with pytest.raises(ValueError, match="never more than what was reserved"):
        budget.refund(history, beyond)


def test_a_refund_is_never_negative() -> None:
    with pytest.raises(ValueError, match="never more"):
        budget.refund(NOTHING, (-1,) * len(ORDERS))


@pytest.mark.parametrize(("order", "epsilon"), [(7, "8"), (1, "8"), (4, "0.001")])
def test_a_lifetime_that_decides_nothing_is_refused(order: int, epsilon: str) -> None:
    with pytest.raises(ValueError, match="order"):
        Lifetime(epsilon, "0.000001", order)


def test_spent_is_a_share_of_the_room() -> None:
    half = tuple(LIFETIME.room // 2 for _ in ORDERS)
    assert budget.spent(NOTHING, LIFETIME) == 0
    assert budget.spent(half, LIFETIME) == Fraction(LIFETIME.room // 2, LIFETIME.room)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("epsilon", ["14.5", "21.5"])
def test_epsilon_undoes_capacity(order: int, epsilon: str) -> None:
    """The two conversions are one formula, rounded up for what is claimed and down for what is allowed."""
    room = capacity(epsilon, "0.000001", order)
    assert room > 0, "the case shows nothing"
    cost = tuple(room if a == order else 10**18 for a in ORDERS)
    assert Decimal(epsilon) <= budget.epsilon(cost, "0.000001", order) <= Decimal(epsilon) + Decimal("0.0001")


def test_more_releases_never_cost_less() -> None:
    """Held against the closed form for a sampling rate of 1: RDP = α/(2σ²) for each release."""
    event = replace(events(study(), 1)["validation"], sampling_rate=Fraction(1), noise_multiplier=Fraction(4))
    unit = budget.costs(event)
    for order, cost in zip(ORDERS, unit, strict=True):
        assert 0 <= cost - order * 10**12 // 32 <= 2


def test_a_study_without_noise_has_no_plan() -> None:
    with pytest.raises(ConsiliumError, match="no noise"):
        budget.plan(study(mode="none"))
