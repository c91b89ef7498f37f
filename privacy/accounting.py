"""What does a release cost a patient? Rényi differential privacy in whole numbers, rounded up, on every machine alike.

What is accounted for. One release is the sum of what a secret Poisson sample of the patients adds (each is in it with
chance q), every patient bounded by Δ in L2 norm, plus discrete Gaussian noise of σ·Δ. Two data sets are neighbours when
all of one patient's images are added or removed. A patient is in exactly one role: train, validation or test.

The bound, for whole orders α (Mironov, Talwar and Zhang 2019, arXiv 1908.10530, section 3.3, for continuous noise):

    RDP(α) = ln( Σₖ C(α, k) · (1 − q)^(α − k) · q^k · exp(k(k − 1) / (2σ²)) ) / (α − 1)

Why it binds the discrete noise as well:

1. With P the noise alone and Q the noise shifted by a patient's whole-number vector v, the binomial theorem turns
   E_P[((1 − q) + q·Q/P)^α] into the sum above, with E_P[(Q/P)^k] = exp((k − 1)·D_k(Q‖P)) in the place of the last
   factor. For discrete Gaussians D_k(Q‖P) ≤ k·‖v‖²/(2σ²), as for continuous ones (Canonne, Kamath and Steinke 2020,
   arXiv 2004.00010, Proposition 5), so every term is at most the term above.
2. The other direction, D_α(P ‖ (1 − q)P + qQ), is never the larger one when some mirror x → v − x exchanges P and Q
   (Mironov, Talwar and Zhang 2019, Theorem 5). Symmetric noise on the grid has that mirror; a sum of symmetric noises
   is symmetric. Everybody else's sample is dealt with by the joint quasi-convexity of Rényi divergence.
3. A sum of n discrete Gaussians of variance s² is no discrete Gaussian, but its log-probabilities differ from one by at
   most τ = 10 · Σ_{k<n} exp(−2π²s²·k/(k + 1)) in each of d coordinates (Kairouz, Liu and Steinke 2021, arXiv
   2102.06387, section 4). That multiplies the k-th term above by at most exp((2k − 1)·τ·d) and adds at most 3τ·d to
   RDP(α). Each share has at least s = `LEAST_SHARE` grid steps, so that τ < 10·n·exp(−π²·2²⁰) < 10^−4,400,000: one
   unit of 10⁻¹² pays for it.

Charges are computed in decimals, not in floating point, so that two hospitals never differ by a last digit.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from privacy.errors import ConsiliumError
from privacy.patient import EVALUATION_TRIES, honest_shares, plan_steps
from privacy.study import Study

Role = Literal["train", "validation", "test"]
Tier = Literal[1, 2]
Number = Fraction | Decimal | int | str
ROLES: tuple[Role, ...] = ("train", "validation", "test")
ORDERS: tuple[int, ...] = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
"""The whole Rényi orders that charges are kept at; one of them decides (RULES B3), the others are shown."""
UNIT = 10**-12
LEAST_SHARE = 2**10
"""The least standard deviation of one share of noise, in grid steps, for which point 3 above is computed."""
DISCRETE = 1
"""Units of RDP that each release pays for the sum of discrete Gaussians not being one itself (point 3 above)."""
_UNITS = 10**12
_DIGITS = 60
_FINE = 10**18


@dataclass(frozen=True)
class Event:
    """`count` releases of a sum with Gaussian noise over a Poisson sample, all charged to the same patient.

    Attributes:
        noise_multiplier: σ, the standard deviation of the noise over Δ, the most that one patient changes the sum.
        sampling_rate: q, the chance of a patient to be in one release; 1 means that everybody is.
        count: releases.
    """

    noise_multiplier: Fraction
    sampling_rate: Fraction
    count: int

    def __post_init__(self) -> None:
        if self.noise_multiplier <= 0 or not 0 <= self.sampling_rate <= 1 or self.count < 0:
            raise ValueError("noise must be above 0, the sampling rate a chance, and the count not below 0")


def events(study: Study, tier: Tier) -> dict[Role, Event]:
    """What a patient of each role is charged for, whether he is sampled or not (RULES B1, B2, N6).

    Tier 1 is what everyone sees: an opened sum with n_min − c honest shares of noise. Tier 2 is one hospital's own
    share alone: what is left if secure aggregation is wholly broken, or all other hospitals work with the coordinator.
    With `per-site` each hospital adds all the noise itself, and both tiers are equal.

    Raises:
        ConsiliumError: the study has no noise.
    """
    privacy = study.privacy
    if privacy.mode == "none":
        raise ConsiliumError(
            "The study has no noise, so it promises patients nothing that could be computed",
            study.study.name,
            'Write mode = "shared" under [privacy]; `consilium-coordinator study new` lists what goes with it.',
        )
    sigma, evaluation = Fraction(privacy.noise_multiplier), Fraction(privacy.evaluation_noise)
    if privacy.mode == "shared":
        shares, floor = honest_shares(study), Fraction(privacy.noise_floor)
        if tier == 1:
            sigma = max(sigma, floor * _root(shares))
        else:
            sigma, evaluation = max(floor, sigma / _root(shares, up=True)), evaluation / _root(shares, up=True)
    once = Event(evaluation, Fraction(1), EVALUATION_TRIES)
    return {
        "train": Event(sigma, Fraction(privacy.sampling_rate), plan_steps(study)),
        "validation": once,
        "test": once,
    }


def _root(number: int, *, up: bool = False) -> Fraction:
    """√number to 18 digits, never above it, or with `up` never below it."""
    square = number * _FINE * _FINE
    root = math.isqrt(square)
    return Fraction(root + 1 if up and root * root < square else root, _FINE)


@lru_cache(maxsize=256)
def costs(event: Event) -> tuple[int, ...]:
    """RDP of one of the event's releases at each of ORDERS, in units of 10⁻¹², rounded up (`count` plays no part)."""
    return tuple(_units(event, order) for order in ORDERS)


