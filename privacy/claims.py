"""What may a study say it promises? ε for every role and both tiers, two ways, and what an attacker gains.

Unit: the patient, at one site (RULES N7). Adjacency: all of one patient's images added or removed. Two figures stand
side by side (RULES B4):

* `epsilon_rdp` BINDS. Rényi differential privacy of the discrete noise, turned into (ε, δ) by Proposition 12 of
  Canonne, Kamath and Steinke 2020 (arXiv 2004.00010) at the best of many orders.
* `epsilon_pld` is a closer look at the continuous idealisation: the distribution of the privacy loss, composed by
  Fourier transform and rounded against us (Koskela 2020, arXiv 1906.03049; Doroshenko 2022, arXiv 2207.04380). It is
  labelled so wherever it is shown, and never spent from a budget.

Both are Google's `dp_accounting`. Why its formula for Gaussian noise also binds ours, at whole orders and between them:
let A(α) = E_P[((1 − q) + qL)^α] with L the likelihood ratio of the noise shifted by the grid vector v, ‖v‖ ≤ s/σ.
Replace the grid by the line one coordinate after the other. As a function of coordinate i the integrand is analytic
for |Im| < πs²/|vᵢ|, and by the triangle inequality no larger there than on the line; so Poisson's summation formula,
with the path moved that far, gives a relative error of at most 3·exp(−1.5·π²·s·σ) a coordinate. With s of 2¹⁰ grid
steps or more and σ of 0.014 or more (0.1 shared by 48) that is below 10⁻⁹⁰. It is paid, as the sum of several
discrete Gaussians is (`privacy.accounting`, point 3), by one unit of 10⁻¹² for each release.

GDP and the central limit theorem appear nowhere: they fall below the true ε. Epsilons are never summed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

from privacy.accounting import DISCRETE, ROLES, UNIT, Event, Number, Role, Tier, events
from privacy.study import Study

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

TIERS: tuple[Tier, ...] = (1, 2)
FALSE_ALARMS = 0.001
"""How often the attacker of `Promise.spotted` may accuse wrongly; also the prior chance of a right guess."""
HOPELESS = 1000.0
"""Above this ε nothing is promised that matters, and the privacy loss distribution is no longer computed."""
POINTS = 20
_FINE_ORDERS = (
    *(1.02, 1.05, *(1 + tenth / 10 for tenth in range(1, 100)), *range(11, 64)),
    *(64, 80, 96, 128, 192, 256, 512, 1024),
)
_STEP = Decimal("0.001")


@dataclass(frozen=True)
class Promise:
    """What one role is promised in one tier, at the study's δ; every figure rounded up, as decimal text.

    Attributes:
        epsilon_rdp: the ε that binds.
        epsilon_pld: ε of the continuous idealisation.
        spotted: per cent of patients in the study that an attacker who sees everything and knows everybody else could
            spot at most, when he accuses 0.1 % of those who are not in it. The same number bounds how often he could
            rebuild what he would have guessed with chance 1/1000: both are the trade-off curve at 0.001 (Hayes,
            Mahloujifar and Balle 2023, arXiv 2302.07225). Of the continuous idealisation.
    """

    role: Role
    tier: Tier
    event: Event
    epsilon_rdp: str
    epsilon_pld: str
    spotted: str


@dataclass(frozen=True)
class Claim:
    """Everything a study promises.

    Attributes:
        delta: δ, as the study writes it.
        promises: one for each tier and role, tier 1 first.
        curve: (rounds, ε) of tier 1 for training patients, up to the rounds and their reserve; ε binds.
        noise_factor: how many times the noise of pooled data an opened sum of all hospitals has (RULES N8).
    """

    delta: str
    promises: tuple[Promise, ...]
    curve: tuple[tuple[int, str], ...]
    noise_factor: float

    def promise(self, role: Role, tier: Tier) -> Promise:
        """One cell of the table."""
        return next(promise for promise in self.promises if (promise.role, promise.tier) == (role, tier))

    def worst(self, tier: Tier) -> Promise:
        """The role that is promised least."""
        return max((p for p in self.promises if p.tier == tier), key=lambda p: Decimal(p.epsilon_rdp))


def claim(study: Study) -> Claim:
    """What a study with noise promises. Seconds of work at most.

    Raises:
        ConsiliumError: the study has no noise.
    """
    privacy = study.privacy
    delta = privacy.delta
    asked = {tier: events(study, tier) for tier in TIERS}
    promises = tuple(_promise(role, tier, asked[tier][role], delta) for tier in TIERS for role in ROLES)
    train, rounds = asked[1]["train"], study.rounds.count + (study.rounds.reserve if privacy.mode == "shared" else 0)
    steps = Fraction(train.count, rounds)
    marks = sorted({max(1, rounds * point // POINTS) for point in range(1, POINTS + 1)})
    curve = tuple((mark, rounded(epsilon_rdp(train, delta, int(mark * steps)))) for mark in marks)
    own = asked[2]["train"].noise_multiplier / train.noise_multiplier
    return Claim(delta, promises, curve, math.sqrt(len(study.sites)) * float(own))


def _promise(role: Role, tier: Tier, event: Event, delta: str) -> Promise:
    binding = epsilon_rdp(event, delta)
    close, spotted = _closer(event, delta)
    return Promise(role, tier, event, rounded(binding), rounded(close), f"{math.ceil(spotted * 1000) / 10:g}")


def rounded(epsilon: float) -> str:
    """ε as decimal text, rounded up to three digits after the point; "inf" when there is none."""
    if not math.isfinite(epsilon):
        return "inf"
    return format(Decimal(epsilon).quantize(_STEP, ROUND_CEILING), "f")


# ---- the claim that binds ------------------------------------------------------------------------------------


def epsilon_rdp(event: Event, delta: Number, count: int | None = None) -> float:
    """The ε that binds after `count` releases (left out: all of the event's), at the best of many Rényi orders."""
    from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

    many = event.count if count is None else count
    if many == 0 or event.sampling_rate == 0:
        return 0.0
    return float(compute_epsilon(_FINE_ORDERS, [cost * many for cost in _rdp(event)], float(Fraction(delta)))[0])


@lru_cache(maxsize=256)
def _rdp(event: Event) -> tuple[float, ...]:
    """RDP of one release at each of the fine orders, the discrete noise paid for (infinite where not computed)."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(list(_FINE_ORDERS))
    release = dp_accounting.GaussianDpEvent(float(event.noise_multiplier))
    if event.sampling_rate < 1:
        release = dp_accounting.PoissonSampledDpEvent(float(event.sampling_rate), release)
    with _quiet():
        accountant.compose(release)
    return tuple(float(cost) + DISCRETE * UNIT for cost in accountant.rdp)


@contextmanager
def _quiet() -> Iterator[None]:
    """dp_accounting warns of each order that it leaves out; leaving some out is what we want."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


# ---- the continuous idealisation -----------------------------------------------------------------------------


def epsilon_pld(event: Event, delta: Number) -> float:
    """ε of the continuous idealisation, rounded against us; above HOPELESS the one that binds stands in for it."""
    return _closer(event, str(delta))[0]


@lru_cache(maxsize=64)
def _closer(event: Event, delta: str) -> tuple[float, float]:
    """(ε, highest rate of true positives at FALSE_ALARMS) of the continuous idealisation."""
    if event.count == 0 or event.sampling_rate == 0:
        return 0.0, FALSE_ALARMS
    binding = epsilon_rdp(event, delta)
    if binding > HOPELESS:
        return binding, 1.0
    found = losses(event, binding)
    close = float(found.get_epsilon_for_delta(float(Fraction(delta))))
    return min(close, binding), true_positives(found, FALSE_ALARMS)


def losses(event: Event, scale: float) -> PrivacyLossDistribution:
    """The distribution of the privacy loss after all of an event's releases.

    Args:
        scale: about how large ε is. The grid is chosen so that it adds some 0.0002 to ε, or a ten-thousandth of a
            larger one: what it adds grows with count · step².
    """
    from dp_accounting.pld import privacy_loss_distribution

    many, sigma = event.count, float(event.noise_multiplier)
    if event.sampling_rate == 1:  # as if once, with less noise: exact for Gaussian noise
        return privacy_loss_distribution.from_gaussian_mechanism(
            sigma / math.sqrt(many), value_discretization_interval=max(5e-4, scale / 1e4)
        )
    step = min(0.1, max(1e-4, math.sqrt(max(2e-4, scale / 1e4) / many)))
    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma, value_discretization_interval=step, sampling_prob=float(event.sampling_rate)
    ).self_compose(many)


