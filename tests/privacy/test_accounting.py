"""What a release costs, what a study may claim, how much noise it needs: against closed forms and other programs."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.accounting import DISCRETE, ORDERS, Event, capacity, costs, events
from privacy.claims import HOPELESS, claim, epsilon_pld, epsilon_rdp, losses, rounded, true_positives, words
from privacy.errors import ConsiliumError
from privacy.planning import find_noise, repeats
from privacy.study import Study
from tests import study_kit
from tests.study_kit import FIVE


def study(
    mode: str = "shared", *, count: int = 1000, steps: int = 1, sigma: str = "1.484", rate: str = "0.02", **more: object
) -> Study:
    """Five hospitals, four of them enough, one of them colluding: three honest shares."""
    return study_kit.study(
        sites=FIVE,
        rounds={"count": count, "local_steps": steps, "reserve": 0},
        aggregation={"weights": "equal", "minimum_sites": 4},
        privacy={"mode": mode, "noise_multiplier": sigma, "sampling_rate": rate, **more},
        secagg={"mode": "on"},
    )


def event(sigma: str, rate: str, count: int = 1) -> Event:
    return Event(Fraction(sigma), Fraction(rate), count)


NOISES = st.fractions(min_value=Fraction(1, 5), max_value=50, max_denominator=1000)
RATES = st.fractions(min_value=Fraction(1, 10**5), max_value=1, max_denominator=10**5)
EVENTS = st.builds(Event, NOISES, RATES, st.integers(1, 500))


# ---- what one release costs ----------------------------------------------------------------------------------


@given(sigma=NOISES)
def test_with_everybody_in_it_a_release_costs_what_gaussian_noise_costs(sigma: Fraction) -> None:
    for order, cost in zip(ORDERS, costs(Event(sigma, Fraction(1), 1)), strict=True):
        assert cost == math.ceil(order / (2 * sigma * sigma) * 10**12) + DISCRETE


def by_quadrature(order: int, sigma: float, rate: float) -> float:
    """RDP of the sampled Gaussian by its definition: a moment under the noise alone, integrated."""
    from scipy.integrate import quad

    def integrand(x: float) -> float:
        ratio = math.log1p(rate * math.expm1((2 * x - 1) / (2 * sigma**2)))
        return math.exp(order * ratio - x * x / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))

    reach = 12 * sigma
    value, _ = quad(integrand, -reach, order + reach, points=[0, order], limit=500, epsabs=0, epsrel=1e-13)
    return math.log(value) / (order - 1)


@pytest.mark.parametrize(("sigma", "rate"), [("1.484", "0.02"), ("4", "0.1707"), ("0.8", "0.3"), ("2", "0.9")])
@pytest.mark.parametrize("order", [2, 3, 5, 8])
def test_a_release_costs_the_moment_of_its_likelihood_ratio(sigma: str, rate: str, order: int) -> None:
    cost = costs(event(sigma, rate))[ORDERS.index(order)]
    assert cost * 1e-12 == pytest.approx(by_quadrature(order, float(sigma), float(rate)), rel=1e-9, abs=3e-12)


@settings(max_examples=30, deadline=None)
@given(one=EVENTS)
def test_costs_are_the_binomial_sum_rounded_up_and_one_unit(one: Event) -> None:
    """An independent sum with mpmath: never below it, and never two whole units above."""
    from mpmath import binomial, exp, log, mp, mpf

    with mp.workdps(80):
        q = mpf(one.sampling_rate.numerator) / one.sampling_rate.denominator
        variance = (mpf(one.noise_multiplier.numerator) / one.noise_multiplier.denominator) ** 2
        for order, cost in zip(ORDERS, costs(one), strict=True):
            terms = (
                binomial(order, k) * q**k * (1 - q) ** (order - k) * exp(k * (k - 1) / (2 * variance))
                for k in range(order + 1)
            )
            exact = log(sum(terms)) / (order - 1) * 10**12
            # the last digits of 80 may put q = 1 a hair above the whole number that it is
            assert exact + DISCRETE - mpf("1e-40") <= cost < exact + DISCRETE + 1 + mpf("1e-40")


@settings(max_examples=30, deadline=None)
@given(one=EVENTS)
def test_costs_agree_with_googles_accountant(one: Event) -> None:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(list(ORDERS))
    noise = dp_accounting.GaussianDpEvent(float(one.noise_multiplier))
    accountant.compose(dp_accounting.PoissonSampledDpEvent(float(one.sampling_rate), noise))
    for ours, theirs in zip(costs(one), accountant.rdp, strict=True):
        assert ours * 1e-12 == pytest.approx(theirs, rel=1e-11, abs=3e-12)


@settings(deadline=None)
@given(one=EVENTS, less=st.fractions(min_value=Fraction(1, 2), max_value=1, max_denominator=100))
def test_less_noise_and_larger_samples_cost_more(one: Event, less: Fraction) -> None:
    noisier = costs(one)
    for worse in (
        replace(one, noise_multiplier=one.noise_multiplier * less),
        replace(one, sampling_rate=1 - (1 - one.sampling_rate) * less),
    ):
        assert all(more >= cost for more, cost in zip(costs(worse), noisier, strict=True))


def test_nobody_sampled_costs_nothing_and_nonsense_is_no_event() -> None:
    assert set(costs(event("1", "0"))) == {0}
    for wrong in (("0", "0.1", 1), ("1", "1.1", 1), ("1", "0.1", -1)):
        with pytest.raises(ValueError, match="noise must be above 0"):
            event(*wrong)


# ---- from RDP to epsilon -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    epsilon=st.decimals("0.5", "50", places=3),
    delta=st.sampled_from(["0.001", "0.000001", "0.0000000001"]),
    order=st.sampled_from(ORDERS),
)
def test_capacity_is_the_last_unit_that_still_means_epsilon_and_delta(epsilon: Decimal, delta: str, order: int) -> None:
    from mpmath import log, mp, mpf

    room = capacity(epsilon, delta, order)
    with mp.workdps(50):

        def means(units: int) -> object:
            return mpf(units) / 10**12 + log(mpf(order - 1) / order) - log(mpf(delta) * order) / (order - 1)

        assert means(room + 1) > mpf(str(epsilon))
        assert room == 0 or means(room) <= mpf(str(epsilon))


def test_capacity_refuses_what_means_nothing() -> None:
    for wrong in (("0", "0.1", 2), ("1", "0", 2), ("1", "1", 2), ("1", "0.1", 1)):
        with pytest.raises(ValueError, match="epsilon must be above 0"):
            capacity(*wrong)


# ---- what a study is charged for -----------------------------------------------------------------------------


def test_n2_tier_one_is_the_opened_sum_and_tier_two_a_hospitals_own_share() -> None:
    one, two = events(study(), 1), events(study(), 2)
    assert one["train"] == event("1.484", "0.02", 1000)
    assert one["validation"] == one["test"] == event("4", "1", 2)
    share = two["train"].noise_multiplier
    assert share * share * 3 <= Fraction("1.484") ** 2  # rounded down
    assert float(share) == pytest.approx(1.484 / math.sqrt(3), rel=1e-15)
    assert float(two["test"].noise_multiplier) == pytest.approx(4 / math.sqrt(3), rel=1e-15)


def test_a_noise_floor_holds_up_both_tiers() -> None:
    floored = study(noise_floor=1)
    assert events(floored, 2)["train"].noise_multiplier == 1
    opened = events(floored, 1)["train"].noise_multiplier
    assert opened * opened <= 3
    assert float(opened) == pytest.approx(math.sqrt(3), rel=1e-15)
    below = study(noise_floor=0.5)
    assert events(below, 1) == events(study(), 1)


def test_b2_with_per_site_noise_both_tiers_are_equal_and_every_local_step_is_charged() -> None:
    alone = study("per-site", count=20, steps=7)
    assert events(alone, 1) == events(alone, 2)
    assert events(alone, 1)["train"].count == 140


def test_b2_the_reserve_is_charged() -> None:
    text = study().body()
    text["rounds"]["reserve"] = 9
    assert events(Study.model_validate(text), 1)["train"].count == 1009


def test_a_study_without_noise_promises_nothing() -> None:
    body = study().body()
    body["privacy"] = {"mode": "none"}
    with pytest.raises(ConsiliumError, match="has no noise"):
        events(Study.model_validate(body), 1)


# ---- what it may claim ---------------------------------------------------------------------------------------

# name: event, delta, epsilon by RDP (fine orders) and by PLD
KNOWN = {
    "A": (event("1", "0.00512", 11719), "0.00001", 3.421, 3.137),
    "B": (event("0.8", "0.01", 2000), "0.00001", 4.861, 4.293),
    "C": (Event(Fraction(4), Fraction(512, 3000), 300), "0.0001", 3.055, 2.762),
    "D": (event("3", "0.08192", 2468), "0.00001", 7.046, 6.529),
    "E": (event("20", "1", 200), "0.00001", 3.189, 2.943),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_runs_give_known_epsilons(name: str) -> None:
    one, delta, rdp, pld = KNOWN[name]
    assert epsilon_rdp(one, delta) == pytest.approx(rdp, abs=0.001)
    assert epsilon_pld(one, delta) == pytest.approx(pld, abs=0.002)


@settings(max_examples=15, deadline=None)
@given(
    sigma=st.fractions(min_value=Fraction(3, 5), max_value=20, max_denominator=100),
    rate=st.fractions(min_value=Fraction(1, 1000), max_value=1, max_denominator=1000),
    count=st.integers(1, 300),
)
def test_the_ideal_curve_lies_between_its_optimistic_form_and_the_claim(
    sigma: Fraction, rate: Fraction, count: int
) -> None:
    from dp_accounting.pld import privacy_loss_distribution

    one = Event(sigma, rate, count)
    low = privacy_loss_distribution.from_gaussian_mechanism(
        float(sigma),
        pessimistic_estimate=False,
        value_discretization_interval=1e-3,
        sampling_prob=float(rate),
        use_connect_dots=False,
    ).self_compose(count)
    close = epsilon_pld(one, "0.000001")
    assert low.get_epsilon_for_delta(1e-6) <= close + 1e-9
    assert close <= epsilon_rdp(one, "0.000001")


@settings(max_examples=40, deadline=None)
@given(one=EVENTS, delta=st.sampled_from(["0.0001", "0.00000001"]))
def test_more_steps_and_less_noise_claim_more(one: Event, delta: str) -> None:
    here = epsilon_rdp(one, delta)
    assert epsilon_rdp(one, delta, one.count + 1) >= here
    assert epsilon_rdp(replace(one, noise_multiplier=one.noise_multiplier * Fraction(9, 10)), delta) >= here
    assert epsilon_rdp(one, delta, 0) == 0


@given(sigma=st.floats(0.3, 30), false_alarms=st.sampled_from([0.0001, 0.001, 0.05]))
@settings(max_examples=20, deadline=None)
def test_spotting_patients_under_gaussian_noise_is_the_normal_curve(sigma: float, false_alarms: float) -> None:
    from scipy.stats import norm

    found = losses(Event(Fraction(sigma), Fraction(1), 1), 1.0)
    exact = float(norm.cdf(norm.ppf(false_alarms) + 1 / sigma))
    assert exact - 1e-9 <= true_positives(found, false_alarms) <= exact * 1.01 + 1e-6


def test_a_claim_has_both_tiers_every_role_the_worst_and_the_way_there() -> None:
    made = claim(study())
    assert [(p.tier, p.role) for p in made.promises] == [
        (tier, role) for tier in (1, 2) for role in ("train", "validation", "test")
    ]
    train = made.promise("train", 1)
    assert made.worst(1) is train
    assert (train.epsilon_rdp, made.delta) == ("2.469", "0.000001")
    assert float(train.epsilon_pld) == pytest.approx(2.2797, abs=0.002)
    assert Decimal(made.promise("train", 2).epsilon_rdp) > Decimal(train.epsilon_rdp)
    assert made.curve[-1] == (1000, train.epsilon_rdp)
    assert list(made.curve) == sorted(made.curve, key=lambda point: (point[0], Decimal(point[1])))
    assert made.noise_factor == pytest.approx(math.sqrt(5 / 3))
    text = " ".join(words(study(), made))
    assert f"at most {train.spotted} %" in text
    for said in ("binds", "continuous ideal", "at one hospital", "1.29 times", "noise_floor"):
        assert said in text


def test_n8_per_site_noise_is_the_root_of_all_hospitals() -> None:
    alone = study("per-site", count=20, steps=5)
    made = claim(alone)
    assert made.noise_factor == pytest.approx(math.sqrt(5))
    assert [p.epsilon_rdp for p in made.promises[:3]] == [p.epsilon_rdp for p in made.promises[3:]]
    assert made.curve[-1][0] == 20
    assert "both tiers are equal" in " ".join(words(alone, made))


def test_hopeless_noise_is_said_and_not_computed_for_minutes() -> None:
    began = time.monotonic()
    made = claim(study(count=100_000, sigma="0.1", rate="0.5"))
    assert time.monotonic() - began < 20
    train = made.promise("train", 2)
    assert float(train.epsilon_rdp) > HOPELESS
    assert (train.epsilon_pld, train.spotted) == (train.epsilon_rdp, "100")


@given(value=st.floats(0, 1e6))
def test_figures_are_rounded_up(value: float) -> None:
    assert 0 <= Fraction(rounded(value)) - Fraction(value) < Fraction(1, 1000)
    assert rounded(math.inf) == "inf"


# ---- planning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", ["0.5", "2.4682", "8"])
@pytest.mark.parametrize("mode", ["shared", "per-site"])
def test_the_noise_found_is_the_least(epsilon: str, mode: str) -> None:
    draft = study(mode)
    found = find_noise(draft, epsilon)

    def claimed(sigma: Decimal) -> float:
        return epsilon_rdp(events(study(mode, sigma=str(sigma)), 1)["train"], draft.privacy.delta)

    assert claimed(found) <= float(epsilon) < claimed(found - Decimal("0.001"))
    assert find_noise(study(mode, sigma="0.1"), epsilon) == found == find_noise(study(mode, sigma="9000"), epsilon)


def test_noise_is_found_for_evaluations_too_and_refused_where_none_is_enough() -> None:
    found = find_noise(study(), "1", role="test")
    assert epsilon_rdp(Event(Fraction(found), Fraction(1), 2), "0.000001") <= 1
    assert epsilon_rdp(Event(Fraction(found) - Fraction(1, 1000), Fraction(1), 2), "0.000001") > 1
    with pytest.raises(ConsiliumError, match="No noise is enough"):
        find_noise(study(rate="1", count=100_000), "0.001")
    assert find_noise(study(count=1, rate="0.001"), "100000") == Decimal("0.1")


def test_eight_studies_fit_a_lifetime_that_summed_epsilons_end_after_three() -> None:
    often = repeats(study())
    assert dict(often.filtered) == {4: 8, 5: 8}
    assert often.summed == 3
    cost = costs(events(study(), 1)["train"])[ORDERS.index(4)] * 1000
    assert 8 * cost <= capacity("8", "0.000001", 4) < 9 * cost
