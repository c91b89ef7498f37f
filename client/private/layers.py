"""How do a layer's inputs and the gradients of its outputs become gradients of its parameters, patient by patient?

Every layer here is linear in each of its parameters, so that a patient's gradient of a parameter is a product of two
things that one forward and one backward pass leave behind: the inputs x and the gradients g of the outputs. What is
small (biases, norms, slopes) is formed for each patient at once (`small`). A weight that is a sum of outer products
over positions, as in linear layers and convolutions, gives three more things (`product`):

- `patients`: each patient's gradient itself;
- `squares`: its squared norm without the gradient, ‖Σ_t g_t x_tᵀ‖² = Σ_st (x_s · x_t)(g_s · g_t) (Goodfellow 2015,
  arXiv 1510.01799; for convolutions Bu 2022, arXiv 2205.10683). A convolution's patches are never unrolled: products
  of two patches are sums of products of two pixels, so the matrix over pixels is made once and added up along shifts.
  All of it is float64, as the terms of the sum may cancel. Beside it comes the *reach* Σ_t ‖x_t‖ ‖g_t‖: the norm that
  the gradient would have without any cancellation, of which the rounding of `total` is a share;
- `total`: the sum over patients, each times his factor, for the price of one ordinary weight gradient (the
  book-keeping of Bu 2023, arXiv 2210.00038).

A convolution with standardised weights (`models.standardised`) is linear in what it computes with, not in its
parameter; gradients by the one become gradients by the other by a matrix that is the same for every patient (`_Raw`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from client.private.groups import Run, per_group
from models import frozen, standardised

Runs = tuple[Run, ...]
NORMS = (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OTHERS = (nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.Bilinear)
"""Layers whose per-patient gradients torch.func derives."""
_OWN = (*standardised.KINDS.values(), frozen.FrozenNorm)  # first, as some are subclasses of the others
SUPPORTED = (*_OWN, nn.Linear, nn.PReLU, *CONVOLUTIONS, *NORMS, *OTHERS)

_CHUNK = 1 << 24
"""Numbers in one array of pixel products, or of patches."""
_LITTLE = 1 << 16
"""Numbers of a weight up to which one grouped convolution is faster than one convolution a patient; measured."""


class Product(Protocol):
    """A weight that is a sum of outer products over positions."""

    def cost(self, runs: Runs) -> float:
        """Multiplications of `squares`, all patients together."""
        ...

    def patients(self, runs: Runs) -> Iterator[tuple[int, Tensor]]:
        """Position of the first group and [c, *shape]: the gradients of c groups after another, until all have come."""
        ...

    def squares(self, runs: Runs) -> tuple[Tensor, Tensor]:
        """Squared norms and reaches, float64 [G] each."""
        ...

    def total(self, scale: Tensor, dead: Tensor) -> Tensor:
        """Sum over images times `scale` [n]: [*shape]. What is `dead` (bool [n]) counts as zero, also if not finite."""
        ...


def known(layer: nn.Module) -> bool:
    """Whether the layer is one of those above and computes as torch has it."""
    base = next((kind for kind in SUPPORTED if isinstance(layer, kind)), None)
    methods = ("forward", "_conv_forward", "_output_padding", "effective")
    return base is not None and all(getattr(type(layer), name, None) is getattr(base, name, None) for name in methods)


def small(
    layer: nn.Module, wanted: Collection[str], inputs: tuple[Tensor, ...], g: Tensor, runs: Runs
) -> dict[str, Tensor]:
    """Gradients of the wanted parameters but the one of which `product` is made: [G, *shape] by name.

    Args:
        wanted: names of the layer's own parameters.
        inputs: what the layer was called with, [n, ...] each.
        g: gradients of its outputs, [n, ...].
    """
    found: dict[str, Callable[[], Tensor]]
    if isinstance(layer, nn.Linear):
        found = {"bias": lambda: g.flatten(1, -2).sum(1) if g.dim() > 2 else g}
    elif isinstance(layer, _ConvNd):
        found = {"bias": lambda: g.flatten(2).sum(2)}
    elif isinstance(layer, NORMS):
        gamma, beta = _norm(layer, inputs[0], g)
        found = {"weight": lambda: gamma, "bias": lambda: beta}
    elif isinstance(layer, frozen.FrozenNorm):
        found = {"scale": lambda: (inputs[0] * g).flatten(2).sum(2), "shift": lambda: g.flatten(2).sum(2)}
    elif isinstance(layer, nn.PReLU):
        found = {"weight": lambda: _slope(layer, inputs[0], g)}
    else:
        return {name: each for name, each in _derived(layer, inputs, g, runs).items() if name in wanted}
    return {name: per_group(make(), runs) for name, make in found.items() if name in wanted}


def product(layer: nn.Module, wanted: Collection[str], inputs: tuple[Tensor, ...], g: Tensor) -> Product | None:
    """The weight of a linear layer or a convolution, where it is wanted."""
    if "weight" not in wanted:
        return None
    if isinstance(layer, nn.Linear):
        x = inputs[0]
        return _Linear(x.reshape(len(x), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1]))
    if isinstance(layer, standardised.Standardised):
        return _Raw(_convolution(layer, inputs[0], g), standardised.Pullback(layer))
    if isinstance(layer, _ConvNd):
        return _convolution(layer, inputs[0], g)
    return None


def trained(layer: nn.Module) -> tuple[str, ...]:
    """Names of the layer's own trainable parameters."""
    return tuple(name for name, value in layer.named_parameters(recurse=False) if value.requires_grad)


