"""How does a float update become integers that add up exactly, and back? Clip, weigh, round to the plan's grid.

A site's update u (float32 [d]) becomes v = a · clip_L(u · min(1, C / ‖u‖₂)) with the weight a = min(examples, E) / E
(or 1), then the nearest multiple of γ = L / levels, as an int32 that is kept modulo 2³² in a uint32. All of it is done
in blocks that stay in the processor's cache, in float64, so that the grid is the only error worth naming:

    |decoded mean − weighted mean of the clipped updates| ≤ k · (γ / 2 + L · 2⁻⁵⁰) / Σa   for k sites, nearest rounding
                                                          ≤ k · (γ     + L · 2⁻⁵⁰) / Σa   for stochastic rounding

The norm is taken in blocks of float32, so C holds to about one part in a million.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from privacy.errors import Refusal, RefusalCode
from privacy.secagg.plan import Plan
from privacy.sections import STATISTICS_GRID

BLOCK = 1 << 15
Words = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Random = Callable[[int], bytes]


def encode(plan: Plan, update: Floats | None, statistics: Floats, random: Random = os.urandom) -> Words:
    """One site's numbers on the grid.

    Args:
        update: float32 [d], the change of the parameters; None where only statistics are asked for.
        statistics: float32 [m]; the first is the number of training images, which is the update's weight.
        random: bytes for stochastic rounding.

    Returns:
        uint32 [d + m], or [m]: two's complement modulo 2^32, not masked yet.

    Raises:
        Refusal: NON_FINITE, MODEL_SHAPE for another length, NO_DATA for an equally weighted update of no images.
    """
    size = 0 if update is None else plan.size
    if len(statistics) != plan.statistics or (update is not None and update.shape != (plan.size,)):
        raise Refusal(RefusalCode.MODEL_SHAPE)
    numbers = statistics.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise Refusal(RefusalCode.NON_FINITE)
    numbers[0] = min(max(numbers[0], 0.0), float(plan.examples_bound))
    words = np.empty(size + plan.statistics, np.uint32)
    scaled = np.rint(numbers * STATISTICS_GRID)
    words[size:] = np.clip(scaled, -plan.levels, plan.levels).astype(np.int32).view(np.uint32)
    if update is not None:
        if not plan.by_examples and numbers[0] == 0.0:
            raise Refusal(RefusalCode.NO_DATA)
        weight = numbers[0] / plan.examples_bound if plan.by_examples else 1.0
        _quantise(plan, update, float(weight), words[:size], random)
    return words


def _quantise(plan: Plan, update: Floats, weight: float, out: Words, random: Random) -> None:
    norm = _norm(update)
    shrink = min(1.0, float(plan.norm_bound) / norm) if norm > 0.0 else 1.0
    steps = plan.levels / float(plan.update_bound)
    buffer = np.empty(min(BLOCK, len(update)), np.float64)
    bound = plan.levels * weight
    signed = out.view(np.int32)
    for start in range(0, len(update), BLOCK):
        block = update[start : start + BLOCK]
        part = buffer[: len(block)]
        np.multiply(block, shrink * weight * steps, out=part, dtype=np.float64)
        np.minimum(part, bound, out=part)
        np.maximum(part, -bound, out=part)
        if plan.stochastic:
            part += np.frombuffer(random(4 * len(block)), "<u4") * 2.0**-32
            np.floor(part, out=part)
        else:
            np.rint(part, out=part)
        signed[start : start + len(block)] = part


def _norm(update: Floats) -> float:
    """‖u‖₂. A float32 block sum that overflows is taken again in float64.

    Raises:
        Refusal: NON_FINITE.
    """
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(update), BLOCK):
            block = update[start : start + BLOCK]
            square = float(np.dot(block, block))
            if not math.isfinite(square):
                wide = block.astype(np.float64)
                square = float(np.dot(wide, wide))
            total += square
    if not math.isfinite(total):
        raise Refusal(RefusalCode.NON_FINITE)
    return math.sqrt(total)


@dataclass(frozen=True)
class Opened:
    """An opened sum, still on the grid.

    Attributes:
        plan: the layout.
        words: uint32 [d + m] or [m], the exact sum modulo 2^32; the caller must not change it.
        sites: how many sites it is the sum of.
    """

    plan: Plan
    words: Words
    sites: int

    @property
    def size(self) -> int:
        """Numbers of the update: d, or 0 for statistics only."""
        return len(self.words) - self.plan.statistics

    @property
    def statistics(self) -> Doubles:
        """The summed statistics, float64 [m]."""
        return np.asarray(self.words[self.size :].view(np.int32) * self.plan.statistics_grid, np.float64)

    @property
    def weight(self) -> float:
        """Σa, what the summed update is divided by."""
        if not self.plan.by_examples:
            return float(self.sites)
        return float(self.statistics[0]) / self.plan.examples_bound

    def mean(self, start: int, stop: int) -> Doubles:
        """The weighted mean update, float64 [stop - start], as a copy.

        Raises:
            ValueError: no site had training images.
        """
        weight = self.weight
        if not weight > 0:
            raise ValueError("nothing with weight was summed")
        block = self.words[start : min(stop, self.size)].view(np.int32)
        return np.asarray(block * (self.plan.grid / weight), np.float64)

    def norm(self) -> float:
        """‖Σ a·u‖₂ of the summed update, which no honest set of sites can bring above Σa · C (and the grid's error)."""
        return self.whole_norm() * self.plan.grid

    def whole_norm(self) -> float:
        """The L2 norm of the summed update in grid steps."""
        total = 0.0
        for start in range(0, self.size, BLOCK):
            block = self.words[start : min(start + BLOCK, self.size)].view(np.int32).astype(np.float64)
            total += float(np.dot(block, block))
        return math.sqrt(total)


def decode(plan: Plan, summed: Words, sites: int) -> Opened:
    """Read an unmasked sum of `sites` vectors made by `encode`.

    Raises:
        Refusal: MODEL_SHAPE.
    """
    plan.length(len(summed))
    return Opened(plan, summed, sites)
