"""Weight standardisation is the formula it says, keeps the size of a signal, and leaves names and last layers alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load
from torch import nn

from models import networks, pretrained, transfer, weights
from models.standardised import FLOOR, KINDS, Pullback, Standardised, standardise

SMALL = {"input.size": [16, 16], "network.weight_standardisation": True}
DIMS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


def made(kind: Any, *arguments: Any, **options: Any) -> Any:
    """A convolution of that kind, standardised."""
    holder = standardise(nn.ModuleDict({"layer": kind(*arguments, **options), "head": nn.Identity()}), "head")
    return holder["layer"]


@st.composite
def _layers(draw: st.DrawFn) -> Any:
    """A convolution of any kind in float64, some of its channels nearly constant."""
    dims, transposed, groups = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.sampled_from([1, 1, 2]))
    channels = groups * draw(st.integers(3, 4)), groups * draw(st.integers(1, 3))
    kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims)))
    layer = made(
        DIMS[dims][transposed], *channels, kernel, stride=draw(st.integers(1, 2)), groups=groups, dtype=torch.float64
    )
    torch.manual_seed(draw(st.integers(0, 99)))
    layer.weight.data.normal_().mul_(draw(st.sampled_from([1e-4, 0.1, 3.0]))).add_(draw(st.sampled_from([0.0, 2.0])))
    return layer


def by_hand(layer: Any) -> torch.Tensor:
    """(w − mean w) / √max(N var w, 10⁻⁴), one output channel after the other."""
    found, outputs = layer.weight.detach().clone(), layer.out_channels // layer.groups
    inputs = layer.in_channels // layer.groups
    for group in range(layer.groups):
        for output in range(outputs):
            if layer.transposed:
                channel = found[group * inputs : (group + 1) * inputs, output]
                fan_in = channel.numel() / math.prod(layer.stride)
            else:
                channel = found[group * outputs + output]
                fan_in = channel.numel()
            channel -= channel.mean()
            channel /= max(fan_in * channel.square().mean().item(), 1e-4) ** 0.5
    return found


@given(_layers())
def test_what_is_computed_with_is_the_formula(layer: Any) -> None:
    torch.testing.assert_close(layer.effective(), by_hand(layer), rtol=1e-10, atol=1e-12)


@given(_layers())
def test_a_layer_computes_as_torch_does_with_those_weights(layer: Any) -> None:
    kind = next(plain for plain, ours in KINDS.items() if ours is type(layer))
    plain = kind(
        layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride, groups=layer.groups
    ).double()
    plain.weight.data.copy_(by_hand(layer))
    plain.bias.data.copy_(layer.bias.data)
    images = torch.randn(2, layer.in_channels, *(5 for _ in layer.kernel_size), dtype=torch.float64)
    torch.testing.assert_close(layer(images), plain(images))


@given(_layers())
def test_gradients_come_back_as_autograd_brings_them(layer: Any) -> None:
    gradients = torch.randn(3, *layer.weight.shape, dtype=torch.float64)
    found = Pullback(layer)(gradients)
    for one, gradient in zip(found, gradients, strict=True):
        (expected,) = torch.autograd.grad((layer.effective() * gradient).sum(), layer.weight)
        torch.testing.assert_close(one, expected, rtol=1e-8, atol=1e-10)
    assert not found.requires_grad


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_signal_keeps_its_size_whatever_the_weights_have_grown_to(kind: Any, stride: int) -> None:
    torch.manual_seed(0)
    layer = made(kind, 32, 64, 4, stride=stride, bias=False)
    images = torch.randn(8, 32, 40, 40)
    for factor in (1.0, 100.0):
        layer.weight.data.mul_(factor).add_(factor)
        inside = layer(images)[..., 8:-8, 8:-8]
        assert inside.var().item() == pytest.approx(1.0, rel=0.1)


def test_a_channel_of_equal_weights_is_not_blown_up_and_one_with_too_few_weights_is_left_as_it_is() -> None:
    layer = made(nn.Conv2d, 2, 3, 3)
    layer.weight.data.fill_(0.5)
    assert not layer.effective().any()
    assert torch.isfinite(Pullback(layer)(torch.ones_like(layer.weight))).all()
    assert FLOOR == 1e-4
    for kind, arguments, options in (
        (nn.Conv2d, (1, 4, 1), {}),
        (nn.Conv2d, (2, 4, 1), {}),
        (nn.Conv2d, (4, 4, 1), {"groups": 4}),
        (nn.ConvTranspose2d, (4, 4, 1), {"groups": 4}),
    ):
        assert type(made(kind, *arguments, **options)) is kind


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_network_is_built_with_it_under_the_same_names(spec_for: Any, name: str, dims: int) -> None:
    sizes = {"input.size": [32] * dims}
    with torch.device("meta"):
        plain = networks.build(spec_for(name, **sizes))
        module = networks.build(spec_for(name, **sizes, **{"network.weight_standardisation": True}))
    assert weights.Layout.of(module) == weights.Layout.of(plain)
    head = networks.NETWORKS[name].head
    kinds = {key: type(part) for key, part in module.named_modules()}
    for key, part in plain.named_modules():
        if type(part) not in KINDS:
            assert type(part).__name__ == kinds[key].__name__
        elif key == head or key.startswith(f"{head}.") or part.in_channels * math.prod(part.kernel_size) <= 2:
            assert kinds[key] is type(part)
        else:
            assert kinds[key] is KINDS[type(part)]
    assert any(issubclass(kind, Standardised) for kind in kinds.values())


@pytest.mark.parametrize("name", ["resnet-small", "densenet-small", "unet", "dynunet"])
@pytest.mark.parametrize("norm", ["group", "instance", "none"])
def test_it_learns_with_every_norm(spec_for: Any, name: str, norm: str) -> None:
    torch.manual_seed(3)
    size = {"input.size": [32, 32]}
    module = networks.build(spec_for(name, **{**SMALL, **size, "network.norm": norm})).train()
    images, signs = torch.randn(6, 1, 32, 32), torch.tensor([1.0, -1.0]).repeat(3)
    images[..., :16] += signs[:, None, None, None]
    optimiser = torch.optim.Adam(module.parameters(), 0.003)
    losses = []
    for _ in range(12):
        loss = (module(images).flatten(1).mean(1) - signs).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    moved = [part.weight.grad.norm().item() for part in module.modules() if isinstance(part, Standardised)]
    assert min(moved) > 0, "a gradient reaches every weight"


@pytest.mark.parametrize("train", ["head", "adapters", "lora"])
@pytest.mark.parametrize("name", ["resnet10", "unet"])
def test_a_frozen_network_stays_standardised(spec_for: Any, name: str, train: str) -> None:
    torch.manual_seed(1)
    plain = networks.build(spec_for(name, **SMALL)).eval()
    part = networks.build(spec_for(name, transfer={"train": train}, **SMALL)).eval()
    part.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(part(images), plain(images))
    frozen = [m for m in part.modules() if isinstance(m, Standardised)]
    assert len(frozen) == sum(isinstance(m, Standardised) for m in plain.modules())
    assert not any(m.weight.requires_grad for m in frozen)
    small = [m for key, m in part.named_modules() if key.endswith((transfer.DOWN, transfer.UP))]
    assert bool(small) == (train == "lora")
    assert all(type(m) in KINDS for m in small), "the additions themselves are plain"


def test_low_rank_additions_go_on_and_are_not_merged_into_standardised_weights(spec_for: Any, tmp_path: Path) -> None:
    adapted, path = networks.build(spec_for("resnet10", transfer={"train": "lora"}, **SMALL)), tmp_path / "lora"
    for key, value in adapted.named_parameters():
        if transfer.UP in key:
            nn.init.normal_(value)
    path.write_bytes(weights.state_bytes(adapted))
    again = pretrained.initial_state(spec_for("resnet10", transfer={"train": "lora"}, **SMALL), path, 1)
    assert again == path.read_bytes()
    with pytest.raises(ValueError, match="no room for one"):
        pretrained.initial_state(spec_for("resnet10", **SMALL), path, 1)


def test_a_published_model_is_the_start_of_the_next_study(spec_for: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights.initial_state(spec_for("resnet10", **SMALL), 7))
    found = pretrained.initial_state(spec_for("resnet10", transfer={"train": "head"}, **SMALL), path, 1)
    given_, state = load(path.read_bytes()), load(found)
    assert all(np.array_equal(state[name], array) for name, array in given_.items())


def test_it_is_true_or_false(spec_with: Any) -> None:
    with pytest.raises(ValueError, match=r"network.weight_standardisation: it is neither true nor false"):
        networks.build(spec_with(**{"network.weight_standardisation": "yes"}))
