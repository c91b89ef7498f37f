"""Every way to a patient's gradient of a layer is the gradient, whatever the layer's geometry; and what is unfit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from client.private import layers
from client.private.fitness import check, demand
from client.private.groups import PADDING, Groups, per_group, per_image
from models import networks, standardised, weights
from models.frozen import FrozenNorm
from privacy.errors import ConsiliumError
from tests.client.private.private_kit import Every, spec_of

LAWS = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
KINDS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}


@st.composite
def _convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution of any geometry, and five images for it."""
    dims, transposed = draw(st.integers(1, 3)), draw(st.booleans())

    def sides(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims)))

    groups, stride, dilation, kernel = draw(st.sampled_from([1, 1, 2])), sides(1, 3), sides(1, 2), sides(1, 3)
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    channels = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    if transposed:
        options["padding"] = sides(0, 1)
        options["output_padding"] = tuple(draw(st.integers(0, pace - 1)) for pace in stride)
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
        options["padding"] = draw(st.sampled_from(["same", "valid"])) if set(stride) == {1} else sides(0, 2)
    size = sides(5, 7)
    layer = KINDS[dims][transposed](*channels, kernel, **options).double()
    return layer, torch.randn(5, channels[0], *size, dtype=torch.float64)


@LAWS
@given(_convolutions(), st.lists(st.integers(-1, 2), min_size=5, max_size=5), st.integers(0, 99))
def test_every_way_to_a_convolutions_gradient_agrees(made: tuple[Any, Tensor], owner: list[int], seed: int) -> None:
    layer, images = made
    torch.manual_seed(seed)
    groups = Groups.of(np.array(owner, np.int64))
    images = images[torch.from_numpy(groups.order)]
    output = layer(images)
    assume(output.numel() > 0)
    g = torch.randn_like(output)
    product = layers.product(layer, ("weight",), (images,), g)
    assert product is not None
    expected = []
    for run in groups.runs:
        for at in range(run.start, run.stop, run.size):
            own = slice(at, at + run.size)
            expected.append(torch.autograd.grad((layer(images[own]) * g[own]).sum(), layer.weight)[0])
    wanted = torch.stack(expected)
    for way in (product._side_by_side, product._unrolled):
        if way == product._side_by_side or layer.groups == 1:
            for run in groups.runs:
                parts = way(run)
                found = parts if isinstance(parts, Tensor) else torch.cat([part for _, part in parts])
                torch.testing.assert_close(found, wanted[run.first : run.first + run.groups])
    found = torch.cat([part for _, part in sorted(product.patients(groups.runs), key=lambda part: part[0])])
    torch.testing.assert_close(found, wanted)
    if layer.groups == 1:
        squares, reaches = product.squares(groups.runs)
        torch.testing.assert_close(squares, wanted.flatten(1).square().sum(1))
        assert (reaches >= squares.sqrt() * (1 - 1e-9)).all()
    factors = torch.arange(1.0, len(wanted) + 1, dtype=torch.float64)
    factors[0] = 0
    scale = per_image(factors, groups.runs)
    images[scale == 0] = float("nan")
    torch.testing.assert_close(
        layers.product(layer, ("weight",), (images,), g).total(scale, scale == 0),
        torch.einsum("p,p...->...", factors, wanted),
    )


