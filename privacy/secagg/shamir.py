"""How can any w of n sites give a secret back, and fewer learn nothing? Shamir sharing over a prime field.

Shamir, "How to share a secret" (CACM 1979), over p = 2²⁵⁶ + 297, the first prime above 2²⁵⁶, so that every 32-byte seed
is a field element. A share is 33 bytes. Python's integers do not run in constant time; every secret here is shared once
and opened at most once, inside one process, and nothing is ever computed from the same secret on demand of a peer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache

from privacy.errors import Refusal, RefusalCode
from privacy.secagg.fixed import Random

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, threshold: int, positions: Sequence[int], random: Random = os.urandom) -> list[bytes]:
    """Share 32 bytes so that any `threshold` of the shares give them back.

    Args:
        positions: distinct numbers above 0, one for each share, in the order of the result.
        random: bytes for the polynomial; 48 for each coefficient, so that the bias is below 2^-127.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= len(positions):
        raise ValueError("a secret of 32 bytes and a threshold within the positions are needed")
    coefficients = [int.from_bytes(random(48), "big") % PRIME for _ in range(threshold - 1)]
    free = int.from_bytes(secret, "big")
    shares = []
    for x in positions:
        y = 0
        for coefficient in coefficients:
            y = (y + coefficient) * x % PRIME
        shares.append(((y + free) % PRIME).to_bytes(SHARE_BYTES, "big"))
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret from exactly as many shares, by position, as it takes.

    Raises:
        Refusal: OPENING for a share outside the field, or shares that do not meet in 32 bytes.
    """
    positions = tuple(sorted(shares))
    total = sum(weight * number(shares[x]) for weight, x in zip(_lagrange(positions), positions, strict=True)) % PRIME
    if total >= 1 << 256:
        raise Refusal(RefusalCode.OPENING)
    return total.to_bytes(SECRET_BYTES, "big")


def number(share: bytes) -> int:
    """A share as a field element.

    Raises:
        Refusal: OPENING.
    """
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise Refusal(RefusalCode.OPENING)
    return value


@lru_cache(maxsize=256)
def _lagrange(positions: tuple[int, ...]) -> tuple[int, ...]:
    """Weights of the values at `positions` for the value at 0."""
    weights = []
    for x in positions:
        above, below = 1, 1
        for other in positions:
            if other != x:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
