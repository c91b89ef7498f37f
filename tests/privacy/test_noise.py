"""The noise: a discrete Gaussian; a keystream that serves once; and that these tests would see it fail.

Keys are fixed, so what a statistic says is the same in every run.
"""

import copy
import math
import os
import pickle
import random
import tracemalloc
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from privacy import noise
from privacy.errors import ConsiliumError
from privacy.noise import Source, discrete_gaussian, distance, representable
from tests.privacy.noise_kit import NIL, SIGMAS, SMALL, chi_square, draw, fit, key, reference


@pytest.mark.parametrize("sigma", [0.3, 1, 3.7, 31.5, 32, 64, 100.25, 1e3, 2**20, 2**20 + 0.37, 2**28])
def test_the_draws_have_the_distribution(sigma):
    assert fit(draw(1_000_000, sigma), sigma) > SMALL


@pytest.mark.parametrize("sigma", [1e3, 65537, 2**20, 2**28])
def test_large_draws_have_the_moments_and_every_low_bit(sigma):
    draws = draw(2_000_000, sigma, "moments")
    scaled = draws / float(sigma)
    for power, spread in ((1, 1), (2, 2), (3, 15), (4, 96)):  # variance of z^power for a normal z
        wanted = {2: 1, 4: 3}.get(power, 0)
        assert abs((scaled**power).mean() - wanted) < 4.5 * math.sqrt(spread / len(draws))
    for shift in (0, 3, 6):  # below a quarter sigma every residue is as likely as the next
        assert chi_square((draws >> shift) % 8, dict.fromkeys(range(8), 1 / 8)) > SMALL or sigma < 8 << shift


@pytest.mark.parametrize("sigma", [0.3, 1, 3.7, 64, 1e3, 2**20])
def test_plus_and_minus_are_alike(sigma):
    draws = draw(400_000, sigma, "sign")
    plus, minus = int((draws > 0).sum()), int((draws < 0).sum())
    assert stats.binomtest(plus, plus + minus).pvalue > SMALL
    assert stats.ks_2samp(draws[draws > 0], -draws[draws < 0]).pvalue > SMALL


@pytest.mark.parametrize("sigma", [Fraction(3, 10), Fraction(1), Fraction(37, 10), Fraction(129, 2)])
def test_the_papers_own_sampler_agrees(sigma):
    below = random.Random(2004).randrange
    slow = np.array([reference(sigma, below) for _ in range(10_000)])
    assert fit(slow, sigma) > SMALL
    fast = draw(200_000, sigma, "paper")
    values = np.arange(-int(9 * sigma) - 2, int(9 * sigma) + 3)
    table = np.array([[(slow == x).sum() for x in values], [(fast == x).sum() for x in values]])
    rare = table.sum(0) < 200
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(1) + 1])
    assert stats.chi2_contingency(table).pvalue > SMALL


