"""Which part of a network does a study train, and what stays as it was?

`transfer.train` is "all", or a small part on top of weights that were learned elsewhere:

- "head": the last layers;
- "adapters": the head and the scale and shift of every norm (Li 2017, arXiv 1603.04779, without its statistics);
- "lora": the head, and beside every convolution a second one of low rank whose result is added (Hu 2022,
  arXiv 2106.09685; for convolutions, `rank` maps under the same kernel and then a mixture of them). It starts at zero,
  so that training begins at the very function that was given.

What is not trained is frozen: it never travels, never changes, and works as in evaluation (no dropout).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from models.fields import Choice, Field, Problem, Whole
from models.fields import check as check_fields

if TYPE_CHECKING:
    from torch import nn

PARTS = ("all", "head", "adapters", "lora")
DOWN, UP = "low_rank_down", "low_rank_up"
_FIELDS: dict[str, Field] = {"train": Choice("all", PARTS), "rank": Whole(4, 1, 64)}


def problems(spec: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the transfer section."""
    section = spec.get("transfer", {})
    found = check_fields(_FIELDS, section, "transfer")
    if not found and section.get("train") == "adapters" and spec["network"].get("norm", "group") == "none":
        what = 'there are no norms to train with network.norm = "none"'
        found.append(Problem("transfer.train", what, 'Write train = "head", or another norm.'))
    return found


def freeze(module: nn.Module, spec: Mapping[str, Any], head: str) -> nn.Module:
    """The same network, with everything frozen that the specification does not train.

    Args:
        head: the name of the module that holds its last layers.
    """
    from torch import nn

    from models.batchnorm import TravellingBatchNorm
    from models.frozen import FrozenNorm

    section = spec.get("transfer", {})
    train = section.get("train", "all")
    if train == "all":
        return module
    module.requires_grad_(False)
    last = module.get_submodule(head)
    kept = set(last.modules())
    norms = (nn.GroupNorm, TravellingBatchNorm, FrozenNorm, nn.modules.instancenorm._InstanceNorm)
    for part in list(module.modules()):
        if train == "adapters" and isinstance(part, norms):
            part.requires_grad_(True)
        if train == "lora" and part not in kept and type(part) in _low_rank():
            _add(part, section.get("rank", 4))
    last.requires_grad_(True)
    for part in module.modules():
        if isinstance(part, TravellingBatchNorm):  # at work, as all of a network that is trained in part
            part.running_mean.requires_grad_(False)
            part.running_var.requires_grad_(False)
    return module


def training_mode(module: nn.Module) -> None:
    """Training mode for a network that is trained as a whole; evaluation mode where a part of it is frozen.

    The layers that a study trains on a frozen backbone work alike in both; batch norms keep the statistics they have.
    """
    module.train(all(parameter.requires_grad for parameter in module.parameters()))


def merged(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """A state without its low-rank tensors: each added to the convolution it stands beside. Needs no torch.

    Args:
        arrays: tensors by name, float32.

    Returns:
        The same function as a state of the plain network.
    """
    import numpy as np

    plain = {name: array for name, array in arrays.items() if f".{DOWN}." not in name and f".{UP}." not in name}
    for name, down in arrays.items():
        stem, found, _ = name.partition(f".{DOWN}.")
        if found:
            up = arrays[f"{stem}.{UP}.weight"]
            change = np.tensordot(up.reshape(up.shape[:2]), down, axes=1)
            plain[f"{stem}.weight"] = (plain[f"{stem}.weight"] + change).astype(np.float32)
    return plain


def _add(convolution: Any, rank: int) -> None:
    """Turn a convolution into one with a low-rank sibling."""
    kind = next(base for base in type(convolution).__mro__ if base.__module__ == "torch.nn.modules.conv")
    rank = min(rank, convolution.out_channels, convolution.in_channels * _taps(convolution))
    down = kind(
        convolution.in_channels,
        rank,
        convolution.kernel_size,
        stride=convolution.stride,
        padding=convolution.padding,
        dilation=convolution.dilation,
        bias=False,
    )
    up = kind(rank, convolution.out_channels, 1, bias=False)
    up.weight.data.zero_()
    convolution.__class__ = _low_rank()[type(convolution)]
    convolution.add_module(DOWN, down)
    convolution.add_module(UP, up)


def _taps(convolution: Any) -> int:
    taps = 1
    for side in convolution.kernel_size:
        taps *= side
    return taps


@cache
def _low_rank() -> dict[type, type]:
    """Convolutions, and what each becomes. Transposed ones stay frozen as they are."""
    from torch import nn

    from models import standardised

    def with_sibling(kind: type) -> type:
        class LowRank(kind):  # type: ignore[misc]
            def forward(self, x: Any) -> Any:
                """The frozen convolution, plus the mixture of a few maps."""
                if not hasattr(self, DOWN):
                    return super().forward(x)
                return super().forward(x) + getattr(self, UP)(getattr(self, DOWN)(x))

        return LowRank

    kinds = (nn.Conv2d, nn.Conv3d, standardised.StandardisedConv2d, standardised.StandardisedConv3d)
    return {kind: with_sibling(kind) for kind in kinds}
