"""The noise, word for word: Python's own integers read the same draws from the keystream; golden draws; every edge."""

import hashlib
import json
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import noise
from privacy.noise import Source, discrete_gaussian, distance, representable
from tests.privacy.noise_kit import FINE, SIGMAS, SMALL, chi_square, exp, key, running

GOLDEN = json.loads((Path(__file__).parents[1] / "vectors" / "noise" / "golden.json").read_text())


# Word for word: the same keystream read with Python's integers and 90 digits.


class Words:
    """A stream's words as Python integers, read from the cipher itself."""

    def __init__(self, secret: bytes, stream: int) -> None:
        counter = modes.CTR((stream * 2**64).to_bytes(16, "big"))
        self.cipher = Cipher(algorithms.AES(secret), counter).encryptor()

    def __call__(self, count: int) -> list[int]:
        data = self.cipher.update(bytes(8 * count))
        return [int.from_bytes(data[at : at + 8], "little") for at in range(0, 8 * count, 8)]


def retrace(count: int, sigma: Fraction, words: Words) -> list[int]:
    """What one stream must give for `count` draws, by the statement in the module's docstring."""
    width = 1
    while 2 * width * 16 <= sigma:
        width *= 2
    square = 2 * sigma * sigma
    weights = [exp(-Fraction((k * width) ** 2) / square) for k in range(max(2, int(13.5 * float(sigma) / width) + 1))]
    sums = running(weights)
    steps = [math.floor(FINE.multiply(FINE.divide(part, sums[-1]), Decimal(2**128))) for part in sums[:-1]]
    over = 2 * sigma.numerator**2
    draws: list[int] = []
    while len(draws) < count:
        missing = count - len(draws)
        size = min(2**15, missing + missing // 8 + 8)
        picks, coins = words(size), words(size)
        halves = [half for word in words((size + 1) // 2) for half in (word % 2**32, word // 2**32)][:size]
        stairs = []
        for pick in picks:
            tie = any(step >> 64 == pick for step in steps)
            value = (pick << 64) + (words(1)[0] if tie else 0)
            stairs.append(sum(step <= value for step in steps) if tie else sum(step >> 64 < pick for step in steps))
        sizes = [stair * width + half % width for stair, half in zip(stairs, halves, strict=True)]
        gammas = [Fraction(x * x - (s * width) ** 2) / square for x, s in zip(sizes, stairs, strict=True)]
        keep = [False] * size
        waiting = {at: (coin, 1) for at, coin in enumerate(coins)}
        while waiting:
            again = []
            for at, (coin, turn) in waiting.items():
                part = 2**64 // (turn * over)
                if coin >= turn * over * part:
                    again += [(at, turn)] if turn > 1 else []
                elif coin < gammas[at] * over * part:
                    again.append((at, turn + 1))
                else:
                    keep[at] = turn % 2 == 1
            waiting = {at: (word, turn) for (at, turn), word in zip(again, words(len(again)), strict=True)}
        for at in range(size):
            negative = halves[at] >> 31
            if keep[at] and (sizes[at] or not negative):
                draws.append(-sizes[at] if negative else sizes[at])
    return draws[:count]


@pytest.mark.parametrize("sigma", [0.01, 0.3, 3.7, 32, Fraction(100, 3), 1000, 2**20, 12345678.9, 2**28 - 0.5, 2**28])
def test_python_integers_read_the_same_draws_from_the_keystream(sigma):
    secret = key(f"retrace {sigma}")
    assert draw_with(secret, 1500, sigma) == retrace(1500, representable(sigma), Words(secret, 0))


def draw_with(secret: bytes, count: int, sigma: Fraction | float) -> list[int]:
    return discrete_gaussian(count, sigma, Source.for_tests_only(secret)).tolist()


@pytest.mark.parametrize("row", GOLDEN["draws"], ids=lambda row: f"{row['sigma']}-{row['count']}")
def test_golden_draws(row):
    sigma = Fraction(row["sigma"])
    draws = discrete_gaussian(row["count"], sigma, Source.for_tests_only(bytes.fromhex(row["key"])))
    assert str(representable(sigma)) == row["representable"]
    assert str(distance(row["count"], sigma)) == row["distance"]
    assert draws[:40].tolist() == row["first"]
    assert hashlib.sha256(draws.astype("<i8").tobytes()).hexdigest() == row["sha256"]


def test_the_golden_keystream_is_plain_aes_in_counter_mode():
    secret = bytes.fromhex(GOLDEN["keystream"]["key"])
    for number, words in enumerate(GOLDEN["keystream"]["streams"]):
        assert Words(secret, number)(4) == words
    assert [stream.words(4).tolist() for stream in Source.for_tests_only(secret).streams(2)] == GOLDEN["keystream"][
        "streams"
    ]


# The arithmetic at its edges.


class Script:
    """A stream whose words are written down."""

    def __init__(self, *words: int) -> None:
        self.left = list(words)

    def words(self, count: int) -> np.ndarray:
        given, self.left = self.left[:count], self.left[count:]
        assert len(given) == count, "more words were read than the case foresees"
        return np.array(given, np.uint64)


@settings(max_examples=150, deadline=None)
@given(SIGMAS)
def test_no_product_leaves_64_bits_and_no_coin_is_biased(sigma):
    exact = representable(sigma)
    case = noise._staircase(exact)
    over = 2 * exact.numerator**2
    place = case.width - 1
    top = (case.stairs - 1) * case.width + place
    most = place * (2 * top - place) * int(case.step)
    assert Fraction(most, over) == (Fraction(top**2 - (top - place) ** 2) / (2 * exact**2)) < 0.85
    assert (case.stairs * case.width) > 13.5 * exact
    assert case.width <= 1 << 24
    for coin in (1, 2, 3, 64, noise.COINS):
        part = 2**64 // (coin * over)
        assert part >= 1
        assert int(case.scale[coin]) == part
        assert int(case.last[coin]) == coin * over * part - 1 < 2**64
        assert most * part < 2**64
    assert over / 2**64 <= 2**-7


@settings(max_examples=40, deadline=None)
@given(SIGMAS)
def test_thresholds_are_as_near_as_the_statement_says(sigma):
    exact = representable(sigma)
    case = noise._staircase(exact)
    weights = [exp(-Fraction((k * case.width) ** 2) / (2 * exact**2)) for k in range(case.stairs + 40)]
    sums = running(weights)
    slack = Decimal(1) + Decimal(10) ** -15
    for threshold, wanted in zip(case.thresholds, sums, strict=False):
        true = FINE.multiply(FINE.divide(wanted, sums[case.stairs - 1]), Decimal(2**128))
        assert abs(FINE.subtract(Decimal(threshold), true)) <= slack
    assert FINE.subtract(sums[-1], sums[case.stairs - 1]) < Decimal(2) ** -129


@settings(max_examples=30, deadline=None)
@given(SIGMAS, st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_a_word_finds_its_stair_and_ties_are_settled_by_64_bits_more(sigma, words):
    case = noise._staircase(representable(sigma))
    edges = {threshold >> 64: threshold % 2**64 for threshold in case.thresholds[:64]}
    edges[case.thresholds[-1] >> 64] = case.thresholds[-1] % 2**64
    words = [*words, 2**63 - 1, 2**63, 2**63 + 1, 0, 2**64 - 1]
    words += [edge + off for edge in edges for off in (-1, 0, 1) if 0 <= edge + off < 2**64]
    ties = [word for word in words if word in {threshold >> 64 for threshold in case.thresholds}]
    for off in (-1, 0, 1):
        lows = [min(max(edges.get(word, 0) + off, 0), 2**64 - 1) for word in ties]
        script, left = Script(*lows), iter(lows)
        starts = case.pick(np.array(words, np.uint64), script)
        assert not script.left
        longer = [(word << 64) + (next(left) if word in ties else 0) for word in words]
        wanted = [sum(threshold <= value for threshold in case.thresholds) for value in longer]
        assert starts.tolist() == [stair * case.width for stair in wanted]


def test_first_coins_at_the_border_of_bias_and_of_void():
    sigma = representable(1000)
    case = noise._staircase(sigma)
    over, place = 2 * 1000**2, 17
    n = place * place  # stair 0, so x = U
    bar, last = n * (2**64 // over), int(case.last[1])
    coins = [bar, last, last + 1, bar - 1, bar - 1, bar - 1]
    later = {2: 2**64 // (2 * over), 3: 2**64 // (3 * over)}
    script = Script(
        *[0] * 6, *coins, *[place + (place << 32)] * 3,
        n * later[2], n * later[2] - 1, 2 * over * later[2],  # second coins: tails (even: lost), heads, void
        n * later[3], n * later[2] - 1,                       # third of the fifth: tails (kept); second of the last
        n * later[3] - 1, n * (2**64 // (4 * over)),          # third of the last: heads; fourth: tails (even: lost)
    )  # fmt: skip
    assert last < 2**64 - 1
    assert noise._trials(6, case, script).tolist() == [place, place, place]  # the first, the second, the fifth
    assert not script.left


def test_a_power_of_two_leaves_no_void_coin():
    case = noise._staircase(Fraction(2**20))
    assert int(case.last[1]) == 2**64 - 1
    script = Script(0, 0, 2**64 - 1, 2**63, 5 | (7 | 1 << 31) << 32)
    assert noise._trials(2, case, script).tolist() == [5, -7]


def test_minus_zero_is_drawn_again():
    script = Script(0, 0, 2**64 - 1, 2**63, 1 << 31 << 32)
    assert noise._trials(2, noise._staircase(Fraction(2**20)), script).tolist() == [0]


class Tail:
    """A stream whose stairs all come from the last 2^-28 of the distribution."""

    def __init__(self, secret: bytes, trials: int) -> None:
        [self.stream] = Source.for_tests_only(secret).streams(1)
        self.trials = trials

    def words(self, count: int) -> np.ndarray:
        words = self.stream.words(count).copy()
        words[: self.trials] |= np.uint64(2**64 - 2**36)
        self.trials = 0
        return words


@pytest.mark.parametrize("sigma", [Fraction(37, 10), Fraction(31)])
def test_tails_beyond_six_sigma_come_as_often_as_they_should(sigma):
    exact = representable(sigma)
    draws = np.abs(noise._trials(400_000, noise._staircase(exact), Tail(key("tail"), 400_000)))
    weights = [exp(-Fraction(k * k) / (2 * exact**2)) for k in range(int(13.5 * sigma) + 1)]
    above, expected = Decimal(0), {}
    for k in reversed(range(len(weights))):  # what of stair k lies within the last 2^-28
        below = above
        above = FINE.add(above, FINE.divide(weights[k], running(weights)[-1]))
        share = FINE.subtract(min(above, Decimal(2) ** -28), min(below, Decimal(2) ** -28))
        expected[k] = float(FINE.multiply(share, Decimal(2**28)))
    assert chi_square(draws, expected) > SMALL
    assert (draws > 6 * sigma).sum() > 50_000
    assert draws.max() > 7 * sigma


@pytest.mark.parametrize("sigma", [3.7, 100, 2**28])
def test_the_last_words_of_all_reach_thirteen_sigma(sigma):
    case = noise._staircase(representable(sigma))
    [start] = case.pick(np.array([2**64 - 1], np.uint64), Script(2**64 - 1))
    assert 13 * sigma < start <= 13.5 * sigma
