"""Where does the noise come from, and is it exactly what is claimed? The discrete Gaussian N_ℤ(0, σ²), in integers.

P(x) ∝ exp(−x² / 2σ²) for every integer x: the noise of Canonne, Kamath & Steinke (2020, arXiv 2004.00010), drawn as
there by rejection, with coins of bias exp(−γ) tossed by their Algorithm 1. No floating-point number takes part in a
draw, so no pattern of rounding can show through the noise. What differs is what is rejected from: a staircase, under
which a draw takes about 1.03 trials (from σ = 32 on), where their discrete Laplace takes 2.1 and more coins in each.

**Statement (the draw).** Let W ≥ 1 be an integer and w_k = exp(−(kW)² / 2σ²). One trial picks a stair k = 0, 1, … with
P(k) ∝ w_k, a place U uniform in 0 … W − 1, a sign, and keeps x = kW + U with probability exp(−γ) for
γ = (x² − (kW)²) / 2σ²; minus zero is not kept. Then P(x) ∝ w_k · (1/W) · exp(−γ) ∝ exp(−x² / 2σ²).

- *Place and sign* are bits of one word: W is the largest power of two ≤ σ/16 (1 below σ = 32, where γ = 0).
- *Coins.* σ = p / 2ᵃ with p ≤ 2²⁸ (`representable`), so γ = n / Q with the integers n = U(2x − U)·4ᵃ < Q = 2p² ≤ 2⁵⁷.
  A coin of bias n / (jQ) is a word u against n·c, c = ⌊2⁶⁴ / jQ⌋: heads if u < n·c, void if u ≥ jQc, else tails, so
  its bias is exact. Algorithm 1: toss j = 1, 2, … until tails; x is kept if that j is odd. A void first coin starts the
  trial again (that it is void says nothing of x); a void later one is tossed again. γ < 0.85, so tails comes at once
  for nearly all, and the few others shrink by j each time.
- *Stairs* are picked by inversion: a word against thresholds ⌊2¹²⁸ · P(stair < k)⌋ (60-digit arithmetic), of which
  the first 64 bits decide; a word that equals them, one in 2⁵⁵, draws 64 bits more. Stairs above 13.5 σ are left out.

**Statement (the distance).** K stairs stand below 13.5 σ. Each threshold is off by less than (1 + 10⁻¹⁵)·2⁻¹²⁸, so
their probabilities are off by K·(1 + 10⁻¹⁵)·2⁻¹²⁸ in total variation; the stairs left out weigh less than
w_K / (1 − exp(−13.5/32)) < 2⁻¹²⁹. Nothing else is inexact. A trial ends in a draw with probability a ≥ 0.49 (worst for
tiny σ, where minus zero is common), so by coupling trial with trial a draw is within (K + 1)·2⁻¹²⁸ / a <
(K + 1)·2⁻¹²⁶ ≤ 2⁻¹¹⁷ of N_ℤ(0, σ²), given uniform words. `distance` sums it; a claim adds it to δ (times 1 + e^ε). That
AES-256 in counter mode looks uniform is the cipher's promise, and the same one the masks rest on. How long a draw takes
depends on what is drawn: timing is outside the claim (RULES N4).
"""

from __future__ import annotations

import math
import os
import threading
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache
from typing import NoReturn

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from privacy.errors import ConsiliumError

Draws = npt.NDArray[np.int64]
Long = npt.NDArray[np.uint64]

SMALLEST = Fraction(1, 100)
LARGEST = 1 << 28
"""Bounds of σ, in grid units."""
SIGNIFICANT = 28
"""Bits of σ that are kept."""
BLOCK = 1 << 16
"""Draws of one stream."""
BATCH = 1 << 15
"""Trials made at a time: what they need stays in the processor's cache."""
WORTH = 1 << 17
"""Draws from which a second thread pays."""
THREADS = 2
REACH = Fraction(27, 2)
"""How many σ the staircase goes up."""
CELL = 12
"""Leading bits of a word that find the stair for most."""
COINS = 128
"""Coins of one trial; that so many are heads has probability below 1 / 128! < 2^-700."""
_MIXED = 1 << 63
_DIGITS = 60
_DECIMAL = Context(prec=_DIGITS)
_ZEROS = bytes(20 * BATCH)  # what one batch reads