def _units(event: Event, order: int) -> int:
    """The bound of the module's first paragraph at one whole order, above 1."""
    q, sigma = event.sampling_rate, event.noise_multiplier
    if q == 0:
        return 0  # nobody is ever asked, so the noise hides nothing
    if q == 1:
        return math.ceil(Fraction(order * _UNITS) / (2 * sigma * sigma)) + DISCRETE
    with decimal.localcontext(decimal.Context(prec=_DIGITS, rounding=ROUND_CEILING)) as context:
        context.Emax, context.Emin = decimal.MAX_EMAX, decimal.MIN_EMIN
        total = Decimal(0)
        for k in range(order + 1):
            weight = math.comb(order, k) * q**k * (1 - q) ** (order - k)
            total += _decimal(weight) * _above(_decimal(Fraction(k * (k - 1)) / (2 * sigma * sigma)), Decimal.exp)
        units = _above(total, Decimal.ln) * _UNITS / (order - 1)
        return int(units.to_integral_value(ROUND_CEILING)) + DISCRETE


def _decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def _above(value: Decimal, function: Callable[[Decimal], Decimal]) -> Decimal:
    """exp or ln of a number, never below the true value: `decimal` rounds these two to nearest, so go one step up."""
    return function(value).next_plus()


def capacity(epsilon: Number, delta: Number, order: int) -> int:
    """The largest RDP at one whole order that still means (ε, δ), in units of 10⁻¹², rounded down; never below 0.

    The conversion is Proposition 12 of Canonne, Kamath and Steinke 2020:
    ε = RDP + ln(1 − 1/α) − (ln δ + ln α) / (α − 1).

    Raises:
        ValueError: ε or δ is not above 0, δ is not below 1, or the order is below 2.
    """
    wanted, chance = Fraction(epsilon), Fraction(delta)
    if wanted <= 0 or not 0 < chance < 1 or order < 2:
        raise ValueError("epsilon must be above 0, delta between 0 and 1, and the order at least 2")
    with decimal.localcontext(decimal.Context(prec=_DIGITS)):
        shrunk, tail = _decimal(Fraction(order - 1, order)).ln(), _decimal(chance * order).ln()
        units = (_decimal(wanted) - shrunk + tail / (order - 1)) * _UNITS
        return max(0, int(units.to_integral_value(ROUND_FLOOR)))
