"""How do weights that were learned elsewhere become the first weights of a study?

The file is any safetensors file whose tensors have the names of the study's network: a model that a study published,
or weights from outside that somebody has brought into that form. What belongs to the question asked may differ: last
layers of another shape, or of which the file has nothing, start fresh, and so do low-rank additions that it lacks. A
network for grey images takes one for colour: its first convolution adds up what the other has for red, green and blue,
which is what the other does when all three are that image. A convolution without bias is one with a bias of zero.
Everything else must fit, so that a study never trains by mistake on a backbone that was left at random or computes
something else than what was learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import networks, transfer, weights
from models.adapters import DUPLICATES

if TYPE_CHECKING:
    from torch import nn

_COLOURS = 3


def initial_state(spec: Mapping[str, Any], given: Path, seed: int) -> bytes:
    """The first weights of a study, in the form of `weights.state_bytes`.

    Args:
        spec: the study's specification.
        given: safetensors; float32, or float16 or bfloat16, which are widened.
        seed: for what starts fresh, as in `weights.initial_state`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not safetensors, or a tensor does not fit; the message names it.
    """
    import torch

    from models.frozen import COUNTER, STATISTICS, folded

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = networks.build(spec)
    own, head = module.state_dict(), f"{networks.NETWORKS[spec['network']['name']].head}."
    found = _read(given)
    if not any(f".{transfer.DOWN}." in name for name in own):
        if spec["network"].get("weight_standardisation", False) and any(f".{transfer.DOWN}." in name for name in found):
            raise ValueError(
                "these weights have low-rank additions, and a standardised weight has no room for one: "
                'take the weights that they were trained on, or train = "lora" again'
            )
        found = transfer.merged(found)
    found = _spelled(module, found)
    headless = not any(name.startswith(head) for name in found)
    if spec["network"].get("norm", "group") == "frozen":
        found = folded(module, found, head if headless else "")
    elif norms := sorted(name for name in found if name.endswith((STATISTICS[0], ".scale")) and name not in own):
        other = ', or "batch" where no noise is added' if norms[0].endswith(STATISTICS[0]) else ""
        raise ValueError(
            f"these weights were trained with batch norm ({norms[0]!r}), and another norm computes something else: "
            f'write [network] norm = "frozen"{other}'
        )
    for name, tensor in own.items():
        array = found.pop(name, None)
        if array is None and (f".{transfer.DOWN}." in name or f".{transfer.UP}." in name):
            continue
        if array is None and headless and name.startswith(head):
            continue
        if array is None:
            raise ValueError(f"these weights belong to another network: tensor {name!r} is missing")
        if array.shape == tuple(tensor.shape):
            with torch.no_grad():
                tensor.copy_(torch.from_numpy(array))
        elif not name.startswith(head):
            shapes = f"{list(array.shape)}, not {list(tensor.shape)}"
            raise ValueError(f"these weights belong to another network: tensor {name!r} is {shapes}")
    extra = sorted(name for name in found if not name.endswith(COUNTER))
    if extra:
        raise ValueError(f"these weights belong to another network: tensor {extra[0]!r} is unknown")
    return weights.state_bytes(module)


def _spelled(module: nn.Module, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors as the network has them: once, for its channels, with a bias of zero where there was none."""
    import numpy as np
    from torch.nn.modules.conv import _ConvNd

    twice = tuple(f"{name}." for name in DUPLICATES.get(type(module).__name__, ()))
    found = {name: array for name, array in arrays.items() if not name.startswith(twice)}
    for name, part in module.named_modules():
        weight = found.get(f"{name}.weight")
        if not isinstance(part, _ConvNd) or weight is None:
            continue
        if part.bias is not None:
            found.setdefault(f"{name}.bias", np.zeros(part.out_channels, np.float32))
        if part.in_channels == 1 and weight.shape[1:2] == (_COLOURS,):
            found[f"{name}.weight"] = weight.sum(1, keepdims=True)
    return found


def _read(path: Path) -> dict[str, Any]:
    """The tensors of a file as float32 arrays."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from models.frozen import COUNTER, STATISTICS

    with path.open("rb"):  # its own error where it cannot be read
        pass
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError("this is not a safetensors file: convert the weights, and never unpickle them here") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not name.endswith(COUNTER):
            raise ValueError(f"tensor {name!r} is {tensor.dtype}: only real numbers can be trained on")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"tensor {name!r} holds what is not a finite number: the file is damaged")
        if name.endswith(STATISTICS[1]) and bool((tensor < 0).any()):
            raise ValueError(f"tensor {name!r} is below zero, which no variance is: the file is damaged")
    return {name: tensor.to(torch.float32).numpy() for name, tensor in tensors.items()}
