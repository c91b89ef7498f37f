"""Which networks can a study name, and what fits which image and which task?

A network is one line of `NETWORKS`: what it is for, what it needs, and how MONAI builds it (`models.architectures`).
All are built with norms that look at one image only, unless a study without noise asks for batch norms, and with
nothing that writes in place, because per-patient gradients (Opacus; Abadi 2016, arXiv 1607.00133) are defined for such
networks only. `models.adapters.check` holds that as a property of what was built, since an option that is accepted is
not an option that is obeyed. Nothing here loads torch before `build` is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from models import architectures, fields, tasks, transfer, weights
from models.adapters import adapt, check
from models.architectures import Maker, Shape
from models.fields import Choice, Field, Problem, Whole

if TYPE_CHECKING:
    from torch import nn

__all__ = ["NETWORKS", "NORMS", "Network", "Shape", "build", "check", "problems"]

NORMS = ("group", "instance", "batch", "frozen", "none")
"""What `network.norm` may be. "batch" mixes patients, so a study with noise refuses it (`models.batchnorm`); "frozen"
is what one that was trained elsewhere computes at work (`models.frozen`), and needs weights to start from."""


@dataclass(frozen=True)
class Network:
    """One entry of the table.

    Attributes:
        summary: what it is for, in one phrase.
        answers: "image": one row of scores an image; "pixels": one for every pixel or voxel.
        minimum: the smallest image side in pixels.
        reduction: how many pixels of a side end in one element of the smallest map that is normalised.
        groups: groups of channels for `norm = "group"`.
        parameters: what a study may set under network.parameters.
        make: (shape, norm as MONAI writes it, parameters) -> module with outputs [n, shape.outputs] or
            [n, shape.outputs, *size].
        head: the name under which the module holds its last layers.
        divisor: what every image side must be a multiple of.
        channels: how many channels an image may have; () for any number.
    """

    summary: str
    answers: Literal["image", "pixels"]
    minimum: int
    reduction: int
    groups: int
    parameters: Mapping[str, Field]
    make: Maker
    head: str
    divisor: int = 1
    channels: tuple[int, ...] = ()


_WIDTH: dict[str, Field] = {"width": Whole(1, 1, 32)}
_STEM: dict[str, Field] = {"stem": Choice("standard", ("standard", "small"))}

NETWORKS: dict[str, Network] = {
    "resnet-small": Network(
        "97,000 parameters, residual; the first choice for images of 28 to 64 px on a CPU",
        "image", 8, 8, 8, _WIDTH, architectures.encoder((16, 32, 64), (2, 2, 2), residual=2), "final"),
    "resnet10": Network(
        "4.9 million parameters, residual, for images from 64 px and volumes",
        "image", 16, 32, 8, _STEM, architectures.resnet("resnet10"), "fc"),
    "resnet18": Network(
        "11 million parameters, residual; the network most results are given for; stem = \"small\" below 64 px",
        "image", 16, 32, 8, _STEM, architectures.resnet("resnet18"), "fc"),
    "resnet50": Network(
        "24 million parameters, residual with bottlenecks, for a GPU",
        "image", 16, 32, 8, _STEM, architectures.resnet("resnet50"), "fc"),
    "se-resnet50": Network(
        "26 million parameters, residual with channel attention, for a GPU",
        "image", 32, 32, 8, {}, architectures.se_resnet((3, 4, 6, 3)), "last_linear"),
    "densenet-small": Network(
        "76,000 parameters, densely connected, for images of 28 to 128 px",
        "image", 16, 16, 4, {}, architectures.densenet(32, 16, (2, 4, 4), bottleneck=2), "class_layers.out"),
    "densenet121": Network(
        "7 million parameters, the network of most chest X-ray work, for images from 64 px and a GPU",
        "image", 32, 32, 8, {}, architectures.densenet(64, 32, (6, 12, 24, 16), bottleneck=4), "class_layers.out"),
    "efficientnet-b0": Network(
        "4 million parameters, depthwise convolutions, for images from 64 px",
        "image", 32, 32, 8, {}, architectures.efficientnet("efficientnet-b0"), "_fc"),
    "plain-cnn": Network(
        "1 million parameters (times the square of `width`), plain convolutions; for measuring transport",
        "image", 16, 16, 8, _WIDTH,
        architectures.encoder((32, 64, 128, 256, 256), (2, 2, 2, 2, 1), residual=0), "final"),
    "unet": Network(
        "400,000 parameters in 2-D, 1.2 million in 3-D, residual units; the first choice for masks",
        "pixels", 16, 8, 8, _WIDTH, architectures.unet((16, 32, 64, 128), units=2), "model.2", divisor=8),
    "attention-unet": Network(
        "500,000 parameters in 2-D, gates on its skip connections, for small structures",
        "pixels", 16, 8, 8, _WIDTH, architectures.attention_unet((16, 32, 64, 128)), "model.2", divisor=8),
    "segresnet": Network(
        "400,000 parameters in 2-D, 1.2 million in 3-D, residual; light on memory",
        "pixels", 16, 8, 8, _WIDTH, architectures.segresnet(8), "conv_final", divisor=8),
    "dynunet": Network(
        "480,000 parameters in 2-D, the U-Net of nnU-Net",
        "pixels", 16, 8, 8, _WIDTH, architectures.dynunet((16, 32, 64, 128)), "output_block", divisor=8),
    "vnet": Network(
        "46 million parameters in 3-D, 9 million in 2-D, wide kernels, for volumes on a GPU",
        "pixels", 16, 16, 8, {}, architectures.vnet, "out_tr", divisor=16, channels=(1, 2, 4, 8, 16)),
}  # fmt: skip
"""Every network that a study can name."""


def problems(spec: Mapping[str, Any], size: tuple[int, ...], target: str | None = "class") -> list[Problem]:
    """What is wrong with the network section, given an image size that is known to be good, or ().

    Args:
        target: what the task's answers look like (`models.tasks.Target`); None when the task is not known.
    """
    section = spec.get("network", {})
    name, norm = section.get("name"), section.get("norm", "group")
    answers = None if target is None else "pixels" if target == "mask" else "image"
    found = []
    if norm not in NORMS:
        found.append(fields.unknown("network.norm", "norm", str(norm), NORMS))
    if not isinstance(section.get("weight_standardisation", False), bool):
        found.append(Problem("network.weight_standardisation", "it is neither true nor false", "Write true or false."))
    elif norm == "frozen" and section.get("weight_standardisation", False):
        what = 'norm = "frozen" goes on from weights as they are, and standardising them changes what they compute'
        found.append(Problem("network.weight_standardisation", what, "Leave it out, or take another norm."))
    optimiser = spec.get("optimiser", {})
    if norm == "batch" and isinstance(optimiser, Mapping) and optimiser.get("batch_size") == 1:
        found.append(Problem("optimiser.batch_size", "a batch norm needs more than one image", "Write 2 or more."))
    if norm == "none" and _own_norms(spec):
        remedy = 'Write [network] norm = "group", or [local] norms = "shared".'
        found.append(Problem("local.norms", "a network without normalisation has none to keep at a site", remedy))
    fitting = {key: entry for key, entry in NETWORKS.items() if answers in (None, entry.answers)}
    if not isinstance(name, str) or name not in NETWORKS:
        return [*found, fields.unknown("network.name", "network", str(name), fitting)]
    network = NETWORKS[name]
    if name not in fitting:
        marks, wanted = ("a mask", "one answer an image") if answers == "image" else ("one answer an image", "a mask")
        remedy = f"Take {', '.join(fitting)}, or another task.kind."
        return [*found, Problem("network.name", f"{name} gives {marks}, and the task wants {wanted}", remedy)]
    found += fields.check(network.parameters, section.get("parameters", {}), "network.parameters")
    least = max(network.minimum, 2 * network.reduction if norm == "instance" else 0)
    if size and min(size) < least:
        with_norm = ' with norm = "instance"' if least > network.minimum else ""
        smaller = [other for other, entry in fitting.items() if entry.minimum <= min(size)]
        remedy = f"Write {least} or more{', or take ' + ' or '.join(smaller) if smaller and not with_norm else ''}."
        found.append(
            Problem("input.size", f"{name}{with_norm} needs sides of {least} px or more, not {min(size)}", remedy)
        )
    elif any(side % network.divisor for side in size):
        near = [max(least, round(side / network.divisor) * network.divisor) for side in size]
        what = f"{name} halves an image until only multiples of {network.divisor} px fit together again"
        found.append(Problem("input.size", what, f"Write {near}."))
    channels = spec.get("input", {}).get("channels", 1)
    if network.channels and channels not in network.channels:
        what = f"{name} takes images of {', '.join(map(str, network.channels))} channels, not {channels}"
        others = [other for other, entry in fitting.items() if not entry.channels]
        found.append(Problem("input.channels", what, f"Take {', '.join(others)}."))
    return found


def build(spec: Mapping[str, Any]) -> nn.Module:
    """The network of a specification, with fresh weights from torch's global generator, in training mode.

    What the study does not train is frozen (`models.transfer`).

    Returns:
        A module from float32 [n, channels, *size] to raw scores, float32 [n, number of classes] or, for masks,
        [n, number of classes, *size].

    Raises:
        ValueError: the specification names something that does not exist, or `check` refuses what was built.
    """
    size = tuple(spec["input"]["size"])
    wrong = [*problems(spec, size, tasks.target(spec["task"])), *transfer.problems(spec)]
    if wrong:
        raise ValueError("; ".join(str(problem) for problem in wrong))
    section = spec["network"]
    network, kind = NETWORKS[section["name"]], section.get("norm", "group")
    norm = {
        "group": ("group", {"num_groups": network.groups}),
        "instance": ("instance", {"affine": True}),
        "batch": "batch",
        "frozen": "batch",
        "none": "",
    }[kind]
    shape = Shape(spec["input"]["channels"], size, len(spec["task"]["classes"]))
    module = network.make(shape, norm, fields.read(network.parameters, section.get("parameters", {})))
    module = adapt(module, kind, network.groups)
    if section.get("weight_standardisation", False):
        from models.standardised import standardise

        module = standardise(module, network.head)
    module = transfer.freeze(module, spec, network.head)
    check(module, kind)
    if _own_norms(spec):
        weights.keep_local(module, norm_parameters(module))
    return module


def norm_parameters(module: nn.Module) -> frozenset[str]:
    """Names of the parameters of normalisation layers that are trained."""
    from torch import nn
    from torch.nn.modules.batchnorm import _NormBase

    from models.batchnorm import TravellingBatchNorm
    from models.frozen import FrozenNorm

    return frozenset(
        f"{name}.{parameter}" if name else parameter
        for name, part in module.named_modules()
        if isinstance(part, nn.GroupNorm | nn.LayerNorm | TravellingBatchNorm | FrozenNorm | _NormBase)
        for parameter, value in part.named_parameters(recurse=False)
        if value.requires_grad
    )


def _own_norms(spec: Mapping[str, Any]) -> bool:
    return bool(spec.get("local", {}).get("norms", "shared") == "local")
