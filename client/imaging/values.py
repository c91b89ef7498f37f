"""What holds for the values of every image, whatever its file? They are finite float32, and channels come first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.imaging.records import Image, Reason, Unusable


def finite(values: NDArray[Any]) -> Image:
    """Values of any shape as float32; `Unusable` with NON_FINITE where one is not finite, or too large for float32."""
    with np.errstate(over="ignore"):
        found: Image = values.astype(np.float32, copy=False)
    if not np.isfinite(found).all():
        raise Unusable(Reason.NON_FINITE)
    return found


def in_channels(planes: Image, channels: int) -> Image:
    """[1 or channels, ...] as an array of its own [channels, ...]: a grey image is repeated."""
    return np.array(np.broadcast_to(planes, (channels, *planes.shape[1:])), order="C")
