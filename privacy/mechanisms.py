"""What exactly is done to a sum before it may leave? Saturate, round to a grid, add integer noise (RULES N2).

Statement (docs/privacy.md, M1). Let S = Σ_p v_p be a sum over the patients of one site in which every patient's vector
v_p has ‖v_p‖₂ ≤ C, so that adding or removing one patient, with all images, changes S by at most C. A release is

    R = round(clip_L(S) / γ) + Z,    Z drawn from the discrete Gaussian N_Z(0, s²)^d,    kept modulo 2³²

Unit: the patient at one site. Adjacency: add or remove one. Sensitivity of round(clip_L(S)): at most Δ = C + γ√d before
the division by γ. Cutting each coordinate to [−L, L] changes no distance upwards, and rounding to the nearest multiple
moves each end by at most γ/2 in each of d coordinates. What happens modulo 2³² is a function of R alone.

The grid γ is a power of two, the finest for which n sums and twelve deviations of all noise stay below 2³¹. All numbers
are public constants of the study, and none is read off the data. A coordinate that is not a number counts as zero:
data never causes a refusal (RULES N4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from privacy import noise
from privacy.accounting import LEAST_SHARE
from privacy.entries import decimal_fraction
from privacy.errors import ConsiliumError
from privacy.patient import honest_shares
from privacy.study import Study

Words = npt.NDArray[np.uint32]
Doubles = npt.NDArray[np.float64]

BLOCK = 1 << 16
CLIP_ROOM = Fraction(1023, 1024)
"""A patient is clipped to C times this, so that rounding in float arithmetic never reaches C (RULES N2)."""
LOSS_PART = Fraction(1, 8)
"""The training loss rides in the clipped vector as one more coordinate: at most this part of C."""
DEVIATIONS = 12
FINEST, COARSEST = -40, 20


@dataclass(frozen=True)
class Mechanism:
    """The public constants of one release.

    Attributes:
        clip: C, the largest L2 norm of one patient's vector.
        numbers: d, coordinates of the sum.
        saturation: L, the largest absolute value of a coordinate of one site's sum.
        share: standard deviation of this site's own noise over Δ.
        sites: how many sites' sums may be added up.
    """

    clip: Fraction
    numbers: int
    saturation: Fraction
    share: Fraction
    sites: int

    @cached_property
    def grid(self) -> Fraction:
        """γ, a power of two.

        Raises:
            ValueError: no grid is coarse enough; the study asks for too much noise or too many patients.
        """
        for power in range(FINEST, COARSEST):
            step = Fraction(2) ** power
            reach = self.sites * self.saturation + DEVIATIONS * self._spread * self.share * self._sensitivity(step)
            if reach < step * 2**31:
                return step
        raise ValueError("no grid holds this sum")

    @property
    def sensitivity(self) -> Fraction:
        """Δ = C + γ√d, rounded up."""
        return self._sensitivity(self.grid)

    @cached_property
    def deviation(self) -> Fraction:
        """s, this site's noise in grid steps, rounded up to 1/1024."""
        return Fraction(math.ceil(self.share * self.sensitivity / self.grid * 1024), 1024)

    @property
    def least_of_a_patient(self) -> float:
        """What a patient's vector is clipped to, a little below C."""
        return float(self.clip * CLIP_ROOM)

    def release(self, sums: Doubles, source: noise.Source) -> Words:
        """The noised sum.

        Args:
            sums: float64 [d], the exact sum of clipped vectors.
            source: where the noise is drawn from, of this release alone.

        Returns:
            uint32 [d], two's complement modulo 2^32, not masked yet.
        """
        if sums.shape != (self.numbers,):
            raise ValueError(f"a sum of this mechanism has {self.numbers} numbers, not {sums.shape}")
        step, bound = float(self.grid), float(self.saturation)
        words = np.empty(self.numbers, np.uint32)
        for start in range(0, self.numbers, BLOCK):
            part = np.nan_to_num(sums[start : start + BLOCK], nan=0.0, posinf=bound, neginf=-bound)
            np.clip(part, -bound, bound, out=part)
            part /= step  # exact: a power of two
            whole = np.rint(part).astype(np.int64)
            whole += noise.discrete_gaussian(len(whole), self.deviation, source)
            words[start : start + len(whole)] = (whole & 0xFFFFFFFF).astype(np.uint32)
        return words

    def read(self, words: Words) -> Doubles:
        """A sum of released words, of up to `sites` of them, as float64."""
        return np.asarray(words.view(np.int32) * float(self.grid), np.float64)

    @property
    def _spread(self) -> Fraction:
        """√sites, rounded up: how much larger the noise of all is than that of one."""
        return Fraction(math.isqrt(self.sites * 2**20) + 1, 2**10)

    def _sensitivity(self, step: Fraction) -> Fraction:
        return self.clip + step * (math.isqrt(self.numbers) + 1)


def training(study: Study, size: int) -> Mechanism:
    """One optimiser step: `size` numbers of a gradient and one of the loss.

    Raises:
        ConsiliumError: no grid of 32 bits holds it.
    """
    privacy = study.privacy
    clip, sampled = decimal_fraction(privacy.clip), decimal_fraction(privacy.sampling_rate)
    expected = math.ceil(sampled * privacy.site_patients_bound)
    share = max(decimal_fraction(privacy.noise_floor), _share(study, privacy.noise_multiplier))
    return _checked(Mechanism(clip, size + 1, clip * max(1, expected), share, _summed(study)))


def evaluation(study: Study, size: int, reach: float) -> Mechanism:
    """One evaluation: `size` sums, each divided by its cap; `reach` is the largest norm of one patient's part.

    Raises:
        ConsiliumError: no grid of 32 bits holds it.
    """
    privacy = study.privacy
    clip = Fraction(math.ceil(reach * 1024), 1023)
    saturation = Fraction(privacy.site_patients_bound)
    return _checked(Mechanism(clip, size, saturation, _share(study, privacy.evaluation_noise), _summed(study)))


def _checked(mechanism: Mechanism) -> Mechanism:
    try:
        fits = LEAST_SHARE <= mechanism.deviation <= noise.LARGEST
    except ValueError:
        fits = False
    if not fits:
        raise ConsiliumError(
            "The noise of this study cannot be put on a grid of 32 bits",
            f"{mechanism.numbers:,} numbers at {mechanism.sites} hospitals",
            "Lower privacy.site_patients_bound or privacy.sampling_rate, or train fewer parameters (transfer.train).",
        )
    return mechanism


def _summed(study: Study) -> int:
    return len(study.sites) if study.privacy.mode == "shared" else 1


def _share(study: Study, multiplier: str) -> Fraction:
    """One hospital's noise over Δ: σ / √(n_min − c), or all of it with `per-site`; rounded up."""
    sigma = decimal_fraction(multiplier)
    if study.privacy.mode == "per-site":
        return sigma
    return sigma * Fraction(2**20, math.isqrt(honest_shares(study) * 2**40))