def wide(values: Tensor) -> Tensor:
    """bfloat16 as float32; float32 and float64 as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


@dataclass(frozen=True)
class _Linear:
    """x [n, T, I] and g [n, T, O]."""

    x: Tensor
    g: Tensor

    def cost(self, runs: Runs) -> float:
        positions, width = self.x.shape[1], self.x.shape[2] + self.g.shape[2]
        return sum(2.0 * run.groups * (run.size * positions) ** 2 * width for run in runs)

    def patients(self, runs: Runs) -> Iterator[tuple[int, Tensor]]:
        for run in runs:
            x, g = (_grouped(part, run).flatten(1, 2) for part in (self.x, self.g))
            step = max(1, _CHUNK // (x.shape[2] * g.shape[2]))
            for at in range(0, run.groups, step):
                yield run.first + at, torch.bmm(g[at : at + step].transpose(1, 2), x[at : at + step])

    def squares(self, runs: Runs) -> tuple[Tensor, Tensor]:
        parts = []
        for run in runs:
            x, g = (_grouped(part, run).flatten(1, 2) for part in (self.x, self.g))
            step = max(1, _CHUNK // x.shape[1] ** 2)
            for at in range(0, run.groups, step):
                one, other = (_products(part[at : at + step]) for part in (x, g))
                parts.append(_paired(one, other))
        return _joined(parts)

    def total(self, scale: Tensor, dead: Tensor) -> Tensor:
        x, g = _scaled(self.x, self.g, scale, dead)
        return g.flatten(0, 1).T @ x.flatten(0, 1)


@dataclass(frozen=True)
class _Convolution:
    """x [n, I, *size] and g [n, O, *size'], padded so that only zeros are left to add.

    Attributes:
        weight: only its shape, type and place are read.
        arguments: stride, padding, dilation, transposed, output padding, groups, as torch's convolution takes them.
    """

    x: Tensor
    g: Tensor
    weight: Tensor
    arguments: tuple[Any, ...]

    def cost(self, runs: Runs) -> float:
        if self.arguments[-1] != 1:
            return math.inf
        (wide_, narrow), taps = self._maps(), math.prod(self.weight.shape[2:])
        padded = math.prod(side + 2 * edge for side, edge in zip(wide_.shape[2:], self.arguments[1], strict=True))
        positions = math.prod(narrow.shape[2:])
        each = [
            run.groups
            * ((run.size * padded) ** 2 * wide_.shape[1] + (run.size * positions) ** 2 * (narrow.shape[1] + 4 * taps))
            for run in runs
        ]
        return 2.0 * float(sum(each))

    def patients(self, runs: Runs) -> Iterator[tuple[int, Tensor]]:
        for run in runs:
            if self.arguments[-1] == 1 and (self.weight[0, 0].numel() == 1 or self.x.device.type != "cpu"):
                yield from self._unrolled(run)
            elif self.weight.numel() <= _LITTLE:
                yield run.first, self._side_by_side(run)
            else:
                for group in range(run.groups):
                    at = run.start + group * run.size
                    images = slice(at, at + run.size)
                    yield run.first + group, self._backward(self.x[images], self.g[images]).unsqueeze(0)

    def squares(self, runs: Runs) -> tuple[Tensor, Tensor]:
        stride, padding, dilation = self.arguments[:3]
        source, narrow = self._maps()
        source = functional.pad(source, [edge for edge in reversed(padding) for _ in range(2)])
        size, sides = source.shape[2:], narrow.shape[2:]
        shifts = self._shifts(sides, stride, dilation)
        parts = []
        for run in runs:
            step = max(1, _CHUNK // (run.size * math.prod(size)) ** 2)
            x, g = (_grouped(part, run) for part in (source, narrow))
            for at in range(0, run.groups, step):
                pixels = _products(x[at : at + step].flatten(3).movedim(2, 3).flatten(1, 2))
                pixels = pixels.reshape(-1, run.size, *size, run.size, *size)
                outputs = _products(g[at : at + step].flatten(3).movedim(2, 3).flatten(1, 2))
                patches = torch.zeros_like(outputs).reshape(-1, run.size, *sides, run.size, *sides)
                for shift in shifts:
                    patches += pixels[(slice(None), slice(None), *shift, slice(None), *shift)]
                parts.append(_paired(patches.reshape(outputs.shape), outputs))
        return _joined(parts)

    def total(self, scale: Tensor, dead: Tensor) -> Tensor:
        return self._backward(*_scaled(self.x, self.g, scale, dead))

    def _backward(self, x: Tensor, g: Tensor) -> Tensor:
        call: Callable[..., Any] = torch.ops.aten.convolution_backward
        found: Tensor = call(g, x, self.weight, None, *self.arguments, (False, True, False))[1]
        return found

    def _side_by_side(self, run: Run) -> Tensor:
        """As `patients`, in one call: patients become groups of channels of one convolution (Rochette 2019,
        arXiv 1912.06015).
        """
        x, g = (_grouped(part, run).transpose(0, 1).flatten(1, 2) for part in (self.x, self.g))
        shape = (run.groups * self.weight.shape[0], *self.weight.shape[1:])
        arguments = (*self.arguments[:-1], run.groups * self.arguments[-1])
        call: Callable[..., Any] = torch.ops.aten.convolution_backward
        found: Tensor = call(g, x, self.weight.new_empty(shape), None, *arguments, (False, True, False))[1]
        return found.reshape(run.groups, *self.weight.shape)

    def _maps(self) -> tuple[Tensor, Tensor]:
        """The map whose patches are taken, and the one with a value for each patch."""
        return (self.g, self.x) if self.arguments[3] else (self.x, self.g)

    def _shifts(self, sides: Any, stride: Any, dilation: Any) -> list[tuple[Any, ...]]:
        """For each tap of the kernel, where its pixels lie in the padded map."""
        kernel = self.weight.shape[2:]
        return [
            tuple(
                slice(tap * gap, tap * gap + pace * (side - 1) + 1, pace)
                for tap, gap, pace, side in zip(taps, dilation, stride, sides, strict=True)
            )
            for taps in itertools.product(*(range(side) for side in kernel))
        ]

    def _unrolled(self, run: Run) -> Iterator[tuple[int, Tensor]]:
        """As `patients`, in few large steps: patches laid out, and one product of matrices for many patients."""
        stride, padding, dilation = self.arguments[:3]
        source, narrow = self._maps()
        source = functional.pad(source, [edge for edge in reversed(padding) for _ in range(2)])
        shifts = self._shifts(narrow.shape[2:], stride, dilation)
        step = max(1, _CHUNK // (run.size * len(shifts) * source.shape[1] * math.prod(narrow.shape[2:])))
        x, g = (_grouped(part, run) for part in (source, narrow))
        for at in range(0, run.groups, step):
            part = x[at : at + step]
            patches = torch.cat([part[(..., *shift)].flatten(3).unsqueeze(3) for shift in shifts], 3)
            patches = patches.flatten(2, 3).movedim(1, 2).flatten(2)  # [c, I · taps, k · T]
            outputs = g[at : at + step].flatten(3).movedim(1, 2).flatten(2)  # [c, O, k · T]
            found = torch.bmm(outputs, patches.transpose(1, 2))
            yield run.first + at, found.reshape(len(part), *self.weight.shape)


@dataclass(frozen=True)
class _Raw:
    """The weight behind a standardised one, whose own gradients `inner` makes; it has at most one group for `squares`.

    For each output channel a gradient g becomes s (g − mean g − u (u · g)), of squared norm s² (‖g‖² − K (mean g)² −
    (u · g)²). So `inner` gives the first term from gradients of the outputs times s, and for the others the inputs are
    convolved once more, with u and with ones. As terms cancel, that is float64 too; the rounding of `total` is a
    share of the reach that has s in it.
    """

    inner: _Convolution
    pull: standardised.Pullback

    def cost(self, runs: Runs) -> float:
        positions = len(self.inner.x) * math.prod(self.inner._maps()[1].shape[2:])
        return self.inner.cost(runs) + 2.0 * positions * self.inner.weight.numel()

    def patients(self, runs: Runs) -> Iterator[tuple[int, Tensor]]:
        for first, each in self.inner.patients(runs):
            yield first, self.pull(each)

    def squares(self, runs: Runs) -> tuple[Tensor, Tensor]:
        inner, layer = self.inner, self.pull.layer
        taps = (1,) * len(layer.kernel_size)
        g = inner.g.double() * self.pull.scale.double().reshape(1, -1, *taps)
        squares, reaches = replace(inner, g=g).squares(runs)
        unit, outputs = layer.joined(self.pull.unit).double(), 1 if layer.transposed else 0
        ones = torch.full_like(unit.narrow(outputs, 0, 1), layer.length**-0.5)
        shown = torch.convolution(inner.x.double(), torch.cat([unit, ones], outputs), None, *inner.arguments)
        for part in (shown[:, :-1], shown[:, -1:]):
            squares -= per_group((part * g).flatten(2).sum(2), runs).square().sum(1)
        return squares.clamp(min=0), reaches

    def total(self, scale: Tensor, dead: Tensor) -> Tensor:
        return self.pull(self.inner.total(scale, dead))


def _convolution(layer: _ConvNd, x: Tensor, g: Tensor) -> _Convolution:
    padding: Any = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * (x.dim() - 2)
    transposed = isinstance(layer, _ConvTransposeNd)
    output_padding = (0,) * (x.dim() - 2)
    if transposed:
        # torch needs only that some padding leads from the inputs' size to the outputs'
        expected = [
            (side - 1) * pace - 2 * edge + gap * (taps - 1) + 1
            for side, pace, edge, gap, taps in zip(
                x.shape[2:], layer.stride, padding, layer.dilation, layer.kernel_size, strict=True
            )
        ]
        output_padding = tuple(found - side for found, side in zip(g.shape[2:], expected, strict=True))
    arguments = (layer.stride, padding, layer.dilation, transposed, output_padding, layer.groups)
    return _Convolution(x, g, layer.weight.detach(), arguments)


def _norm(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of scale and shift for each image, [n, C] each: a batch of n images is one image of n · C channels."""
    images, channels = x.shape[:2]
    groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else channels
    positions = x[0, 0].numel()
    x, flat = x.contiguous(), (1, images * channels, positions)
    forward: Callable[..., Any] = torch.ops.aten.native_group_norm
    backward: Callable[..., Any] = torch.ops.aten.native_group_norm_backward
    _, mean, scale = forward(x, None, None, images, channels, positions, groups, layer.eps)
    found = backward(
        g.contiguous().reshape(flat),
        x.reshape(flat),
        mean.reshape(1, -1),
        scale.reshape(1, -1),
        x.new_ones(images * channels),
        *flat,
        images * groups,
        (False, True, True),
    )
    return found[1].reshape(images, channels), found[2].reshape(images, channels)


def _slope(layer: nn.PReLU, x: Tensor, g: Tensor) -> Tensor:
    """Gradients of PReLU's slopes for each image, [n, 1] or [n, C]."""
    below = x.clamp(max=0).mul_(g)
    return below.flatten(1).sum(1, keepdim=True) if layer.num_parameters == 1 else below.flatten(2).sum(2)


def _derived(layer: nn.Module, inputs: tuple[Tensor, ...], g: Tensor, runs: Runs) -> dict[str, Tensor]:
    """Gradients of any layer, as torch.func derives them: [G, *shape] by name."""
    parameters = {name: value.detach() for name, value in layer.named_parameters(recurse=False)}

    def paired(own: dict[str, Tensor], output_gradient: Tensor, *given: Tensor) -> Tensor:
        outputs = torch.func.functional_call(layer, own, tuple(part.unsqueeze(0) for part in given))
        product: Tensor = (outputs[0] * output_gradient).sum()
        return product

    each = torch.func.vmap(torch.func.grad(paired), in_dims=(None, 0, *(0 for _ in inputs)))(parameters, g, *inputs)
    return {name: per_group(values, runs) for name, values in each.items()}


def _grouped(values: Tensor, run: Run) -> Tensor:
    """[n, ...] -> [groups, images of each, ...] of one run."""
    return values[run.start : run.stop].reshape(run.groups, run.size, *values.shape[1:])


def _products(rows: Tensor) -> Tensor:
    """All products of two rows of each group, [c, rows, width] -> float64 [c, rows, rows]."""
    rows = rows.double()
    return torch.bmm(rows, rows.transpose(1, 2))


def _paired(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms and reaches from the products of inputs and those of gradients, float64 [c, rows, rows] each."""
    lengths = one.diagonal(0, 1, 2) * other.diagonal(0, 1, 2)
    return (one * other).flatten(1).sum(1).clamp(min=0), lengths.sqrt().sum(1)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    squares, reaches = zip(*parts, strict=True)
    return torch.cat(squares), torch.cat(reaches)


def _scaled(x: Tensor, g: Tensor, scale: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs, and gradients times [n]. Zero times NaN is NaN, so what is dead is written over instead."""
    shape = (-1, *(1,) * (x.dim() - 1))
    g = g * scale.to(g.dtype).reshape(-1, *(1,) * (g.dim() - 1))
    if bool(dead.any()):
        x, g = x.masked_fill(dead.reshape(shape), 0), g.masked_fill_(dead.reshape(shape), 0)
    return x, g