@LAWS
@given(_convolutions(), st.lists(st.integers(-1, 2), min_size=5, max_size=5), st.integers(0, 99))
def test_so_does_that_of_the_weight_behind_a_standardised_one(
    made: tuple[Any, Tensor], owner: list[int], seed: int
) -> None:
    """By the raw weight, whose norm is what is clipped: patient by patient, without forming it, and as one sum."""
    layer, images = made
    torch.manual_seed(seed)
    layer.__class__ = standardised.KINDS[type(layer)]
    layer.weight.data[:, : 1 if seed % 2 else None].mul_(1e-3)  # some, or all, are below the floor
    groups = Groups.of(np.array(owner, np.int64))
    images = images[torch.from_numpy(groups.order)]
    output = layer(images)
    assume(output.numel() > 0)
    g = torch.randn_like(output)
    expected = []
    for run in groups.runs:
        for at in range(run.start, run.stop, run.size):
            own = slice(at, at + run.size)
            expected.append(torch.autograd.grad((layer(images[own]) * g[own]).sum(), layer.weight)[0])
    wanted = torch.stack(expected)
    size = wanted.abs().max().item() + 1
    product = layers.product(layer, ("weight",), (images,), g)
    assert product is not None
    found = torch.cat([part for _, part in sorted(product.patients(groups.runs), key=lambda part: part[0])])
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9 * size)
    if layer.groups == 1:
        squares, reaches = product.squares(groups.runs)
        exact = wanted.flatten(1).square().sum(1)
        assert ((squares - exact).abs() <= 1e-9 * exact + 1e-13 * reaches.square()).all(), "float64 of what cancels"
        assert (reaches >= squares.sqrt() * (1 - 1e-9)).all()
        assert product.cost(groups.runs) < float("inf")
    factors = torch.arange(1.0, len(wanted) + 1, dtype=torch.float64)
    factors[0] = 0
    scale = per_image(factors, groups.runs)
    images[scale == 0] = float("nan")
    torch.testing.assert_close(
        layers.product(layer, ("weight",), (images,), g).total(scale, scale == 0),
        torch.einsum("p,p...->...", factors, wanted),
        rtol=1e-7,
        atol=1e-8 * size,
    )


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3), (4,)),
        (nn.Linear(4, 3), (6, 4)),
        (nn.GroupNorm(2, 4), (4, 5, 5)),
        (nn.GroupNorm(1, 4), (4, 3, 3, 3)),
        (nn.InstanceNorm2d(4, affine=True), (4, 5, 5)),
        (nn.InstanceNorm3d(4, affine=True, eps=0.1), (4, 3, 3, 3)),
        (FrozenNorm(4, 1e-5), (4, 5, 5)),
        (FrozenNorm(4, 1e-5), (4, 3, 3, 3)),
        (nn.PReLU(), (4, 5, 5)),
        (nn.PReLU(4), (4, 5, 5)),
        (nn.LayerNorm([5, 4]), (5, 4)),
        (nn.RMSNorm(4), (5, 4)),
    ],
)
def test_the_other_layers_give_the_gradient_of_each_patient(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, groups = layer.double(), Groups.of(np.array([0, 4, 4, -1, 2, 2, 2]))
    torch.manual_seed(2)
    for value in layer.parameters():
        nn.init.normal_(value)
    images = 3 + torch.randn(7, *shape, dtype=torch.float64)
    g = torch.randn_like(layer(images))
    own = dict(layer.named_parameters())
    found = layers.small(layer, own, (images,), g, groups.runs)
    product = layers.product(layer, own, (images,), g)
    if product is not None:
        parts = list(product.patients(groups.runs))
        found["weight"] = torch.cat([part for _, part in parts])
        torch.testing.assert_close(product.squares(groups.runs)[0], found["weight"].flatten(1).square().sum(1))
        ones = torch.ones(7, dtype=torch.float64)
        torch.testing.assert_close(product.total(ones, ones == 0), found["weight"].sum(0))
    assert set(found) == set(own)
    for run in groups.runs:
        for at in range(run.groups):
            images_of = slice(run.start + at * run.size, run.start + (at + 1) * run.size)
            expected = torch.autograd.grad((layer(images[images_of]) * g[images_of]).sum(), list(own.values()))
            for name, wanted in zip(own, expected, strict=True):
                torch.testing.assert_close(found[name][run.first + at], wanted)


def test_an_embedding_takes_whole_numbers() -> None:
    layer, groups = nn.Embedding(5, 3), Groups.of(np.array([0, 1]))
    words = torch.tensor([[1, 1, 2], [0, 4, 4]])
    found = layers.small(layer, ("weight",), (words,), torch.ones(2, 3, 3), groups.runs)["weight"]
    assert found[:, :, 0].tolist() == [[0, 2, 1, 0, 0], [1, 0, 0, 0, 2]]


@given(st.lists(st.integers(-1, 6), max_size=20).map(lambda owner: np.array(owner, np.int64)))
def test_groups_hold_each_patients_images_and_padding_behind_them(owner: Any) -> None:
    groups = Groups.of(owner)
    assert sorted(groups.order) == list(range(len(owner)))
    names = owner[groups.order]
    held = [
        set(names[at : at + run.size].tolist()) for run in groups.runs for at in range(run.start, run.stop, run.size)
    ]
    assert all(len(each) == 1 for each in held), "no group holds two patients"
    found = [each.pop() for each in held]
    assert sorted(found[: groups.patients]) == sorted(set(owner.tolist()) - {PADDING})
    assert set(found[groups.patients :]) <= {PADDING}
    assert groups.count == len(found)
    assert np.array_equal(groups.weights > 0, names != PADDING)
    if len(owner):
        sums = per_group(torch.from_numpy(groups.weights), groups.runs)
        assert torch.allclose(sums, (torch.arange(groups.count) < groups.patients).double())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("train", ["all", "head", "adapters", "lora"])
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_network_is_fit(name: str, train: str, dims: int) -> None:
    section = {"weight_standardisation": True}
    with torch.device("meta"):
        found = check(networks.build(spec_of(name, [32] * dims, transfer={"train": train})))
        other = check(networks.build(spec_of(name, [32] * dims, transfer={"train": train}, network=section)))
    assert found.unsupported == other.unsupported == ()
    assert any("our Standardised" in str(change) or "our LowRank" in str(change) for change in other.changed)
    named = {"resnet18": "OwnResNetBlock in place of ResNetBlock", "segresnet": "OwnResBlock in place of ResBlock"}
    if name in named:
        assert any(named[name] in str(change) for change in found.changed)
    if name == "plain-cnn" and train == "all":
        assert found.changed == ()


class _Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.layer = nn.Parameter(torch.ones(1)), nn.Linear(2, 2)


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))


