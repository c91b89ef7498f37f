"""Every network of the table looks at one image at a time, and every layer learns; `check` refuses what does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.networks.blocks.activation import MemoryEfficientSwish
from torch import nn

from models import adapters, networks, weights
from models.architectures import ACTIVATION

SMALLEST = [
    (name, [size] * dims)
    for dims in (2, 3)
    for name, network in networks.NETWORKS.items()
    for size in (max(network.minimum, network.divisor),)
]
"""Every network at the smallest size that it takes, in 2-D and 3-D."""

LIGHT = ["resnet-small", "densenet-small", "resnet10", "unet", "attention-unet", "segresnet", "dynunet"]


@pytest.fixture(scope="module")
def built(spec_for: Any) -> Any:
    """Networks by name, norm and size, in float64 so that only what is wrong differs; the last one is kept."""
    kept: dict[str, nn.Module] = {}

    def build(name: str, size: list[int], norm: str = "group") -> nn.Module:
        key = f"{name} {norm} {size}"
        if key not in kept:
            kept.clear()
            torch.manual_seed(3)
            kept[key] = networks.build(spec_for(name, **{"network.norm": norm, "input.size": size})).eval().double()
        return kept[key]

    return build


def _gradients(module: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The first image's scores and its gradient, taken through whatever batch it stands in."""
    module.zero_grad()
    scores = module(images)[:1]
    (scores * torch.linspace(-1, 1, scores.numel()).reshape(scores.shape)).sum().backward()
    return scores.detach(), {
        name: torch.zeros(1) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in module.named_parameters()
    }


def _check_image_stands_alone(module: nn.Module, size: list[int]) -> None:
    """Per-sample hooks, as Opacus sets them, see every layer once; and a batch-mate changes nothing."""
    calls: dict[str, int] = {}
    hooks = []
    for name, part in module.named_modules():
        if list(part.parameters(recurse=False)):

            def count(*_: Any, name: str = name) -> None:
                calls[name] = calls.get(name, 0) + 1

            hooks.append(part.register_full_backward_hook(count))
    generator = torch.Generator().manual_seed(4)
    image, mate = torch.randn(2, 1, 1, *size, generator=generator, dtype=torch.float64)
    beside, shared = _gradients(module, torch.cat([image, 100 * mate]))
    for hook in hooks:
        hook.remove()
    assert set(calls.values()) == {1}
    assert len(calls) == len(hooks), "every layer with parameters is used, once"
    alone, single = _gradients(module, image)
    assert alone.shape[:2] == (1, 2)
    torch.testing.assert_close(beside, alone, rtol=1e-8, atol=1e-8)
    for name, gradient in single.items():
        apart = (shared[name] - gradient).norm()
        assert apart <= 1e-8 * gradient.norm() + 1e-8, name
        if gradient.ndim > 1:
            assert gradient.norm() > 0, f"no gradient reaches {name}"


@pytest.mark.parametrize(("name", "size"), SMALLEST)
def test_an_image_and_its_gradient_do_not_depend_on_the_batch(built: Any, name: str, size: list[int]) -> None:
    _check_image_stands_alone(built(name, size), size)


@pytest.mark.parametrize(("name", "size"), SMALLEST)
def test_images_do_not_write_into_the_state(built: Any, name: str, size: list[int]) -> None:
    module = built(name, size)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    module.train()
    with torch.no_grad():
        assert module(torch.randn(2, 1, *size).double()).shape[1] == 2
    module.eval()
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("norm", ["instance", "frozen", "none"])
@pytest.mark.parametrize("name", LIGHT)
def test_the_other_norms_hold_the_same(built: Any, name: str, norm: str) -> None:
    size = [max(16, 2 * networks.NETWORKS[name].reduction if norm == "instance" else 0)] * 2
    module = built(name, size, norm)
    kinds = {type(part).__name__ for part in module.modules()}
    assert not any("GroupNorm" in kind or "BatchNorm" in kind for kind in kinds)
    if norm == "frozen":  # an instance norm that is trained elsewhere looks at one image as it is
        assert "FrozenNorm" in kinds
    else:
        assert any("InstanceNorm" in kind for kind in kinds) == (norm == "instance")
    _check_image_stands_alone(module, size)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_what_is_built_has_no_batch_norm_nothing_in_place_and_nothing_shared(spec_for: Any, name: str) -> None:
    with torch.device("meta"):
        module = networks.build(spec_for(name, **{"input.size": [64, 64]}))
    parts = [part for _, part in module.named_modules(remove_duplicate=False)]
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in parts)
    assert any(isinstance(part, nn.GroupNorm) for part in parts)
    assert not any(getattr(part, "inplace", False) for part in parts)
    assert len(parts) == len({id(part) for part in parts})


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_mask_has_the_size_of_its_image_and_an_answer_has_none(spec_for: Any, name: str) -> None:
    spec = spec_for(name, **{"input.size": [64, 32], "input.channels": 2, "task.classes": ["a", "b", "c"]})
    with torch.device("meta"):
        found = networks.build(spec)(torch.empty(2, 2, 64, 32)).shape
    assert found == ((2, 3, 64, 32) if networks.NETWORKS[name].answers == "pixels" else (2, 3))


