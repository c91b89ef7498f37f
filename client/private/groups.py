"""Which images of a batch belong to which patient? A batch put in such an order that each patient's stand together.

Patients with equally many images stand side by side and make a *run*, so that a layer can treat a run as one array
[groups, images, ...] without a loop. Padding makes groups of its own, which are computed like patients and never
counted, so that the work does not tell how many patients there are where each has as many images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PADDING = -1
Owner = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Run:
    """Images `start` to `start + groups * size` of the new order: `size` consecutive ones a group, from group `first`.

    Attributes:
        start: position of the first image.
        first: position of the first group.
        groups: how many.
        size: images of each.
    """

    start: int
    first: int
    groups: int
    size: int

    @property
    def stop(self) -> int:
        """Position after the last image."""
        return self.start + self.groups * self.size


@dataclass(frozen=True)
class Groups:
    """The order, and what stands in it. G is the number of groups, padding included.

    Attributes:
        order: int64 [n], the image that comes at each position.
        runs: from the first position to the last.
        patients: how many of the groups are patients; they come first, the groups of padding last.
        weights: float64 [n] in the new order: one over the number of the patient's images; 0 for padding.
    """

    order: Owner
    runs: tuple[Run, ...]
    patients: int
    weights: npt.NDArray[np.float64]

    @property
    def count(self) -> int:
        """G."""
        return sum(run.groups for run in self.runs)

    @classmethod
    def of(cls, owner: Owner) -> Groups:
        """The groups of a batch.

        Args:
            owner: int64 [n], the patient of each image; -1 for padding. Numbers may be left out.

        Raises:
            ValueError: not such an array.
        """
        if owner.ndim != 1 or owner.dtype != np.int64 or (owner < PADDING).any():
            raise ValueError("owner is int64 [n] with a patient's number, or -1 for padding")
        _, patient, images = np.unique(owner[owner != PADDING], return_inverse=True, return_counts=True)
        rank = np.full(len(owner), np.iinfo(np.int64).max)
        rank[owner != PADDING] = images[patient] * len(owner) + patient
        order = np.argsort(rank, kind="stable").astype(np.int64)
        runs, start, first = [], 0, 0
        for size, groups in zip(*np.unique(images, return_counts=True), strict=True):
            runs.append(Run(start, first, int(groups), int(size)))
            start, first = runs[-1].stop, first + int(groups)
        weights = np.zeros(len(owner))
        for run in runs:
            weights[run.start : run.stop] = 1.0 / run.size
        left, patients = len(owner) - start, first
        usual = runs[-1].size if runs else left
        for size in (usual, left % usual if usual else 0):
            groups = (len(owner) - start) // size if size else 0
            if groups:
                runs.append(Run(start, first, groups, size))
                start, first = runs[-1].stop, first + groups
        return cls(order, tuple(runs), patients, weights)


def per_group(values: Tensor, runs: tuple[Run, ...]) -> Tensor:
    """Sums over the images of each group: [n, ...] -> [G, ...]."""
    shape = values.shape[1:]
    return torch.cat([values[run.start : run.stop].reshape(run.groups, run.size, *shape).sum(1) for run in runs])


def per_image(values: Tensor, runs: tuple[Run, ...]) -> Tensor:
    """Each group's value at each of its images: [G] -> [n]."""
    return torch.cat([values[run.first : run.first + run.groups].repeat_interleave(run.size) for run in runs])
