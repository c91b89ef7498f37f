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
MOST_LISTED = 100
_BLOCK = 512


@dataclass(frozen=True)
class Prints:
    """An image's fingerprints, hex: `exact` of 128 bits, `near` of 256. `exact` is "" for an image of one value."""

    exact: str
    near: str


@dataclass(frozen=True)
class Pair:
    """Two images (positions in the cohort) and how many bits their hashes differ by; 0 and `exact` for equal pixels.

    It is an example: `count` pairs of images on two sides have the pixels of these two.
    """

    first: int
    second: int
    distance: int
    exact: bool
    count: int = 1


@dataclass(frozen=True)
class Doubles:
    """How many pairs stand on two sides, and examples, the most alike first: at most `MOST_LISTED` of each kind."""

    count: int
    examples: tuple[Pair, ...]


def prints(image: Image) -> Prints:
    """Fingerprints of float32 [channels, *size]."""
    pixels = np.ascontiguousarray(image)
    planes = pixels.reshape(len(pixels), -1)
    empty = bool((planes == planes[:, :1]).all())
    exact = "" if empty else hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:32]
    flat = image[:, image.shape[1] // 2] if image.ndim == 4 else image
    cells = _shrunk(flat, CELLS, CELLS + 1)
    bits = cells[:, 1:] > cells[:, :-1] + 1e-6 * max(1e-6, float(np.abs(cells).max()))
    return Prints(exact, np.packbits(bits).tobytes().hex())


def across(found: Sequence[Prints], sides: Sequence[str]) -> Doubles:
    """The pairs on different sides whose pixels are equal, or whose hashes differ in at most `NEAR` bits.

    Equal images are taken together first, so that a thousand copies are one picture to compare and not a million
    pairs. At most `MOST_COMPARED` pictures are compared for nearness (the first ones); equal pixels are found among
    all. Images of one value, such as the slices above the head, are alike everywhere and say nothing: left out.
    """
    names, side = np.unique(np.array(sides), return_inverse=True)
    groups = list(_by_exact(found).values())
    if len(names) < 2 or not groups:
        return Doubles(0, ())
    held = np.array([np.bincount(side[same], minlength=len(names)) for same in groups])
    equal = (held.sum(axis=1) ** 2 - (held**2).sum(axis=1)) // 2
    near, nearest = _near([found[same[0]].near for same in groups[:MOST_COMPARED]], held)
    alike = [(0, at, at, int(equal[at])) for at in np.flatnonzero(equal)[:MOST_LISTED].tolist()] + nearest
    examples = [
        Pair(*_example(groups[one], groups[other], side), distance, one == other, count)
        for distance, one, other, count in alike
    ]
    examples.sort(key=lambda pair: (not pair.exact, pair.distance, pair.first, pair.second))
    return Doubles(int(equal.sum()) + near, tuple(examples))


def copies(found: Sequence[Prints], patients: Sequence[str]) -> int:
    """How many images have the pixels of another patient's image, on whichever side."""
    groups = _by_exact(found).values()
    return sum(len(same) for same in groups if len({patients[at] for at in same}) > 1)


def _by_exact(found: Sequence[Prints]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for at, item in enumerate(found):
        if item.exact:
            groups[item.exact].append(at)
    return groups


def _near(prints: Sequence[str], held: NDArray[np.int64]) -> tuple[int, list[tuple[int, int, int, int]]]:
    """How many pairs on two sides are near, and the nearest pictures: (distance, one, other, how many such pairs).

    Args:
        prints: difference hashes of different pictures, hex.
        held: images of each picture on each side, [pictures, sides].
    """
    hashes = np.frombuffer(bytes.fromhex("".join(prints)), ">u8").reshape(len(prints), 4).astype(np.uint64)
    weight = np.bitwise_count(hashes).sum(axis=1)
    telling = (weight >= LEAST_CONTRAST) & (weight <= 256 - LEAST_CONTRAST)
    total, nearest = 0, np.empty((0, 4), np.int64)
    for start in range(0, len(prints), _BLOCK):
        rows = hashes[start : start + _BLOCK]
        distance = np.zeros((len(rows), len(prints) - start), np.uint16)
        for word in range(4):
            distance += np.bitwise_count(rows[:, None, word] ^ hashes[None, start:, word])
        near = np.triu((distance <= NEAR) & telling[start : start + _BLOCK, None] & telling[None, start:], 1)
        best = [nearest]
        for row in np.flatnonzero(near.any(axis=1)):
            columns = np.flatnonzero(near[row])
            one, others = held[start + row], held[start + columns]
            counts = one.sum() * others.sum(axis=1) - others @ one
            total += int(counts.sum())
            found = np.stack([distance[row, columns], np.full(len(columns), start + row), start + columns, counts], 1)
            best.append(_nearest(found[counts > 0]))
        nearest = _nearest(np.concatenate(best))
    return total, [(int(a), int(b), int(c), int(d)) for a, b, c, d in nearest]


def _nearest(found: NDArray[np.int64]) -> NDArray[np.int64]:
    return found[np.argsort(found[:, 0], kind="stable")][:MOST_LISTED]


def _example(one: Sequence[int], other: Sequence[int], side: NDArray[np.int64]) -> tuple[int, int]:
    """The first images of two groups (or of one) that stand on different sides, in order."""
    here, there = ({int(side[at]): at for at in reversed(group)} for group in (one, other))
    first, second = min((a, b) for mine, a in here.items() for theirs, b in there.items() if mine != theirs)
    return min(first, second), max(first, second)


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
