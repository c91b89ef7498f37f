"""For the tests of noise: what is right (mass function, the paper's sampler), and how right is measured."""

import hashlib
import itertools
import math
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st
from scipy import stats

from privacy.noise import Source, discrete_gaussian

SMALL, NIL = 1e-4, 1e-12
"""A fit is refused below SMALL; a sabotaged sampler must fall below NIL."""
FINE = Context(prec=90)
SIGMAS = st.one_of(
    st.floats(0.01, 2.0**28), st.fractions(Fraction(1, 100), 1 << 28), st.floats(-6.6, 28).map(lambda e: 2.0**e),
)  # fmt: skip


def key(name: str) -> bytes:
    return hashlib.sha256(f"test of noise: {name}".encode()).digest()


def draw(count: int, sigma: Fraction | float, name: str = "") -> np.ndarray:
    return discrete_gaussian(count, sigma, Source.for_tests_only(key(f"{sigma} {name}")))


# What is right: the mass function, and the paper's own sampler in Fractions, which shares nothing with ours.


def exp(power: Fraction) -> Decimal:
    return FINE.exp(FINE.divide(Decimal(power.numerator), Decimal(power.denominator)))


def running(weights: list[Decimal]) -> list[Decimal]:
    """Their sums from the first on, to 90 digits."""
    return list(itertools.accumulate(weights, FINE.add))


def masses(sigma: Fraction, reach: int) -> dict[int, float]:
    """P(x) of N_Z(0, sigma^2) for |x| <= reach."""
    weights = {x: exp(Fraction(-x * x) / (2 * sigma * sigma)) for x in range(reach + 1)}
    total = 2 * sum(weights.values()) - 1
    return {x: float(weights[abs(x)] / total) for x in range(-reach, reach + 1)}


Below = Callable[[int], int]


def coin_exp(gamma: Fraction, below: Below) -> bool:
    """Bernoulli(exp(-gamma)): Canonne, Kamath, Steinke 2020, Algorithm 1."""
    while gamma > 1:
        if not coin_exp(Fraction(1), below):
            return False
        gamma -= 1
    turn = 1
    while below(gamma.denominator * turn) < gamma.numerator:
        turn += 1
    return turn % 2 == 1


def laplace(scale: int, below: Below) -> int:
    """Discrete Laplace: their Algorithm 2 for a whole scale."""
    while True:
        place = below(scale)
        if not coin_exp(Fraction(place, scale), below):
            continue
        laps = 0
        while coin_exp(Fraction(1), below):
            laps += 1
        size, negative = place + scale * laps, below(2)
        if size or not negative:
            return -size if negative else size


def reference(sigma: Fraction, below: Below) -> int:
    """Discrete Gaussian: their Algorithm 3."""
    scale, square = math.floor(sigma) + 1, sigma * sigma
    while True:
        y = laplace(scale, below)
        if coin_exp((abs(y) - square / scale) ** 2 / (2 * square), below):
            return y


# How right is measured.


def chi_square(draws: np.ndarray, expected: dict[int, float]) -> float:
    """p of a chi-square test; neighbours outwards are pooled until ten are expected in each bin."""
    values, counts = np.unique(draws, return_counts=True)
    seen = dict(zip(values.tolist(), counts.tolist(), strict=True))
    if not set(seen) <= set(expected):
        return 0.0
    bins: list[tuple[float, int]] = []
    mass, number = 0.0, 0
    for x in sorted(expected):
        mass += expected[x] * len(draws)
        number += seen.get(x, 0)
        if mass >= 10:
            bins.append((mass, number))
            mass, number = 0.0, 0
    bins[-1] = (bins[-1][0] + mass, bins[-1][1] + number)
    score = sum((number - mass) ** 2 / mass for mass, number in bins)
    return float(stats.chi2.sf(score, len(bins) - 1))


def fit(draws: np.ndarray, sigma: Fraction | float) -> float:
    """p of `draws` under N_Z(0, sigma^2): each integer for a small sigma, else Kolmogorov's largest gap.

    For sigma >= 1000 the distribution function at x is the normal one at x + 1/2 to 1e-7, far below what is measured.
    """
    if sigma < 500:
        return chi_square(draws, masses(Fraction(sigma), int(9 * sigma) + 9))
    values, counts = np.unique(draws, return_counts=True)
    truth = stats.norm.cdf((values + 0.5) / float(sigma))
    gap = np.abs(np.cumsum(counts) / len(draws) - truth).max()
    return float(stats.kstwobign.sf(gap * math.sqrt(len(draws))))
