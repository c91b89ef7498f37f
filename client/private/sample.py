"""Who is in a step? Each patient by a coin of the site's own, and nobody else ever learns how it fell (RULES N1).

Poisson sampling with the study's public rate q: every patient is in a step with chance q, whatever the others do.
Coins, the choice among a patient's images and the seeds of augmentation come from the operating system's generator.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Random = Callable[[int], bytes]
Indices = npt.NDArray[np.int64]
_DICE = secrets.SystemRandom()
WORD = 1 << 64


def poisson(count: int, rate: Fraction, random: Random = secrets.token_bytes) -> npt.NDArray[np.bool_]:
    """Which of `count` patients are in, bool [count], each with chance ⌊rate · 2⁶⁴⌋ / 2⁶⁴, which is at most `rate`.

    Args:
        random: so many bytes from a cryptographic generator.
    """
    if rate >= 1:
        return np.ones(count, np.bool_)
    coins = np.frombuffer(random(8 * count), "<u8")
    return np.asarray(coins < np.uint64(int(rate * WORD)))


def some(images: Indices, most: int) -> Indices:
    """At most `most` of a patient's images, each subset of that size with the same chance."""
    if len(images) <= most:
        return images
    return np.array(sorted(_DICE.sample(images.tolist(), most)), np.int64)


@dataclass(frozen=True)
class Batch:
    """What goes through the network at once, padded to a fixed number of places (RULES N4).

    Attributes:
        images: int64 [n], positions in the cohort; they take the first places.
        owner: int64 [places], which patient of the batch an image belongs to, -1 for padding.
    """

    images: Indices
    owner: Indices


def batches(chosen: Sequence[Indices], copies: int, places: int, least: int) -> Iterator[Batch]:
    """Pack patients into batches of one shape, a patient never in two; at least `least` batches, empty ones included.

    Args:
        chosen: each patient's images, at most `places // copies` of them.
        copies: how often each image is there, for augmentation.
    """
    made, waiting = 0, list(chosen)
    while waiting or made < least:
        images: list[int] = []
        owner: list[int] = []
        patients = 0
        while waiting and len(images) + copies * len(waiting[-1]) <= places:
            repeated = np.repeat(waiting.pop(), copies).tolist()
            images += repeated
            owner += [patients] * len(repeated)
            patients += 1
        spare = places - len(images)
        yield Batch(np.array(images, np.int64), np.array(owner + [-1] * spare, np.int64))
        made += 1


class Seeds:
    """Seeds of augmentation from the operating system, in the form in which `client.feed` asks for them."""

    def integers(self, low: int, high: int, size: int) -> npt.NDArray[np.int64]:
        """`size` whole numbers from `low` to `high` - 1."""
        return np.array([low + secrets.randbelow(high - low) for _ in range(size)], np.int64)
