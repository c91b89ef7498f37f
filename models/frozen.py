"""What becomes of a batch norm whose weights were learned elsewhere?

Nearly all public weights, ImageNet's first of all, were trained with batch norms. One that is trained on mixes the
images of a batch, and a group norm in its place computes something else than what was learned. At work, though, a batch
norm multiplies and adds constants only, (x − mean) / √(var + ε) · γ + β, channel by channel (Ioffe 2015, arXiv
1502.03167, algorithm 2). `FrozenNorm` is that: the statistics of the public images are folded into one scale and one
shift, which are trained like any weight. It looks at no other image and at no statistic of a patient, so training
begins at the very function that was given, and a patient's gradient is his own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STATISTICS = ("running_mean", "running_var")
"""What a batch norm keeps of the images it was trained on."""
COUNTER = "num_batches_tracked"
"""How often it did; of no use at work."""


class FrozenNorm(nn.Module):
    """y = scale · x + shift, channel by channel.

    The parameters are not called `weight` and `bias`, so that those of a norm of another kind never pass for them.

    Attributes:
        scale: float [C], 1 until weights are given.
        shift: float [C], 0 until weights are given.
        eps: ε of the batch norm that it stands for.
    """

    def __init__(self, channels: int, eps: float) -> None:
        """Without effect until weights are given."""
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, ...] -> [n, C, ...]."""
        shape = (-1, *(1,) * (x.dim() - 2))
        return x * self.scale.reshape(shape) + self.shift.reshape(shape)


def folded(module: nn.Module, arrays: Mapping[str, Any], fresh: str = "") -> dict[str, Any]:
    """A state in which scale and shift stand for every batch norm that the network has frozen.

    Args:
        module: with norms of this kind.
        arrays: tensors by name, float32, of a network with batch norms, or of one that was published with these.
        fresh: what begins so has no weights and stays as it is; "" for nothing.

    Raises:
        ValueError: a norm has neither statistics nor scale, as after training with another norm, or some of another
            length; the message names it. What no images have, as a negative variance, is for the caller to refuse.
    """
    found = dict(arrays)
    for name, part in module.named_modules():
        if not isinstance(part, FrozenNorm) or f"{name}.scale" in found or (fresh and name.startswith(fresh)):
            continue
        mean, var = (found.pop(f"{name}.{which}", None) for which in STATISTICS)
        if mean is None or var is None:
            raise ValueError(
                f'{name!r} has no running_mean and running_var, which norm = "frozen" is made of: '
                "these weights were trained with another norm, so name that one"
            )
        gamma, beta = (found.pop(f"{name}.{which}", whole) for which, whole in (("weight", 1.0), ("bias", 0.0)))
        if {np.shape(given) for given in (mean, var, gamma, beta)} - {np.shape(mean), ()}:
            raise ValueError(f"{name!r} has statistics and weights of different lengths: the file is damaged")
        scale = np.float64(gamma) / np.sqrt(np.float64(var) + part.eps)
        found[f"{name}.scale"] = scale.astype(np.float32)
        found[f"{name}.shift"] = (np.float64(beta) - np.float64(mean) * scale).astype(np.float32)
    return found
