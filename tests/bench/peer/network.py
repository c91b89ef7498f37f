"""What do the peers train? The same network as our `plain-cnn`, in plain torch, and the same trivial work.

This file is copied into the peers' applications, so it imports nothing of ours. The benchmark refuses to start when
the number of parameters differs from that of our own network.
"""

from __future__ import annotations

import torch
from torch import nn

CHANNELS, STRIDES, GROUPS = (32, 64, 128, 256, 256), (2, 2, 2, 2, 1), 8


class PlainCNN(nn.Module):
    """Float32 [n, 1, size, size] to scores [n, 2]."""

    def __init__(self, width: int = 1, size: int = 16) -> None:
        super().__init__()
        self.width, self.size = width, size  # NVFLARE builds it again from attributes named like the arguments
        layers: list[nn.Module] = []
        before, side = 1, size
        for channels, stride in zip(CHANNELS, STRIDES, strict=True):
            after = channels * width
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(GROUPS, after), nn.ReLU()]
            before, side = after, (side - 1) // stride + 1
        del layers[-2:]  # the last convolution feeds the linear layer as it is
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * side * side, 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores."""
        scores: torch.Tensor = self.layers(images)
        return scores


def work(network: nn.Module, seed: int, batch: int = 2, size: int = 16) -> float:
    """What a site does in a round: look at the received model on a few images, then one step of SGD."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((2 * batch, 1, size, size), generator=generator)
    labels = torch.arange(2 * batch) % 2
    network.eval()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(network(images[batch:]), labels[batch:])
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001)
    torch.autograd.backward(nn.functional.cross_entropy(network(images[:batch]), labels[:batch]))
    optimizer.step()
    return float(loss)
