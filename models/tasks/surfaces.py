"""How far apart are the surfaces of two masks? The 95th percentile Hausdorff distance, in mm.

The surface of a mask is its pixels with a face on the outside, the edge of the image included. The figure is that of
`monai.metrics.compute_hausdorff_distance(percentile=95)`, held equal by a test. It is made for every image of every
round, so it is made of scipy alone on the smallest box around both masks: 0.4 ms for a structure in 96 × 96 px and 4 ms
in 64³ voxels, where MONAI's takes 5 and 9 (`python -m tests.bench.surfaces`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def hd95(found: Mask, truth: Mask, spacing: NDArray[np.float64]) -> float:
    """The larger of the 95th percentiles of both surfaces' distances to the other (Huttenlocher 1993).

    Args:
        found, truth: bool [*size], neither empty.
        spacing: mm between neighbours along each side, [dims].
    """
    box = _box(found | truth)
    ours, theirs = _surface(found[box]), _surface(truth[box])
    return max(_from(ours, theirs, spacing), _from(theirs, ours, spacing))


def _from(start: Mask, end: Mask, spacing: NDArray[np.float64]) -> float:
    from scipy.ndimage import distance_transform_edt

    distances = distance_transform_edt(~end, sampling=spacing.tolist())
    return float(np.percentile(distances[start], 95))


def _surface(mask: Mask) -> Mask:
    from scipy.ndimage import binary_erosion

    edge: Mask = mask & ~binary_erosion(mask)
    return edge


def _box(mask: Mask) -> tuple[slice, ...]:
    sides = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        places = np.flatnonzero(mask.any(axis=others))
        sides.append(slice(int(places[0]), int(places[-1]) + 1))
    return tuple(sides)