def test_adapting_changes_no_function() -> None:
    """MONAI's residual blocks and ours give the same numbers: what is mended is how, not what, they compute."""
    from monai.networks.blocks.segresnet_block import ResBlock
    from monai.networks.blocks.squeeze_and_excitation import SEResNetBottleneck
    from monai.networks.nets.resnet import ResNetBlock, ResNetBottleneck

    for block, channels in (
        (ResNetBlock(8, 8, 2, norm="instance"), 8),
        (ResNetBottleneck(32, 8, 2, norm="instance"), 32),
        (ResBlock(2, 8, "instance"), 8),
        (SEResNetBottleneck(2, 32, 8, 1, 4), 32),
    ):
        kind, images = type(block), torch.randn(2, channels, 8, 8)
        holder = adapters.adapt(nn.Sequential(block), "group", 4)
        assert type(holder[0]) is not kind
        torch.testing.assert_close(holder(images), kind.forward(holder[0], images.clone()))


def test_the_hooks_find_what_adapting_mends() -> None:
    """MONAI's ResNet without its batch norms and in-place activations still adds its residual over what a hook saw."""
    from monai.networks.nets.resnet import resnet10

    module = resnet10(spatial_dims=2, n_input_channels=1, num_classes=2, act=ACTIVATION).double()
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(8, child.num_features).double())
    with pytest.raises(RuntimeError, match="inplace"):
        _check_image_stands_alone(module, [32, 32])


def test_groups_fit_the_channels_of_each_layer() -> None:
    for channels, groups in ((64, 8), (12, 4), (9, 1), (8, 1), (3, 1), (1, 1)):
        (norm,) = adapters.adapt(nn.Sequential(nn.BatchNorm2d(channels)), "group", 8)
        assert (norm.num_groups, norm.num_channels) == (groups, channels)


def _twice() -> nn.Module:
    layer = nn.Linear(2, 2)
    return nn.Sequential(layer, layer)


def _tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    return module


UNFIT = [
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), "'1' is a BatchNorm2d"),
    (nn.Sequential(nn.SyncBatchNorm(2)), "SyncBatchNorm"),
    (nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True)), "InstanceNorm2d"),
    (nn.Sequential(nn.ReLU(inplace=True)), "writes in place"),
    (nn.Sequential(MemoryEfficientSwish()), "writes in place"),
    (_twice(), "'1' is the same as '0'"),
    (_tied(), "'1.weight' is shared with '0.weight'"),
]


@pytest.mark.parametrize(("module", "words"), UNFIT)
def test_check_names_the_part_that_is_unfit(module: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        networks.check(module)


def test_check_refuses_monai_as_shipped_and_its_ignored_norm() -> None:
    """MONAI passes a ResNet's norm to its stem alone, so the option by itself proves nothing."""
    from monai.networks.nets.densenet import DenseNet
    from monai.networks.nets.resnet import resnet18

    with pytest.raises(ValueError, match="BatchNorm"):
        networks.check(DenseNet(2, 1, 2, init_features=8, growth_rate=4, block_config=(1,)))
    asked = resnet18(spatial_dims=2, n_input_channels=1, norm=("group", {"num_groups": 8}), act=ACTIVATION)
    with pytest.raises(ValueError, match=r"layer1.*BatchNorm"):
        networks.check(asked)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network.name": "resnet-smal"}, "Did you mean resnet-small"),
        ({"network.name": "densenet121", "input.size": [28, 28]}, "32"),
        ({"network.parameters": {"width": 99}}, "whole number"),
    ],
)
def test_building_refuses_what_validation_refuses(spec_with: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        networks.build(spec_with(**changes))


def test_sizes_promised_in_the_table_hold(spec_for: Any) -> None:
    counts = {
        (name, dims): weights.trainable_count(spec_for(name, **{"input.size": [32] * dims}))
        for name in networks.NETWORKS
        for dims in (2, 3)
    }
    flat = {name: count for (name, dims), count in counts.items() if dims == 2}
    assert flat == {
        "resnet-small": 97458, "densenet-small": 75906, "densenet121": 6949634, "plain-cnn": 980930,
        "resnet10": 4901442, "resnet18": 11172162, "resnet50": 23509698, "se-resnet50": 26036850,
        "efficientnet-b0": 4009534, "unet": 402761, "attention-unet": 494214, "segresnet": 394986, "dynunet": 482354,
        "vnet": 9358730,
    }  # fmt: skip
    for name, millions in (("unet", 1.2), ("segresnet", 1.2), ("vnet", 46)):
        assert counts[name, 3] == pytest.approx(millions * 1e6, rel=0.02)
    wide = spec_for("plain-cnn", **{"network.parameters": {"width": 16}})
    assert weights.trainable_count(wide) == pytest.approx(1.0e9 / 4, rel=0.01)