class Source:
    """A cryptographic generator for one release: the keystream of AES-256 in counter mode under a key of its own.

    The key is 32 bytes of the operating system's generator, made here and never shown: it has no accessor, does not
    print, and the object can be neither copied nor pickled nor used in a forked process, because a keystream that is
    used twice is noise that can be subtracted. Make one for each release and let it go afterwards.

    The keystream is dealt in *streams*: stream s starts at counter s · 2⁶⁴ (big-endian, as SP 800-38A counts), and no
    number is dealt twice. Threads may share a source.
    """

    __slots__ = ("__cipher", "__dealt", "__lock", "__process")

    def __init__(self) -> None:
        self.__start(os.urandom(32))

    @classmethod
    def for_tests_only(cls, key: bytes) -> Source:
        """A source whose noise anyone can repeat who knows `key` (32 bytes): for test vectors, never for patients."""
        if len(key) != 32:
            raise ValueError("a key is 32 bytes")
        source = cls.__new__(cls)
        source.__start(key)
        return source

    def __start(self, key: bytes) -> None:
        self.__cipher = algorithms.AES(key)
        self.__dealt = 0
        self.__lock = threading.Lock()
        self.__process = os.getpid()

    def streams(self, count: int) -> list[Stream]:
        """The next `count` streams, in order; none of them is ever dealt again.

        Raises:
            ConsiliumError: the process was forked since the source was made.
        """
        if os.getpid() != self.__process:
            raise ConsiliumError(
                "A source of noise was carried into another process",
                "its keystream would serve twice",
                "Make a new source in the process that adds the noise.",
            )
        with self.__lock:
            first = self.__dealt
            self.__dealt += count
        return [Stream(self.__cipher, number) for number in range(first, first + count)]

    def __repr__(self) -> str:
        return f"<Source, {self.__dealt} streams dealt>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a source of noise cannot be copied or saved: its keystream would serve twice")


class Stream:
    """One stretch of a source's keystream, read once from its start, in 64-bit little-endian words."""

    __slots__ = ("__encryptor",)

    def __init__(self, cipher: algorithms.AES, number: int) -> None:
        self.__encryptor = Cipher(cipher, modes.CTR((number << 64).to_bytes(16, "big"))).encryptor()

    def words(self, count: int) -> Long:
        """The next `count` words, uint64 [count]."""
        buffer = bytearray(8 * count + 15)  # update_into asks for a block less one to spare
        zeros = _ZEROS if 8 * count <= len(_ZEROS) else bytes(8 * count)
        self.__encryptor.update_into(memoryview(zeros)[: 8 * count], buffer)
        return np.frombuffer(buffer, "<u8", count)

    def __repr__(self) -> str:
        return "<Stream>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a stream of noise cannot be copied or saved: its keystream would serve twice")


def representable(sigma: Fraction | float) -> Fraction:
    """The σ that is truly drawn: the given one rounded up to 28 significant bits and to at most 2^28.

    It is never below `sigma` and above it by less than one part in 2^27. Account with this one, or with the given.

    Raises:
        ConsiliumError: not a number from 0.01 to 2^28.
    """
    good = not isinstance(sigma, bool) and isinstance(sigma, (Fraction, float, int))
    if not good or not SMALLEST <= sigma <= LARGEST:
        raise ConsiliumError(
            "The standard deviation of the noise is out of range",
            f"{sigma!r} steps of the grid",
            "It is a number from 0.01 to 2^28: choose another grid or noise multiplier.",
        )
    exact = Fraction(sigma)
    shift = 0
    while exact * (2 << shift) <= 1 << SIGNIFICANT:
        shift += 1
    return Fraction(math.ceil(exact * (1 << shift)), 1 << shift)


def distance(count: int, sigma: Fraction | float) -> Fraction:
    """Bound on the total variation distance of `count` draws to as many of N_ℤ(0, representable(σ)²); proof above."""
    return Fraction(count * (_staircase(representable(sigma)).stairs + 1), 1 << 126)


