"""Weights that were learned with batch norms: a study begins at the function that they are, image by image."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save_file
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from client.private.fitness import approvable
from models import fields, networks, pretrained, weights
from models.architectures import Shape
from models.frozen import FrozenNorm
from models.weights import Layout

EVERY = [
    (name, [max(network.minimum, network.divisor)] * dims)
    for dims in (2, 3)
    for name, network in networks.NETWORKS.items()
    if dims == 2 or name in ("resnet10", "unet", "dynunet", "segresnet")
]
FROZEN = {"network.norm": "frozen"}
SMALL = {"input.size": [16, 16]}


def elsewhere(name: str, size: list[int], channels: int = 1) -> nn.Module:
    """A network as MONAI builds it; its batch norms have seen images, and their scales and shifts were learned."""
    network = networks.NETWORKS[name]
    torch.manual_seed(5)
    module = network.make(Shape(channels, tuple(size), 2), "batch", fields.read(network.parameters, {}))
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, _BatchNorm):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.uniform_(part.bias, -0.5, 0.5)
        module.train()
        for _ in range(3):
            module(2 + 3 * torch.randn(4, channels, *size))
    return module.eval()


def saved(module: nn.Module, path: Path, **changes: Any) -> Path:
    """What the module learned, as a file from anywhere."""
    arrays = {name: value.numpy().copy() for name, value in module.state_dict().items()}
    save_file({**arrays, **changes}, path)
    return path


def started(spec: dict[str, Any], path: Path) -> nn.Module:
    """The network of a study that starts from a file."""
    module = networks.build(spec)
    weights.load_state(module, pretrained.initial_state(spec, path, 1))
    return module


@pytest.mark.parametrize(("name", "size"), EVERY)
def test_a_study_starts_at_the_very_function_that_was_learned(
    spec_for: Any, tmp_path: Path, name: str, size: list[int]
) -> None:
    given = elsewhere(name, size)
    module = started(spec_for(name, **FROZEN, **{"input.size": size}), saved(given, tmp_path / "w.safetensors")).eval()
    images = 2 + 3 * torch.randn(3, 1, *size)
    with torch.no_grad():
        wanted, found = given.double()(images.double()), module.double()(images.double())
    assert (found - wanted).abs().max() <= 1e-4 * wanted.std()
    parts = list(module.modules())
    assert any(isinstance(part, FrozenNorm) for part in parts)
    assert not any(isinstance(part, _BatchNorm) for part in parts)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "unet"])
def test_weights_for_colour_see_a_grey_image_as_they_saw_it_in_three_channels(
    spec_for: Any, tmp_path: Path, name: str
) -> None:
    given = elsewhere(name, [32, 32], channels=3)
    module = started(spec_for(name, **FROZEN), saved(given, tmp_path / "w.safetensors")).eval()
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        wanted, found = given.double()(images.double().expand(-1, 3, -1, -1)), module.double()(images.double())
    assert (found - wanted).abs().max() <= 1e-4 * wanted.std()


def torchvisions_resnet18(arrays: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """What a file with torchvision's names computes (He 2016, table 1): written out, since torchvision is not here."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var, weight, bias = (arrays[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, mean, var, weight, bias, eps=1e-5)

    def convolution(x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        weight = arrays[f"{name}.weight"]
        return functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    x = functional.max_pool2d(norm(convolution(images, "conv1", 2), "bn1").relu(), 3, 2, 1)
    for layer, block in itertools.product(range(1, 5), range(2)):
        name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
        y = norm(convolution(x, f"{name}.conv1", stride), f"{name}.bn1").relu()
        y = norm(convolution(y, f"{name}.conv2", 1), f"{name}.bn2")
        if stride > 1:
            x = norm(convolution(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
        x = (x + y).relu()
    return x.mean((2, 3)) @ arrays["fc.weight"].T + arrays["fc.bias"]


def test_a_file_with_torchvisions_names_fits_as_it_is(spec_for: Any, tmp_path: Path) -> None:
    """Its residuals have no bias where MONAI's have one, and its thousand classes are not the study's."""
    given = elsewhere("resnet18", [64, 64], channels=3).state_dict()
    arrays = {name: value for name, value in given.items() if not name.endswith("downsample.0.bias")}
    assert len(arrays) == len(given) - 3
    save_file({name: value.numpy() for name, value in arrays.items()}, tmp_path / "two.safetensors")
    images = torch.randn(2, 3, 64, 64)
    spec = spec_for("resnet18", **FROZEN, **{"input.size": [64, 64], "input.channels": 3})
    with torch.no_grad():
        wanted = torchvisions_resnet18(arrays, images)
        found = started(spec, tmp_path / "two.safetensors").eval()(images)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.std()
    thousand = arrays | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    save_file({name: value.numpy() for name, value in thousand.items()}, tmp_path / "thousand.safetensors")
    state = load(pretrained.initial_state(spec, tmp_path / "thousand.safetensors", 1))
    assert state["fc.weight"].shape == (2, 512)
    np.testing.assert_array_equal(state["layer4.1.conv2.weight"], arrays["layer4.1.conv2.weight"].numpy())


def test_scales_and_shifts_learn_and_travel_and_go_on_in_the_next_study(spec_for: Any, tmp_path: Path) -> None:
    path = saved(elsewhere("resnet10", [16, 16]), tmp_path / "w.safetensors")
    spec = spec_for("resnet10", transfer={"train": "adapters"}, **FROZEN, **SMALL)
    module = started(spec, path)
    norms = networks.norm_parameters(module)
    assert {name for name in norms if name.startswith("bn1.")} == {"bn1.scale", "bn1.shift"}
    learned = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert learned == norms | {"fc.weight", "fc.bias"}
    assert Layout.of(module).count == sum(module.get_parameter(name).numel() for name in learned)
    with torch.no_grad():
        module.get_parameter("bn1.scale").mul_(2)
    state = weights.state_bytes(module)
    (tmp_path / "next.safetensors").write_bytes(state)
    assert pretrained.initial_state(spec, tmp_path / "next.safetensors", 1) == state


def test_a_frozen_norm_is_constants_of_one_image() -> None:
    norm = FrozenNorm(3, 1e-5).double()
    nn.init.normal_(norm.scale)
    nn.init.normal_(norm.shift)
    for sides in ((4,), (4, 5), (2, 3, 4)):
        images = torch.randn(5, 3, *sides, dtype=torch.float64)
        alone = torch.cat([norm(image) for image in torch.split(images, 1)])
        assert torch.equal(norm(images), alone)
        norm.train()
        assert torch.equal(norm(images), alone), "training changes nothing but the parameters"
        norm.eval()


def _of_a_group_norm(arrays: dict[str, Any]) -> None:
    for name in [name for name in arrays if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]:
        del arrays[name]


def _negative(arrays: dict[str, Any]) -> None:
    arrays["bn1.running_var"] = -np.ones(64, np.float32)


def _not_a_number(arrays: dict[str, Any]) -> None:
    arrays["layer1.0.bn1.running_mean"] = np.full(64, np.nan, np.float32)


def _narrow(arrays: dict[str, Any]) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        arrays[f"bn1.{name}"] = arrays[f"bn1.{name}"][:32].copy()


def _one_more(arrays: dict[str, Any]) -> None:
    arrays["extra.running_mean"] = np.zeros(64, np.float32)


def _beside(arrays: dict[str, Any]) -> None:
    arrays |= {"bn1.scale": np.ones(64, np.float32), "bn1.shift": np.zeros(64, np.float32)}


def _uneven(arrays: dict[str, Any]) -> None:
    arrays["bn1.weight"] = arrays["bn1.weight"][:32].copy()


@pytest.mark.parametrize(
    ("change", "words"),
    [(_of_a_group_norm, "'bn1' has no running_mean"), (_negative, "'bn1.running_var' is below zero"),
     (_not_a_number, "'layer1.0.bn1.running_mean' holds what is not a finite"), (_one_more, "'extra.running_mean' is"),
     (_beside, "'bn1.bias' is unknown"), (_narrow, r"'bn1.scale' is \[32\], not \[64\]"),
     (_uneven, "'bn1' has statistics and weights of different")],
)  # fmt: skip
def test_weights_without_the_statistics_of_a_batch_norm_are_refused(
    spec_for: Any, tmp_path: Path, change: Any, words: str
) -> None:
    path = saved(elsewhere("resnet10", [16, 16]), tmp_path / "w.safetensors")
    arrays = load(path.read_bytes())
    change(arrays)
    save_file(arrays, path)
    with pytest.raises(ValueError, match=words):
        pretrained.initial_state(spec_for("resnet10", **FROZEN, **SMALL), path, 1)


@pytest.mark.parametrize("norm", ["group", "instance", "none"])
def test_another_norm_never_takes_the_place_of_a_trained_one_in_silence(
    spec_for: Any, tmp_path: Path, norm: str
) -> None:
    path = saved(elsewhere("resnet10", [64, 64]), tmp_path / "w.safetensors")
    spec = spec_for("resnet10", **{"network.norm": norm, "input.size": [64, 64]})
    with pytest.raises(ValueError, match='write \\[network\\] norm = "frozen"'):
        pretrained.initial_state(spec, path, 1)


def test_what_was_published_with_frozen_norms_goes_on_with_frozen_norms(spec_for: Any, tmp_path: Path) -> None:
    spec = spec_for("resnet10", **FROZEN, **SMALL)
    path = saved(elsewhere("resnet10", [16, 16]), tmp_path / "w.safetensors")
    path.write_bytes(pretrained.initial_state(spec, path, 1))
    with pytest.raises(ValueError, match='write \\[network\\] norm = "frozen"'):
        pretrained.initial_state(spec_for("resnet10", **SMALL), path, 1)
    grouped = weights.initial_state(spec_for("resnet10", **SMALL), 1)
    path.write_bytes(grouped)
    with pytest.raises(ValueError, match="'bn1' has no running_mean"):
        pretrained.initial_state(spec, path, 1)


@pytest.mark.parametrize("name", ["resnet10", "unet", "densenet-small"])
def test_a_file_without_last_layers_gets_fresh_ones(spec_for: Any, tmp_path: Path, name: str) -> None:
    given, head = elsewhere(name, [32, 32]).state_dict(), f"{networks.NETWORKS[name].head}."
    arrays = {key: value.numpy() for key, value in given.items() if not key.startswith(head)}
    save_file(arrays, tmp_path / "w.safetensors")
    module = started(spec_for(name, **FROZEN), tmp_path / "w.safetensors")
    whole = started(spec_for(name, **FROZEN), saved(elsewhere(name, [32, 32]), tmp_path / "w.safetensors"))
    for key, value in whole.state_dict().items():
        if not key.startswith(head):
            assert torch.equal(module.state_dict()[key], value), key
    weight = next(value for key, value in module.named_parameters() if key.startswith(head) and value.ndim > 1)
    assert weight.abs().max() > 0


def test_half_precision_and_counters_of_batches_fit(spec_for: Any, tmp_path: Path) -> None:
    arrays = {name: value.numpy() for name, value in elsewhere("resnet10", [16, 16]).state_dict().items()}
    half = {name: array.astype(np.float16) if array.ndim else array for name, array in arrays.items()}
    assert any(array.dtype == np.int64 for array in half.values())
    save_file(half, tmp_path / "w.safetensors")
    state = load(pretrained.initial_state(spec_for("resnet10", **FROZEN, **SMALL), tmp_path / "w.safetensors", 1))
    wide = {name: half[f"bn1.{name}"].astype(np.float64) for name in ("weight", "bias", "running_mean", "running_var")}
    scale = wide["weight"] / np.sqrt(wide["running_var"] + 1e-5)
    np.testing.assert_allclose(state["bn1.scale"], scale, rtol=1e-6)
    np.testing.assert_allclose(state["bn1.shift"], wide["bias"] - wide["running_mean"] * scale, rtol=1e-5, atol=1e-6)


def test_a_hospital_is_told_what_stands_for_its_batch_norms(spec_for: Any) -> None:
    told = approvable(spec_for("resnet10", **FROZEN, **SMALL))
    assert any("'bn1' is our FrozenNorm in place of a batch norm of the initial weights" in text for text in told)


def test_a_trained_weight_is_not_standardised(spec_for: Any) -> None:
    spec = spec_for("resnet10", **FROZEN, **SMALL, **{"network.weight_standardisation": True})
    (problem,) = networks.problems(spec, (16, 16))
    assert problem.where == "network.weight_standardisation"