def true_positives(found: PrivacyLossDistribution, false_alarms: float) -> float:
    """The most true positives at a rate κ of false alarms, by any test: min over ε of both lines that δ(ε) allows.

    They are e^ε·κ + δ(ε) and 1 − (1 − κ − δ(ε))·e^(−ε), each with one valley in ε (Kairouz, Oh and Viswanath 2015).
    Every ε gives a valid bound, so the search need not be exact.
    """

    def rising(epsilon: float) -> float:
        return math.exp(epsilon) * false_alarms + float(found.get_delta_for_epsilon(epsilon))

    def falling(epsilon: float) -> float:
        return 1 - (1 - false_alarms - float(found.get_delta_for_epsilon(epsilon))) * math.exp(-epsilon)

    most = -math.log(false_alarms)
    best = _lowest(rising, most)
    return min(1.0, best if best < 0.5 else min(best, _lowest(falling, most)))


def _lowest(function: Callable[[float], float], most: float) -> float:
    """The least value that a golden-section search from 0 to `most` meets."""
    ratio = (math.sqrt(5) - 1) / 2
    low, high = 0.0, most
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    best = min(function(0.0), at_left, at_right)
    for _ in range(16):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
        best = min(best, at_left, at_right)
    return best


# ---- in words ------------------------------------------------------------------------------------------------