def discrete_gaussian(count: int, sigma: Fraction | float, source: Source, threads: int | None = None) -> Draws:
    """Independent draws from the discrete Gaussian.

    Args:
        count: how many.
        sigma: parameter σ in steps of the grid, from 0.01 to 2^28, rounded up by `representable`. From 1 on it is the
            standard deviation to eight digits; below, the standard deviation is smaller than σ.
        source: made for this release.
        threads: how many; None for two where it pays. The draws do not depend on it.

    Returns:
        int64 [count]; all |x| ≤ 14 σ + 1.

    Raises:
        ConsiliumError: σ out of range, or a source from before a fork.
    """
    staircase = _staircase(representable(sigma))
    draws = np.empty(count, np.int64)
    streams = source.streams(-(-count // BLOCK))  # one to a block, so that threads change nothing

    def fill(block: int) -> None:
        _fill(draws[block * BLOCK : (block + 1) * BLOCK], staircase, streams[block])

    if threads is None:
        threads = THREADS if count >= WORTH and len(os.sched_getaffinity(0)) >= THREADS else 1
    if threads == 1:
        for block in range(len(streams)):
            fill(block)
    else:  # numpy and OpenSSL let go of the interpreter while they work
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(fill, range(len(streams))):
                pass
    return draws


def _fill(out: Draws, staircase: Staircase, stream: Stream) -> None:
    """Draw until `out` is full. A batch is as many trials as are likely to fill it, at most BATCH."""
    full = 0
    while full < len(out):
        missing = len(out) - full
        kept = _trials(min(BATCH, missing + missing // 8 + 8), staircase, stream)[:missing]
        out[full : full + len(kept)] = kept
        full += len(kept)


def _trials(count: int, staircase: Staircase, stream: Stream) -> Draws:
    """What is kept of `count` trials, in order.

    The batch reads `count` words for the stairs, `count` for the first coins, and `count` half words for places (low
    bits) and signs (the top bit), then what ties and later coins ask for.
    """
    words = stream.words(2 * count + (count + 1) // 2)
    first_coins = words[count : 2 * count]
    half = words[2 * count :].view("<u4")[:count]
    places = np.bitwise_and(half, np.uint32(staircase.width - 1), dtype=np.uint64)
    sizes = staircase.pick(words[:count], stream)
    sizes += places
    rise = sizes + sizes
    rise -= places
    rise *= places
    rise *= staircase.step  # n = U (2x − U) 4ᵃ
    bars = rise * staircase.scale[1]
    keep = first_coins <= staircase.last[1]
    contested = np.flatnonzero(first_coins < bars)
    keep[contested] = _later_coins(rise[contested], staircase, stream)
    signs = (half >> np.uint32(31)).astype(np.int64)
    draws = sizes.view(np.int64)
    keep &= (draws | (signs ^ 1)) != 0  # minus zero
    draws ^= -signs
    draws += signs
    kept: Draws = draws[keep]
    return kept


def _later_coins(rise: Long, staircase: Staircase, stream: Stream) -> npt.NDArray[np.bool_]:
    """Algorithm 1 from its second coin on; each turn reads one word for each trial that still waits, in order."""
    kept = np.zeros(len(rise), np.bool_)
    turn = np.full(len(rise), 2)
    waiting = np.arange(len(rise))
    while waiting.size:
        words = stream.words(waiting.size)
        at = turn[waiting]
        heads = words < rise[waiting] * staircase.scale[at]
        void = words > staircase.last[at]
        tails = ~(heads | void)
        kept[waiting[tails]] = at[tails] % 2 == 1
        turn[waiting[heads]] += 1
        waiting = waiting[~tails]
    return kept


@dataclass(frozen=True)
class Staircase:
    """What trials for one σ are made against. Everything in it is public.

    Attributes:
        width: W.
        stairs: K.
        thresholds: 2^128 · P(stair < k) for k = 1 … K − 1, rounded down.
        high: their upper 64 bits, uint64 [K − 1].
        guide: for each value of a word's leading bits the start kW of its stair, or a mark where a threshold lies in
            the cell; uint64 [2^CELL].
        step: 4ᵃ, or 1 where W = 1 and every place is 0.
        scale, last: ⌊2⁶⁴ / jQ⌋ and the last word that is not void, by j; uint64 [COINS + 1]; j = 0 is not used.
    """

    width: int
    stairs: int
    thresholds: tuple[int, ...]
    high: Long
    guide: Long
    step: np.uint64
    scale: Long
    last: Long

    def pick(self, words: Long, stream: Stream) -> Long:
        """The starts kW of the stairs that `words` fall on, as a new array; ties read one word more each, in order."""
        starts = self.guide[(words >> np.uint64(64 - CELL)).view(np.int64)]
        mixed = np.flatnonzero(starts == np.uint64(_MIXED))
        close = words[mixed]
        stairs = np.searchsorted(self.high, close, side="right")
        for at in np.flatnonzero(self.high[stairs - 1] == close):
            longer = int(close[at]) << 64 | int(stream.words(1)[0])
            stairs[at] = bisect_right(self.thresholds, longer)
        starts[mixed] = stairs * self.width
        return starts


@lru_cache(maxsize=16)
def _staircase(sigma: Fraction) -> Staircase:
    width = 1
    while 32 * width <= sigma:
        width *= 2
    stairs = max(2, math.floor(REACH * sigma / width) + 1)
    over = 2 * sigma.numerator**2
    weights = []
    for stair in range(stairs):
        power = _DECIMAL.divide(Decimal(-((stair * width * sigma.denominator) ** 2)), Decimal(over))
        value = _DECIMAL.exp(power)  # correctly rounded, as the decimal specification asks
        weights.append(int(_DECIMAL.scaleb(value, _DIGITS - 2)))
    total = sum(weights)
    below = 0
    thresholds = []
    for weight in weights[:-1]:
        below += weight
        thresholds.append(min((below << 128) // total, (1 << 128) - 1))
    high = np.array([threshold >> 64 for threshold in thresholds], np.uint64)
    cells = (high >> np.uint64(64 - CELL)).astype(np.int64)
    guide = (np.searchsorted(cells, np.arange(1 << CELL)) * width).astype(np.uint64)
    guide[cells] = _MIXED
    scale = [0, *((1 << 64) // (coin * over) for coin in range(1, COINS + 1))]  # 2p² = Q: σ = p / 2ᵃ in lowest terms
    last = [coin * over * scale[coin] - 1 for coin in range(1, COINS + 1)]
    return Staircase(
        width,
        stairs,
        tuple(thresholds),
        high,
        guide,
        np.uint64(sigma.denominator**2 if width > 1 else 1),
        np.array(scale, np.uint64),
        np.array([0, *last], np.uint64),
    )
