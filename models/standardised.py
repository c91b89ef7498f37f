"""What is a convolution with standardised weights, and how does a gradient come back through the standardising?

Weight standardisation (Qiao 2019, arXiv 1903.10520) in the scaled form of Brock 2021 (arXiv 2101.08692), which De 2022
(arXiv 2204.13650) trains with under noise: for each output channel, w being all its numbers and N its fan-in,

    ŵ = (w − mean w) / √max(N · var w, 10⁻⁴)

is what the convolution computes with, so that a signal keeps its size whatever w has grown to. The gain that Brock and
De multiply ŵ with is left out: a norm behind the convolution has one. What is learned, travels, is clipped and is
stored is w, under the name `weight` that it has anyway.

N is how many numbers of the input meet in one number of the output. For a transposed convolution an output is reached
by one in Π stride of the taps only. A channel with one or two weights is left as it is: with mean and size taken out,
nothing of it is left to learn.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

FLOOR = 1e-4
"""Least N · var (Brock 2021): a channel of nearly equal weights is not blown up."""
FIXED = 2
"""Mean and size of a channel, which standardising takes out."""


class Standardised(_ConvNd):
    """What all of them share. `weight` is w; nothing else is kept."""

    def effective(self) -> Tensor:
        """ŵ: what the convolution computes with, shaped as `weight`."""
        weight, sides = self.split(self.weight), self.sides
        centred = weight - weight.mean(sides, keepdim=True)
        return self.joined(
            centred * (self.fan_in * centred.square().mean(sides, keepdim=True)).clamp(min=FLOOR).rsqrt()
        )

    def split(self, values: Tensor) -> Tensor:
        """[..., *weight.shape] with the groups of a transposed convolution, whose inputs come first, as a side more."""
        if not self.transposed:
            return values
        at, shape = values.dim() - len(self.kernel_size) - 2, values.shape
        return values.reshape(*shape[:at], self.groups, self.in_channels // self.groups, *shape[at + 1 :])

    def joined(self, values: Tensor) -> Tensor:
        """What `split` took apart."""
        at = values.dim() - len(self.kernel_size) - 3
        return values.flatten(at, at + 1) if self.transposed else values

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides over which one output channel of `split` reaches, counted from behind: inputs and taps."""
        taps = len(self.kernel_size)
        return (-taps - (2 if self.transposed else 1), *range(-taps, 0))

    @property
    def length(self) -> int:
        """K, how many numbers an output channel has."""
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    @property
    def fan_in(self) -> float:
        """N."""
        return self.length / (math.prod(self.stride) if self.transposed else 1)


class Pullback:
    """Jᵀ with J = ∂ŵ/∂w of one layer as its weight is now: the same whatever the images were.

    J is symmetric: with s the factor of w − mean w above and u the direction of w − mean w (of length 1; 0 where the
    floor holds), g by ŵ becomes s (g − mean g − u (u · g)) by w, for each output channel.

    Attributes:
        scale: s, shaped as `Standardised.split` has the weight but 1 along an output channel.
        unit: u, shaped so too.
    """

    def __init__(self, layer: Standardised) -> None:
        """Take the layer's weight as it is."""
        weight = layer.split(layer.weight.detach())
        centred = weight - weight.mean(layer.sides, keepdim=True)
        spread = layer.fan_in * centred.square().mean(layer.sides, keepdim=True)
        self.layer, self.scale = layer, spread.clamp(min=FLOOR).rsqrt()
        length = centred.square().sum(layer.sides, keepdim=True).rsqrt()
        self.unit = torch.where(spread >= FLOOR, centred * length, 0.0)

    def __call__(self, gradients: Tensor) -> Tensor:
        """Gradients by w from gradients by ŵ: [..., *weight.shape], any number at once."""
        layer, g = self.layer, self.layer.split(gradients)
        along = (self.unit * g).sum(layer.sides, keepdim=True)
        found = (g - g.mean(layer.sides, keepdim=True)).addcmul_(self.unit, along, value=-1).mul_(self.scale)
        return layer.joined(found)


class _Forward(Standardised):
    def forward(self, input: Tensor) -> Tensor:
        """As torch's convolution, with ŵ in place of w."""
        found: Tensor = self._conv_forward(input, self.effective(), self.bias)
        return found


class _Transposed(Standardised, _ConvTransposeNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As torch's transposed convolution, with ŵ in place of w."""
        dims = len(self.kernel_size)
        call: Any = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[dims - 1]
        place: Any = (self.stride, self.padding, self.kernel_size, dims, self.dilation)
        padding = self._output_padding(input, output_size, *place)
        found: Tensor = call(
            input, self.effective(), self.bias, self.stride, self.padding, padding, self.groups, self.dilation
        )
        return found


class StandardisedConv1d(_Forward, nn.Conv1d):
    """`nn.Conv1d` that computes with ŵ."""


class StandardisedConv2d(_Forward, nn.Conv2d):
    """`nn.Conv2d` that computes with ŵ."""


class StandardisedConv3d(_Forward, nn.Conv3d):
    """`nn.Conv3d` that computes with ŵ."""


class StandardisedConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` that computes with ŵ."""


class StandardisedConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` that computes with ŵ."""


class StandardisedConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` that computes with ŵ."""


KINDS: dict[type[_ConvNd], type[Standardised]] = {
    nn.Conv1d: StandardisedConv1d,
    nn.Conv2d: StandardisedConv2d,
    nn.Conv3d: StandardisedConv3d,
    nn.ConvTranspose1d: StandardisedConvTranspose1d,
    nn.ConvTranspose2d: StandardisedConvTranspose2d,
    nn.ConvTranspose3d: StandardisedConvTranspose3d,
}
"""What each of torch's convolutions becomes."""


def standardise(module: nn.Module, head: str) -> nn.Module:
    """The same network, whose convolutions compute with standardised weights; weights and their names stay.

    Args:
        head: the name of the module that holds its last layers, which stay as they are: scores must be free to grow.
    """
    kept = set(module.get_submodule(head).modules())
    for part in module.modules():
        if not isinstance(part, _ConvNd) or type(part) not in KINDS or part in kept:
            continue
        if part.in_channels // part.groups * math.prod(part.kernel_size) > FIXED:
            part.__class__ = KINDS[type(part)]
    return module
