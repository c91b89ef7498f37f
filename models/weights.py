"""How do a network's weights become bytes and one flat vector, and back?

Initial weights travel once, as a full state in the safetensors format; afterwards only the trainable parameters travel,
as one float32 vector. Both have one order, the sorted names of the tensors, so that a vector means the same to every
site. The file names its frozen tensors in its metadata, so that the coordinator takes a state apart and puts a model
together (`Layout.of_state`, `merge`) without torch. Nothing here can execute what it reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn

Vector = NDArray[np.float32]
_FROZEN = "frozen"
_LOCAL = "kept_at_the_site"
_HEADER_LIMIT = 16 * 2**20


@dataclass(frozen=True)
class Layout:
    """Which tensors a model has.

    Attributes:
        names: sorted.
        shapes: one per name.
        trainable: one per name, whether it travels; the others (buffers, frozen layers, what a site keeps for itself)
            never leave the initial state.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    trainable: tuple[bool, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """The layout of a network."""
        state = dict(sorted(module.state_dict().items()))
        learned = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        learned -= local_names(module)
        return cls(
            tuple(state),
            tuple(tuple(tensor.shape) for tensor in state.values()),
            tuple(name in learned for name in state),
        )

    @classmethod
    def of_state(cls, state: bytes | Path) -> Layout:
        """The layout of a saved state, read from its header alone.

        Raises:
            ValueError: not a state written by `state_bytes`.
        """
        header, frozen = _header(state)
        names = tuple(sorted(header))
        return cls(
            names,
            tuple(tuple(header[name]["shape"]) for name in names),
            tuple(name not in frozen for name in names),
        )

    @property
    def count(self) -> int:
        """d, the length of the vector."""
        return sum(stop - start for _, _, start, stop in self._slices())

    def split(self, vector: Vector) -> dict[str, Vector]:
        """The trainable tensors by name, as views of the vector.

        Raises:
            ValueError: the vector is not a float32 [d].
        """
        if vector.dtype != np.float32 or vector.shape != (self.count,):
            raise ValueError(
                f"the model has {self.count} trainable parameters (float32); "
                f"{vector.dtype} of shape {vector.shape} came"
            )
        return {name: vector[start:stop].reshape(shape) for name, shape, start, stop in self._slices()}

    def _slices(self) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        start = 0
        for name, shape, trainable in zip(self.names, self.shapes, self.trainable, strict=True):
            if trainable:
                stop = start + math.prod(shape)
                yield name, shape, start, stop
                start = stop


def keep_local(module: nn.Module, names: frozenset[str]) -> None:
    """Mark parameters as the site's own: trained there, outside the vector that travels."""
    setattr(module, _LOCAL, names)


def local_names(module: nn.Module) -> frozenset[str]:
    """The parameters that `keep_local` marked."""
    names: frozenset[str] = getattr(module, _LOCAL, frozenset())
    return names


def local_vector(module: nn.Module) -> Vector:
    """A copy of the site's own parameters in the order of their names: float32 [l]."""
    state = module.state_dict()
    parts = [state[name].detach().cpu().numpy().ravel() for name in sorted(local_names(module))]
    return np.concatenate(parts, dtype=np.float32) if parts else np.empty(0, np.float32)


def load_local(module: nn.Module, vector: Vector) -> None:
    """Put float32 [l] into the site's own parameters.

    Raises:
        ValueError: wrong length.
    """
    import torch

    state, at = module.state_dict(), 0
    if len(vector) != sum(state[name].numel() for name in local_names(module)):
        raise ValueError(f"the site's own parameters are not {len(vector)} numbers")
    with torch.no_grad():
        for name in sorted(local_names(module)):
            tensor = state[name]
            part = np.array(vector[at : at + tensor.numel()], dtype=np.float32).reshape(tensor.shape)
            tensor.copy_(torch.from_numpy(part))
            at += tensor.numel()


def trainable_vector(module: nn.Module) -> Vector:
    """A copy of the trainable parameters: float32 [d], little-endian on every machine torch runs on."""
    layout, state = Layout.of(module), module.state_dict()
    vector = np.empty(layout.count, np.float32)
    for name, part in layout.split(vector).items():
        part[...] = state[name].detach().cpu().numpy()
    return vector


def load_trainable(module: nn.Module, vector: Vector) -> None:
    """Put float32 [d] into the trainable parameters; no other copy is made.

    Raises:
        ValueError: wrong length or type.
    """
    import torch

    state = module.state_dict()
    with torch.no_grad():
        for name, part in Layout.of(module).split(vector).items():
            source = part if part.flags.writeable else part.copy()
            state[name].copy_(torch.from_numpy(source))


def state_bytes(module: nn.Module) -> bytes:
    """The full state in the safetensors format; equal states give equal bytes.

    Raises:
        ValueError: a tensor is not float32. Its bytes on the wire would not be what the layout says.
    """
    layout, state = Layout.of(module), module.state_dict()
    arrays = {name: state[name].detach().cpu().numpy() for name in layout.names}
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise ValueError(f"tensor {name!r} is {array.dtype}: only float32 travels")
    frozen = [name for name, trainable in zip(layout.names, layout.trainable, strict=True) if not trainable]
    return _save(arrays, frozen)


def load_state(module: nn.Module, state: bytes | Path) -> None:
    """Put a full state into a network built from the same specification; from a file tensor by tensor.

    Raises:
        ValueError: the state belongs to another network, or is not a state; the network is unchanged.
    """
    import torch

    expected, found = Layout.of(module), Layout.of_state(state)
    if expected != found:
        raise ValueError(f"these weights belong to another network: {_difference(expected, found)}")
    own = module.state_dict()
    with torch.no_grad():
        for name, array in _tensors(state):
            own[name].copy_(torch.from_numpy(array))


def initial_state(spec: Mapping[str, Any], seed: int) -> bytes:
    """Fresh weights of a specification's network; one seed gives the same bytes on one version of torch and MONAI.

    Torch's global generator is left as it was.

    Raises:
        ValueError: as `networks.build`.
    """
    import torch

    from models import networks

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return state_bytes(networks.build(spec))


def trainable_count(spec: Mapping[str, Any]) -> int:
    """d of a specification's network, without allocating its weights.

    Raises:
        ValueError: as `networks.build`.
    """
    import torch

    from models import networks

    with torch.device("meta"):
        return Layout.of(networks.build(spec)).count


def state_vector(state: bytes | Path) -> Vector:
    """The trainable parameters of a saved state: float32 [d]. Needs no torch.

    Raises:
        ValueError: not a state.
    """
    layout = Layout.of_state(state)
    vector = np.empty(layout.count, np.float32)
    parts = layout.split(vector)
    for name, array in _tensors(state):
        if name in parts:
            parts[name][...] = array
    return vector


def merge(initial: bytes | Path, vector: Vector) -> bytes:
    """The full state with the frozen tensors of `initial` and the trainable parameters of `vector`. Needs no torch.

    Raises:
        ValueError: not a state, or the vector does not fit it.
    """
    layout = Layout.of_state(initial)
    arrays = dict(layout.split(vector))
    frozen = []
    for name, array in _tensors(initial, only=set(layout.names) - set(arrays)):
        arrays[name] = array
        frozen.append(name)
    return _save(arrays, frozen)


def _save(arrays: Mapping[str, NDArray[Any]], frozen: list[str]) -> bytes:
    from safetensors.numpy import save

    ordered = {name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
    # One metadata key only: safetensors writes several in no fixed order, and the bytes are hashed.
    return save(ordered, {_FROZEN: json.dumps(sorted(frozen))})


def _header(state: bytes | Path) -> tuple[dict[str, Any], set[str]]:
    """Tensor entries and names of the frozen tensors, after every offset has been checked against the data."""
    size = len(state) if isinstance(state, bytes) else state.stat().st_size
    length = int.from_bytes(_read(state, 0, 8), "little")
    try:
        if not 0 < length <= min(_HEADER_LIMIT, size - 8):
            raise ValueError("header length")
        entries = json.loads(_read(state, 8, length))
        frozen = set(json.loads(entries.pop("__metadata__")[_FROZEN]))
        end = 0
        for begin, stop, shape, dtype in sorted(
            (*entry["data_offsets"], entry["shape"], entry["dtype"]) for entry in entries.values()
        ):
            if dtype != "F32" or begin != end or stop - begin != 4 * math.prod(shape) or min(shape, default=0) < 0:
                raise ValueError("offsets")
            end = stop
        if end != size - 8 - length or not frozen <= set(entries):
            raise ValueError("size")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            "these bytes are not a float32 model state: take the file that signing the study wrote"
        ) from error
    return entries, frozen


def _read(state: bytes | Path, start: int, length: int) -> bytes:
    if isinstance(state, bytes):
        return state[start : start + length]
    with state.open("rb") as file:
        file.seek(start)
        return file.read(length)


def _tensors(state: bytes | Path, only: set[str] | None = None) -> Iterator[tuple[str, NDArray[Any]]]:
    """The tensors one after the other; from a file only one is in memory at a time."""
    from safetensors import safe_open
    from safetensors.numpy import load

    if isinstance(state, bytes):
        for name, array in sorted(load(state).items()):
            if only is None or name in only:
                yield name, array
        return
    with safe_open(str(state), framework="np") as file:
        for name in sorted(file.keys()):
            if only is None or name in only:
                yield name, file.get_tensor(name)


def _difference(expected: Layout, found: Layout) -> str:
    missing, extra = set(expected.names) - set(found.names), set(found.names) - set(expected.names)
    if missing:
        return f"tensor {min(missing)!r} is missing"
    if extra:
        return f"tensor {min(extra)!r} is unknown"
    for name, ours, theirs in zip(expected.names, expected.shapes, found.shapes, strict=True):
        if ours != theirs:
            return f"tensor {name!r} is {list(theirs)}, not {list(ours)}"
    return "other layers are frozen"
