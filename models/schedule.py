"""How large is a step, by how much of the study is over?"""

from __future__ import annotations

import math


def rate(learning_rate: float, schedule: str, position: float) -> float:
    """The learning rate at a position from 0 (the first step) to 1.

    Args:
        schedule: "constant", or "cosine" for half a cosine from the whole rate to 0 (Loshchilov & Hutter 2017,
            arXiv 1608.03983, without restarts).
    """
    if schedule == "constant":
        return learning_rate
    return learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, position)))
