"""How long does one HD95 take, ours and MONAI's? `python -m tests.bench.surfaces` prints milliseconds per structure."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance

from models.tasks import surfaces

SHAPES = ((96, 96), (256, 256), (64, 64, 64))
REPEATS = 50


def took(work: Callable[[], Any]) -> float:
    """Milliseconds of processor time of one call, the mean of many."""
    work()
    start = time.process_time()
    for _ in range(REPEATS):
        work()
    return 1000 * (time.process_time() - start) / REPEATS


def main() -> None:
    """One line a shape: a ball of a fifth of the side, and the same two pixels away."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for shape in SHAPES:
        grid, centre = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")), shape[0] / 2
        truth, found = (((grid - centre - shift) ** 2).sum(0) < (shape[0] / 5) ** 2 for shift in (0, 2))
        spacing = np.ones(len(shape))
        hot = [torch.from_numpy(mask)[None, None].float() for mask in (found, truth)]
        ours = took(lambda found=found, truth=truth, spacing=spacing: surfaces.hd95(found, truth, spacing))  # type: ignore[misc]
        theirs = took(
            lambda hot=hot, shape=shape: compute_hausdorff_distance(  # type: ignore[misc]
                *hot, include_background=True, percentile=95, spacing=[1.0] * len(shape)
            )
        )
        print(f"{' × '.join(map(str, shape)):>14}: ours {ours:6.2f} ms, MONAI's {theirs:6.2f} ms")


if __name__ == "__main__":
    main()
