"""What is a batch norm whose statistics travel?

A batch norm (Ioffe 2015, arXiv 1502.03167) takes the mean and the spread of its channels from the images of a batch,
and at work from a moving average of them. That average is part of the model: here it is held as parameters, so that it
travels and is averaged over hospitals like every weight, or is kept at a hospital like other norms (FedBN, Li 2021,
arXiv 2102.07623). No gradient reaches it; training writes it. Where it travels, a study refuses whatever would cut or
stretch it (`privacy.study`).

The images of a batch act on each other, so what one patient adds to an update has no bound. A study with noise refuses
it, and it is never the default.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class TravellingBatchNorm(nn.Module):
    """`nn.BatchNorm2d` and `nn.BatchNorm3d` with `running_mean` and `running_var` as parameters.

    The mean of hospitals' variances is at most the variance of all their images.

    Attributes:
        weight: γ, float [C].
        bias: β, float [C].
        running_mean: float [C].
        running_var: float [C], unbiased as torch's.
    """

    def __init__(self, channels: int, eps: float, momentum: float) -> None:
        """As torch begins: γ 1, β 0, mean 0, variance 1.

        Args:
            channels: C.
            eps: ε, added to a variance.
            momentum: weight of the newest batch in the moving average.
        """
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.running_mean, self.running_var = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.ones(channels))
        self.eps, self.momentum = eps, momentum

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, ...] -> [n, C, ...]; in training the moving average is written.

        Raises:
            ValueError: in training, one value a channel, which has no spread.
        """
        mean, var = self.running_mean.detach(), self.running_var.detach()
        return functional.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps)