class _Odd(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        """Not what torch's layer does."""
        return super().forward(x) * x.mean()


class _Damped(standardised.StandardisedConv2d):
    def effective(self) -> Tensor:
        """Not what ours does."""
        return 0.5 * super().effective()


def _twice() -> nn.Module:
    layer = nn.Linear(2, 2)
    return nn.Sequential(layer, layer)


def _tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    return module


def _local() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    weights.keep_local(module, frozenset({"1.weight"}))
    return module


UNFIT = [
    (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "'1' is a BatchNorm1d", "group norm"),
    (nn.Sequential(nn.BatchNorm2d(2).requires_grad_(False)), "'0' is a BatchNorm2d", "group norm"),
    (nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True)), "InstanceNorm2d", "group norm"),
    (nn.Sequential(_Gate()), r"'0' is a _Gate with parameters of its own \(gain\)", "freeze"),
    (nn.Sequential(_Own()), "'0' is a _Own, whose gradient we do not know", "client/private/layers.py"),
    (nn.Sequential(_Odd(2, 2)), "'0' is a _Odd, whose gradient we do not know", "a layer that torch has"),
    (nn.Sequential(_Damped(2, 2, 3)), "'0' is a _Damped, whose gradient we do not know", "a layer that torch has"),
    (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), "ParametrizationList", "freeze"),
    (nn.Sequential(nn.GRU(2, 2)), "'0' is a GRU", "freeze"),
    (nn.Sequential(nn.ReLU(inplace=True)), "writes in place", "inplace=False"),
    (_twice(), "'1' is the same as '0'", "one name"),
    (_tied(), "shares its parameter 'weight' with '0'", "its own"),
    (_local(), "keeps 1 parameters at the site", "shared"),
]


@pytest.mark.parametrize(("module", "what", "remedy"), UNFIT)
def test_what_is_unfit_is_named_with_its_remedy(module: nn.Module, what: str, remedy: str) -> None:
    with pytest.raises(ConsiliumError, match=what) as raised:
        demand(module)
    assert remedy in str(raised.value)


def test_all_that_is_unfit_is_listed_and_what_is_frozen_may_be_anything() -> None:
    module = nn.Sequential(_Own(), nn.BatchNorm1d(2), _Gate(), nn.Linear(2, 2))
    assert [found.module for found in check(module).unsupported] == ["0", "1", "2"]
    assert check(nn.Sequential(_Own().requires_grad_(False), nn.Linear(2, 2))).unsupported == ()
    assert check(Every()).unsupported == ()