SABOTAGE = {
    "half the noise": (3.7, lambda n, rng: np.rint(draw(n, 3.7) / 2).astype(np.int64)),
    "half the noise, large": (1e3, lambda n, rng: draw(n, 1e3) // 2),
    "a rounded continuous Gaussian": (0.3, lambda n, rng: np.rint(rng.normal(0, 0.3, n)).astype(np.int64)),
    "a rounded Laplace": (1e3, lambda n, rng: np.rint(rng.laplace(0, 1e3 / 2**0.5, n)).astype(np.int64)),
    "three parts in a hundred too little": (1e3, lambda n, rng: draw(n, 970)),
    "minus zero kept": (3.7, lambda n, rng: np.where(rng.random(n) < 0.05, 0, draw(n, 3.7))),
    "one off": (64, lambda n, rng: draw(n, 64) + 1),
    "even numbers only": (64, lambda n, rng: draw(n, 64) & ~1),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_sabotaged_sampler_fails_the_same_fit(name):
    sigma, sampler = SABOTAGE[name]
    assert fit(sampler(1_000_000, np.random.default_rng(1)), sigma) < NIL


def test_a_staircase_without_its_coins_fails_the_same_fit():
    whole = noise._staircase(Fraction(64))
    [stream] = Source.for_tests_only(key("coins")).streams(1)
    assert fit(noise._trials(1_000_000, whole, stream), 64) > SMALL
    flat = replace(whole, scale=np.zeros_like(whole.scale))
    assert fit(noise._trials(1_000_000, flat, stream), 64) < NIL


# Parameters.


@given(SIGMAS, SIGMAS)
def test_sigma_is_rounded_up_by_less_than_one_part_in_two_to_the_27(one, other):
    a, b = representable(one), representable(other)
    assert Fraction(one) <= a < Fraction(one) * (1 + Fraction(1, 2**27))
    assert representable(a) == a
    assert a.numerator <= 2**28
    assert a.denominator & (a.denominator - 1) == 0
    assert (a <= b) if one <= other else (b <= a)


@given(SIGMAS, st.integers(0, 10**9))
def test_the_distance_is_small_and_adds_up(sigma, count):
    assert distance(count, sigma) == count * distance(1, sigma)
    assert 0 < distance(1, sigma) < Fraction(1, 2**117)


BAD = (0, -1, 0.0099, 2**28 + 1, math.nan, math.inf, -math.inf, True, "3", None, 1j, Fraction(0), 10**400)


@pytest.mark.parametrize("sigma", BAD, ids=lambda sigma: str(sigma)[:9])
def test_a_sigma_out_of_range_is_refused_by_name(sigma):
    for use in (representable, lambda s: distance(1, s), lambda s: discrete_gaussian(1, s, Source())):
        with pytest.raises(ConsiliumError, match=r"standard deviation of the noise is out of range.*0\.01 to 2\^28"):
            use(sigma)


def test_counts():
    assert draw(0, 10).shape == (0,)
    for count in (1, 7, noise.BLOCK - 1, noise.BLOCK, noise.BLOCK + 1):
        draws = draw(count, 10)
        assert draws.shape == (count,)
        assert draws.dtype == np.int64
    with pytest.raises(ValueError, match="negative"):
        draw(-1, 10)


def test_memory_is_the_output_and_a_few_megabytes():
    draw(1, 1e4)
    tracemalloc.start()
    try:
        draws = draw(3_000_000, 1e4)
        assert tracemalloc.get_traced_memory()[1] < draws.nbytes + 16 * 2**20
    finally:
        tracemalloc.stop()


# The source: RULES N1.


def test_n1_two_sources_differ_and_a_test_key_repeats():
    one, other = (discrete_gaussian(100_000, 1000, Source()) for _ in range(2))
    assert (one == other).mean() < 0.01
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
    assert (draw(100_000, 1000) == draw(100_000, 1000)).all()
    assert (draw(100_000, 1000) == draw(100_000, 1000, "another")).mean() < 0.01


def test_the_number_of_threads_changes_nothing():
    drawn = [
        discrete_gaussian(300_000, 1000, Source.for_tests_only(key("threads")), threads) for threads in (None, 1, 2, 5)
    ]
    assert all((drawn[0] == other).all() for other in drawn)


def test_n1_no_keystream_is_read_twice():
    source = Source.for_tests_only(key("once"))
    read = [stream.words(50_000) for stream in source.streams(3)]
    discrete_gaussian(100_000, 1000, source)
    read += [stream.words(50_000) for stream in source.streams(2)]
    [stream] = source.streams(1)
    read += [stream.words(size) for size in (1, 1, 30_000, 3)]  # in pieces, each goes on where the last ended
    words = np.concatenate(read)
    assert len(np.unique(words)) == len(words)
    draws = discrete_gaussian(3 * noise.BLOCK, 2**28, source).reshape(3, -1)
    again = discrete_gaussian(noise.BLOCK, 2**28, source)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (draws[one] == draws[other]).sum() < 5
    assert (draws == again).sum() < 5


def test_n1_nothing_shows_or_carries_the_key():
    secret = key("secret")
    source = Source.for_tests_only(secret)
    [stream] = source.streams(1)
    for shown in (repr(source), str(source), f"{source}", repr(stream), repr([source, stream])):
        assert secret.hex() not in shown
        assert repr(secret) not in shown
    assert repr(source) == "<Source, 1 streams dealt>"
    for thing in (source, stream):
        with pytest.raises(TypeError):
            vars(thing)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError, match="serve twice"):
                pickle.dumps(thing, protocol)
        for copied in (copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="serve twice"):
                copied(thing)


def test_n1_a_forked_process_cannot_draw_the_same_noise():
    source = Source()
    child = os.fork()
    if child == 0:
        try:
            discrete_gaussian(1, 10, source)
        except ConsiliumError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert len(discrete_gaussian(1, 10, source)) == 1


@pytest.mark.parametrize("secret", [b"", b"k" * 31, b"k" * 33, b"k" * 16])
def test_a_test_key_is_32_bytes(secret):
    with pytest.raises(ValueError, match="32 bytes"):
        Source.for_tests_only(secret)