def words(study: Study, made: Claim) -> list[str]:
    """What the figures mean, for a person who is no mathematician (RULES B4, N7, N8)."""
    seen, own = made.promise("train", 1), made.promise("train", 2)
    binding = "ε by RDP binds: it holds for the discrete noise that is really added. ε by PLD is the continuous ideal."
    unit = (
        "Unit: one patient at one hospital, with all of his images. A patient of k hospitals has k times ε, and more "
        "than k times δ (group privacy)."
    )
    spotted = (
        f"Spotted (of the ideal curve): whoever sees the model and every round, and knows all other patients, can spot "
        f"at most {seen.spotted} % of the patients in training while wrongly accusing 0.1 % of the others. With no "
        "model at all it is 0.1 %."
    )
    rebuilt = (
        f"What he would have guessed with chance 1/1000, an image say, he can rebuild for at most {seen.spotted} % "
        "of them."
    )
    if study.privacy.mode == "per-site":
        broken = "Each hospital adds all the noise itself, so both tiers are equal: the second is no worse."
        accuracy = (
            f"The noise in the mean of all hospitals is {made.noise_factor:.2f} times that of pooled data at the same "
            'ε: the square root of their number. mode = "shared" needs less.'
        )
    else:
        broken = (
            f"If secure aggregation were wholly broken, or all other hospitals worked with the coordinator, only a "
            f"hospital's own share of the noise is left: then it is {own.spotted} %, at ε {own.epsilon_rdp}. "
            "noise_floor bounds this tier."
        )
        accuracy = (
            f"With every hospital present the noise is {made.noise_factor:.2f} times that of pooled data at the same "
            "ε: the square root of hospitals over the shares that must be enough (minimum_sites − colluding)."
        )
    return [binding, unit, spotted, rebuilt, broken, accuracy]
