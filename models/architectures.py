"""How is each family of networks built from MONAI? One function a family; `models.networks` holds the table.

Each returns a maker (shape, norm as MONAI writes it, parameters) -> module. Norms that MONAI takes from its caller
are given; the others are replaced afterwards as the study asks (`models.adapters`). MONAI is loaded when a maker
is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

ACTIVATION = ("relu", {"inplace": False})


@dataclass(frozen=True)
class Shape:
    """What a network is told of its surroundings: channels of the image, its size in pixels, number of outputs."""

    channels: int
    size: tuple[int, ...]
    outputs: int


Maker = Callable[[Shape, Any, dict[str, Any]], "nn.Module"]


def densenet(features: int, growth: int, blocks: tuple[int, ...], bottleneck: int) -> Maker:
    """DenseNet (Huang 2017, arXiv 1608.06993)."""

    def make(shape: Shape, norm: Any, _: dict[str, Any]) -> nn.Module:
        from monai.networks.nets.densenet import DenseNet

        return DenseNet(
            len(shape.size),
            shape.channels,
            shape.outputs,
            init_features=features,
            growth_rate=growth,
            block_config=blocks,
            bn_size=bottleneck,
            act=ACTIVATION,
            norm=norm,
        )

    return make


def encoder(channels: tuple[int, ...], strides: tuple[int, ...], residual: int) -> Maker:
    """Strided convolutions, with `residual` of them per residual unit (He 2016), and one linear layer."""

    def make(shape: Shape, norm: Any, parameters: dict[str, Any]) -> nn.Module:
        from monai.networks.nets.classifier import Classifier

        return Classifier(
            (shape.channels, *shape.size),
            shape.outputs,
            tuple(channel * parameters["width"] for channel in channels),
            strides,
            num_res_units=residual,
            act=ACTIVATION,
            norm=norm,
        )

    return make


def resnet(name: str) -> Maker:
    """ResNet (He 2016, arXiv 1512.03385) as `monai.networks.nets.<name>`.

    The stem "standard" is 7 × 7 with stride 2 and a maximum over 3 × 3; "small" is 3 × 3 with stride 1 and no maximum,
    as He has it for images of 32 px.
    """

    def make(shape: Shape, _: Any, parameters: dict[str, Any]) -> nn.Module:
        from monai.networks.nets import resnet as family

        small = parameters["stem"] == "small"
        module: nn.Module = getattr(family, name)(
            spatial_dims=len(shape.size),
            n_input_channels=shape.channels,
            num_classes=shape.outputs,
            conv1_t_size=3 if small else 7,
            conv1_t_stride=1 if small else 2,
            no_max_pool=small,
        )
        return module

    return make


def se_resnet(layers: tuple[int, ...]) -> Maker:
    """SE-ResNet (Hu 2018, arXiv 1709.01507)."""

    def make(shape: Shape, _: Any, __: dict[str, Any]) -> nn.Module:
        from monai.networks.nets.senet import SEResNet50

        return SEResNet50(
            layers=layers, spatial_dims=len(shape.size), in_channels=shape.channels, num_classes=shape.outputs
        )

    return make


def efficientnet(name: str) -> Maker:
    """EfficientNet (Tan 2019, arXiv 1905.11946); with stochastic depth and dropout 0.2."""

    def make(shape: Shape, _: Any, __: dict[str, Any]) -> nn.Module:
        from monai.networks.nets.efficientnet import EfficientNetBN

        return EfficientNetBN(
            name,
            pretrained=False,
            spatial_dims=len(shape.size),
            in_channels=shape.channels,
            num_classes=shape.outputs,
        )

    return make


def unet(channels: tuple[int, ...], units: int) -> Maker:
    """U-Net with residual units (Ronneberger 2015, arXiv 1505.04597; Kerfoot 2019).

    MONAI's own PReLU stays: its last layers have as few channels as there are classes, and a ReLU there can die and
    leave nothing but background.
    """

    def make(shape: Shape, _: Any, parameters: dict[str, Any]) -> nn.Module:
        from monai.networks.nets.unet import UNet

        return UNet(
            len(shape.size),
            shape.channels,
            shape.outputs,
            tuple(channel * parameters["width"] for channel in channels),
            (2,) * (len(channels) - 1),
            num_res_units=units,
            act="prelu",
            norm="batch",
        )

    return make


def attention_unet(channels: tuple[int, ...]) -> Maker:
    """Attention U-Net (Oktay 2018, arXiv 1804.03999)."""

    def make(shape: Shape, _: Any, parameters: dict[str, Any]) -> nn.Module:
        from monai.networks.nets.attentionunet import AttentionUnet

        return AttentionUnet(
            len(shape.size),
            shape.channels,
            shape.outputs,
            tuple(channel * parameters["width"] for channel in channels),
            (2,) * (len(channels) - 1),
        )

    return make


def segresnet(filters: int) -> Maker:
    """SegResNet (Myronenko 2018, arXiv 1810.11654), without its variational branch."""

    def make(shape: Shape, _: Any, parameters: dict[str, Any]) -> nn.Module:
        from monai.networks.nets.segresnet import SegResNet

        return SegResNet(
            len(shape.size),
            filters * parameters["width"],
            shape.channels,
            shape.outputs,
            act=ACTIVATION,
            norm="batch",
        )

    return make


def dynunet(filters: tuple[int, ...]) -> Maker:
    """The U-Net of nnU-Net (Isensee 2021, doi:10.1038/s41592-020-01008-z), without deep supervision."""

    def make(shape: Shape, _: Any, parameters: dict[str, Any]) -> nn.Module:
        from monai.networks.nets.dynunet import DynUNet

        levels = len(filters)
        return DynUNet(
            len(shape.size),
            shape.channels,
            shape.outputs,
            kernel_size=[3] * levels,
            strides=[1, *[2] * (levels - 1)],
            upsample_kernel_size=[2] * (levels - 1),
            filters=[count * parameters["width"] for count in filters],
            norm_name="batch",
        )

    return make


def vnet(shape: Shape, _: Any, __: dict[str, Any]) -> nn.Module:
    """V-Net (Milletari 2016, arXiv 1606.04797), without its dropout, which takes whole images for channels in 2-D."""
    from monai.networks.nets.vnet import VNet
    from torch import nn

    module = VNet(len(shape.size), shape.channels, shape.outputs, act=("elu", {"inplace": False}))
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout3d):
                setattr(parent, name, nn.Identity())
    return module
