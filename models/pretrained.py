"""How do weights that were learned elsewhere become the first weights of a study?

The file is any safetensors file whose tensors have the names of the study's network: a model that a study published,
or weights from outside that somebody has brought into that form. What belongs to the question asked may differ: last
layers of another shape start fresh, and so do low-rank additions that the file lacks. Everything else must fit, so
that a study never trains by mistake on a backbone that was left at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models import networks, transfer, weights

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""What a batch norm keeps of its images; no norm of ours has a place for it."""


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
    for name, tensor in own.items():
        array = found.pop(name, None)
        if array is None and (f".{transfer.DOWN}." in name or f".{transfer.UP}." in name):
            continue
        if array is None:
            raise ValueError(f"these weights belong to another network: tensor {name!r} is missing")
        if array.shape == tuple(tensor.shape):
            with torch.no_grad():
                tensor.copy_(torch.from_numpy(array))
        elif not name.startswith(head):
            shapes = f"{list(array.shape)}, not {list(tensor.shape)}"
            raise ValueError(f"these weights belong to another network: tensor {name!r} is {shapes}")
    extra = sorted(name for name in found if not name.endswith(_STATISTICS))
    if extra:
        raise ValueError(f"these weights belong to another network: tensor {extra[0]!r} is unknown")
    return weights.state_bytes(module)


def _read(path: Path) -> dict[str, Any]:
    """The tensors of a file as float32 arrays."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with path.open("rb"):  # its own error where it cannot be read
        pass
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError("this is not a safetensors file: convert the weights, and never unpickle them here") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not name.endswith(_STATISTICS):
            raise ValueError(f"tensor {name!r} is {tensor.dtype}: only real numbers can be trained on")
    return {name: tensor.to(torch.float32).numpy() for name, tensor in tensors.items()}
