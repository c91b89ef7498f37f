"""Which images are the same, or nearly so? Fingerprints of pixels, and the pairs that stand on two sides of a split.

Exact: a hash of the decoded pixels, so that the same image under another name or header is found. Near: a difference
hash of 256 bits (is a cell brighter than its right neighbour, on 17 x 16 cells; of a volume, its middle slice), which
survives another size, compression or brightness. Two images are near when at most `NEAR` of the bits differ.

Patients are split by their own pseudonym alone (RULES N5), so nothing here moves an image: it is for the report.

Source: N. Krawetz, "Kind of like that", 2013 (difference hash).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.imaging.records import Image

CELLS = 16
NEAR = 6
"""Most bits of 256 that differ between near duplicates."""
LEAST_CONTRAST = 16
"""An image with fewer bits set, or fewer unset, is too empty for its hash to say anything."""
MOST_COMPARED = 40_000
_BLOCK = 512


@dataclass(frozen=True)
class Prints:
    """An image's fingerprints, hex: `exact` of 128 bits, `near` of 256."""

    exact: str
    near: str


@dataclass(frozen=True)
class Pair:
    """Two images (positions in the cohort) and how many bits their hashes differ by; 0 and `exact` for equal pixels."""

    first: int
    second: int
    distance: int
    exact: bool


def prints(image: Image) -> Prints:
    """Fingerprints of float32 [channels, *size]."""
    pixels = np.ascontiguousarray(image)
    exact = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:32]
    flat = image[:, image.shape[1] // 2] if image.ndim == 4 else image
    cells = _shrunk(flat, CELLS, CELLS + 1)
    bits = cells[:, 1:] > cells[:, :-1] + 1e-6 * max(1e-6, float(np.abs(cells).max()))
    return Prints(exact, np.packbits(bits).tobytes().hex())


def across(found: Sequence[Prints], sides: Sequence[str], least: int = 0) -> list[Pair]:
    """The pairs on different sides whose pixels are equal, or whose hashes differ in at most `NEAR` bits.

    At most `MOST_COMPARED` images are compared for nearness (the first ones); equal pixels are found among all.
    """
    pairs = {(pair.first, pair.second): pair for pair in _near(found[:MOST_COMPARED], sides)}
    for same in _by_exact(found).values():
        for at, first in enumerate(same):
            for second in same[at + 1 :]:
                if sides[first] != sides[second]:
                    pairs[first, second] = Pair(first, second, 0, exact=True)
    return sorted(pairs.values(), key=lambda pair: (not pair.exact, pair.distance, pair.first, pair.second))


def copies(found: Sequence[Prints], patients: Sequence[str]) -> int:
    """How many images have the pixels of another patient's image, on whichever side."""
    groups = _by_exact(found).values()
    return sum(len(same) for same in groups if len({patients[at] for at in same}) > 1)


def _by_exact(found: Sequence[Prints]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for at, item in enumerate(found):
        groups[item.exact].append(at)
    return groups


def _near(found: Sequence[Prints], sides: Sequence[str]) -> list[Pair]:
    if not found:
        return []
    hashes = np.frombuffer(bytes.fromhex("".join(item.near for item in found)), ">u8").reshape(len(found), 4)
    hashes = hashes.astype(np.uint64)
    weight = np.bitwise_count(hashes).sum(axis=1)
    telling = (weight >= LEAST_CONTRAST) & (weight <= 256 - LEAST_CONTRAST)
    side = np.unique(np.array(sides[: len(found)]), return_inverse=True)[1]
    pairs = []
    for start in range(0, len(found), _BLOCK):
        rows = hashes[start : start + _BLOCK]
        distance = np.zeros((len(rows), len(found) - start), np.uint16)
        for word in range(4):
            distance += np.bitwise_count(rows[:, None, word] ^ hashes[None, start:, word])
        block = slice(start, start + len(rows))
        near = (distance <= NEAR) & telling[block, None] & telling[None, start:]
        near &= side[block, None] != side[None, start:]
        for row, column in zip(*np.nonzero(near), strict=True):
            if column > row:
                pairs.append(Pair(start + int(row), start + int(column), int(distance[row, column]), exact=False))
    return pairs


def _shrunk(planes: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float64]:
    """Means of [channels, height, width] over channels and a grid of cells; small images are repeated first."""
    for axis, cells in ((1, rows), (2, columns)):
        if planes.shape[axis] < cells:
            planes = np.repeat(planes, -(-cells // planes.shape[axis]), axis=axis)
    height, width = planes.shape[1:]
    down, right = (np.arange(rows) * height) // rows, (np.arange(columns) * width) // columns
    sums = np.add.reduceat(np.add.reduceat(planes, down, axis=1), right, axis=2).sum(axis=0, dtype=np.float64)
    sides = np.outer(np.diff([*down, height]), np.diff([*right, width]))
    means: NDArray[np.float64] = sums / (sides * len(planes))
    return means
