"""Weights keep their meaning on the way through bytes and vectors, and nothing else is taken for weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as reference_load
from safetensors.torch import save as reference_save
from torch import nn

from models import networks, weights
from models.weights import Layout


class Small(nn.Module):
    """Two trainable tensors, one frozen, one buffer; the names are not in the order of definition."""

    buffer: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.zeta = nn.Linear(3, 2, bias=False)
        self.frozen = nn.Parameter(torch.full((4,), 7.0), requires_grad=False)
        self.register_buffer("buffer", torch.arange(3.0))
        self.alpha = nn.Parameter(torch.tensor(5.0))


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    return Small()


@pytest.fixture(scope="module")
def state(spec_with: Any) -> bytes:
    return weights.initial_state(spec_with(), 5)


def test_the_vector_holds_the_trainable_tensors_by_name(small: Small) -> None:
    layout = Layout.of(small)
    assert layout.names == ("alpha", "buffer", "frozen", "zeta.weight")
    assert layout.trainable == (True, False, False, True)
    assert layout.count == 7
    vector = weights.trainable_vector(small)
    assert vector.dtype == np.float32
    assert vector.tolist() == [5.0, *small.zeta.weight.flatten().tolist()]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=7, max_size=7))
def test_a_vector_comes_back_bit_by_bit(values: list[float]) -> None:
    module, vector = Small(), np.array(values, np.float32)
    vector.flags.writeable = False
    weights.load_trainable(module, vector)
    assert weights.trainable_vector(module).tobytes() == vector.tobytes()
    assert module.frozen.tolist() == [7.0] * 4
    assert module.buffer.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("vector", [np.zeros(6, np.float32), np.zeros(7, np.float64), np.zeros((7, 1), np.float32)])
def test_a_vector_that_does_not_fit_is_refused(small: Small, vector: Any) -> None:
    before = weights.state_bytes(small)
    with pytest.raises(ValueError, match="7 trainable parameters"):
        weights.load_trainable(small, vector)
    assert weights.state_bytes(small) == before


def test_a_vector_holds_copies_not_views(small: Small) -> None:
    vector = weights.trainable_vector(small)
    vector[:] = 0
    assert small.alpha.item() == 5.0


def test_a_state_comes_back_from_bytes_and_from_a_file(small: Small, tmp_path: Path) -> None:
    state = weights.state_bytes(small)
    path = tmp_path / "model.safetensors"
    path.write_bytes(state)
    for source in (state, path):
        other = Small()
        weights.load_state(other, source)
        assert weights.state_bytes(other) == state
        assert Layout.of_state(source) == Layout.of(small)
        assert weights.state_vector(source).tobytes() == weights.trainable_vector(small).tobytes()


def test_any_reader_of_safetensors_can_read_a_state(small: Small) -> None:
    read = reference_load(weights.state_bytes(small))
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        name: tensor.tolist() for name, tensor in small.state_dict().items()
    }


def test_merging_changes_the_trainable_tensors_alone(small: Small, tmp_path: Path) -> None:
    path = tmp_path / "initial"
    path.write_bytes(weights.state_bytes(small))
    vector = np.arange(7, dtype=np.float32)
    other = Small()
    weights.load_trainable(other, vector)
    assert weights.merge(path, vector) == weights.merge(path.read_bytes(), vector) == weights.state_bytes(other)
    with pytest.raises(ValueError, match="7 trainable"):
        weights.merge(path, vector[:-1])


def test_one_seed_gives_one_file_and_leaves_the_generator_alone(spec_with: Any, state: bytes) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3).tolist()
    torch.manual_seed(1)
    assert weights.initial_state(spec_with(), 5) == state
    assert torch.rand(3).tolist() == expected
    assert weights.initial_state(spec_with(), 6) != state


def test_the_header_alone_tells_the_length_of_the_vector(spec_with: Any, state: bytes) -> None:
    module = networks.build(spec_with())
    count = weights.trainable_count(spec_with())
    assert count == Layout.of_state(state).count == Layout.of(module).count == weights.trainable_vector(module).size


def test_weights_of_another_network_are_refused_by_name(spec_with: Any, state: bytes) -> None:
    module = networks.build(spec_with(**{"task.classes": ["a", "b", "c"]}))
    before = weights.state_bytes(module)
    with pytest.raises(ValueError, match=r"another network: tensor 'final\.1\.bias' is \[2\], not \[3\]"):
        weights.load_state(module, state)
    assert weights.state_bytes(module) == before
    with pytest.raises(ValueError, match="is missing"):
        weights.load_state(networks.build(spec_with(**{"network.name": "densenet-small"})), state)


def _with_header(state: bytes, change: Any) -> bytes:
    length = int.from_bytes(state[:8], "little")
    header = json.loads(state[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + state[8 + length :]


def _overlap(header: dict[str, Any]) -> None:
    header["alpha"]["data_offsets"] = header["buffer"]["data_offsets"]


HOSTILE = {
    "nothing": lambda state: b"",
    "short": lambda state: state[:7],
    "cut": lambda state: state[:-1],
    "longer": lambda state: state + b"\0",
    "pickle": lambda state: b"\x80\x04" + bytes(100),
    "huge header": lambda state: (2**62).to_bytes(8, "little") + state[8:],
    "not JSON": lambda state: (4).to_bytes(8, "little") + b"{{{{" + state,
    "a list": lambda state: (2).to_bytes(8, "little") + b"[]",
    "no metadata": lambda state: reference_save({"alpha": torch.zeros(2)}),
    "half precision": lambda state: reference_save({"alpha": torch.zeros(2).half()}, {"frozen": "[]"}),
    "frozen unknown": lambda state: reference_save({"alpha": torch.zeros(2)}, {"frozen": '["beta"]'}),
    "overlap": lambda state: _with_header(state, _overlap),
    "wrong shape": lambda state: _with_header(state, lambda header: header["buffer"].update(shape=[4])),
    "negative shape": lambda state: _with_header(state, lambda header: header["buffer"].update(shape=[-1, -3])),
    "deep": lambda state: (40000).to_bytes(8, "little") + b"[" * 40000,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_bytes_that_are_no_state_are_refused(small: Small, tmp_path: Path, name: str) -> None:
    bad = HOSTILE[name](weights.state_bytes(small))
    path = tmp_path / "bad"
    path.write_bytes(bad)
    for source in (bad, path):
        for read in (Layout.of_state, weights.state_vector, lambda given: weights.load_state(small, given)):
            with pytest.raises(ValueError, match="not a float32 model state"):
                read(source)


@settings(max_examples=60)
@given(st.data())
def test_a_changed_byte_of_the_header_never_crashes(data: st.DataObject) -> None:
    module = Small()
    state = bytearray(weights.state_bytes(module))
    place = data.draw(st.integers(0, 7 + int.from_bytes(state[:8], "little")))
    state[place] ^= data.draw(st.integers(1, 255))
    try:
        weights.load_state(module, bytes(state))
    except ValueError as error:
        assert str(error)  # noqa: PT017 - either it is refused in words, or it is still the same layout
    else:
        assert Layout.of_state(bytes(state)) == Layout.of(module)


def test_other_types_than_float32_do_not_travel() -> None:
    with pytest.raises(ValueError, match="only float32"):
        weights.state_bytes(nn.Linear(2, 2).double())
