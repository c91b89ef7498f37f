"""How does a network of MONAI become one that may be trained on patients?

Per-patient gradients need layers that look at one image and never write over what a hook has seen. MONAI's networks
mix images in batch norms (ResNet takes a `norm` and hands it to its stem only), write activations in place, add
residuals in place, and DynUNet registers every layer under two names. `adapt` mends all of that in what was built, so
that a network in the table needs no options of its own, and `check` refuses what is left.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

DUPLICATES = {"DynUNet": ("input_block", "downsamples", "bottleneck", "upsamples"), "SegResNet": ("act_mod",)}
"""Names under which a network holds layers that its forward pass reaches by another name."""


def adapt(module: nn.Module, norm: str, groups: int) -> nn.Module:
    """The same network, changed where it must be.

    Args:
        module: fresh from MONAI, built with its batch norms.
        norm: "group", "instance" or "none", which takes the place of every batch and instance norm, or "batch" or
            "frozen", which takes that of batch norms.
        groups: groups of channels wished for; a layer whose channels cannot be divided so takes the largest common
            divisor, and one with no more channels than that takes one group.
    """
    from torch import nn

    for name in DUPLICATES.get(type(module).__name__, ()):
        delattr(module, name)
    swish, residuals = _monai_parts()
    for parent in list(module.modules()):
        if type(parent) in residuals:
            parent.__class__ = residuals[type(parent)]
        if isinstance(getattr(parent, "inplace", None), bool):
            parent.inplace = False  # type: ignore[assignment]
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._NormBase):
                setattr(parent, name, _norm(child, norm, groups))
            elif isinstance(child, swish):
                setattr(parent, name, nn.SiLU())
    return module


def check(module: nn.Module, norm: str = "group") -> None:
    """Refuse a network whose update could not be bounded per patient; with norm "batch" what else is wrong.

    Raises:
        ValueError: names the first module that mixes the images of a batch, keeps statistics of them, writes in place
            (per-sample hooks then see overwritten values), or is reached by two names (its gradient counts twice).
    """
    from torch.nn.modules.batchnorm import _NormBase

    from models.batchnorm import TravellingBatchNorm

    seen: dict[int, str] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        kind = type(part).__name__
        if id(part) in seen:
            raise ValueError(f"module {name!r} is the same as {seen[id(part)]!r}: build each layer once, use it once")
        seen[id(part)] = name
        if isinstance(part, TravellingBatchNorm) and norm == "batch":
            continue
        if "BatchNorm" in kind or (getattr(part, "track_running_stats", False) and isinstance(part, _NormBase)):
            raise ValueError(f"module {name!r} is a {kind}, whose statistics mix patients: use a group norm")
        if getattr(part, "inplace", False) or kind == "MemoryEfficientSwish":
            raise ValueError(f"module {name!r} ({kind}) writes in place: build it with inplace=False")
    owners: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in owners:
            raise ValueError(f"parameter {name!r} is shared with {owners[id(parameter)]!r}: give each layer its own")
        owners[id(parameter)] = name


def _norm(given: nn.Module, norm: str, groups: int) -> nn.Module:
    from torch import nn

    from models.batchnorm import TravellingBatchNorm
    from models.frozen import FrozenNorm

    channels = int(given.num_features)  # type: ignore[arg-type]
    if norm == "none":
        return nn.Identity()
    if norm in ("batch", "frozen"):
        if not isinstance(given, nn.modules.batchnorm._BatchNorm):
            return given
        if norm == "frozen":
            return FrozenNorm(channels, given.eps)
        assert given.momentum is not None  # a plain mean over all batches, which no network of MONAI takes
        return TravellingBatchNorm(channels, given.eps, given.momentum)
    if norm == "instance":
        kind = nn.InstanceNorm3d if isinstance(given, nn.BatchNorm3d | nn.InstanceNorm3d) else nn.InstanceNorm2d
        return kind(channels, affine=True)
    return nn.GroupNorm(gcd(groups, channels) if channels > groups else 1, channels)


@cache
def _monai_parts() -> tuple[type, dict[type, type]]:
    """MONAI's in-place swish, and its blocks that add their residual in place with what does the same out of place."""
    from monai.networks.blocks.activation import MemoryEfficientSwish
    from monai.networks.blocks.segresnet_block import ResBlock
    from monai.networks.blocks.squeeze_and_excitation import SEBlock, SEBottleneck, SEResNetBottleneck
    from monai.networks.nets.resnet import ResNetBlock, ResNetBottleneck

    class OwnResNetBlock(ResNetBlock):
        def forward(self, x: Any) -> Any:
            """As MONAI's, with a sum of its own."""
            out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
            return self.act(out + (x if self.downsample is None else self.downsample(x)))

    class OwnResNetBottleneck(ResNetBottleneck):
        def forward(self, x: Any) -> Any:
            """As MONAI's, with a sum of its own."""
            out = self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))
            out = self.bn3(self.conv3(out))
            return self.act(out + (x if self.downsample is None else self.downsample(x)))

    class OwnResBlock(ResBlock):
        def forward(self, x: Any) -> Any:
            """As MONAI's, with a sum of its own."""
            out = self.conv2(self.act(self.norm2(self.conv1(self.act(self.norm1(x))))))
            return out + x

    def squeeze(kind: type[SEBlock]) -> type:
        class OwnSEBlock(kind):  # type: ignore[misc, valid-type]
            def forward(self, x: Any) -> Any:
                """As MONAI's, with a sum of its own."""
                return self.act(self.se_layer(self.conv3(self.conv2(self.conv1(x)))) + self.project(x))

        return OwnSEBlock

    return MemoryEfficientSwish, {
        ResNetBlock: OwnResNetBlock,
        ResNetBottleneck: OwnResNetBottleneck,
        ResBlock: OwnResBlock,
        **{kind: squeeze(kind) for kind in (SEBottleneck, SEResNetBottleneck)},
    }
