"""A study may train a part of a network: what is frozen stays, what travels is small, the start is what was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save_file
from torch import nn

from models import networks, pretrained, transfer, weights
from models.weights import Layout

NETWORKS = ["resnet10", "densenet-small", "resnet-small", "unet", "attention-unet", "segresnet", "dynunet"]
SMALL = {"input.size": [16, 16]}


def build(spec: Any, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return networks.build(spec)


def stepped(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state before one step of plain descent on one batch, which is then taken."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    transfer.training_mode(module)
    outputs = module(torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(1)))
    (outputs**2).mean().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.5)
    return before


@pytest.mark.parametrize("train", ["head", "adapters", "lora"])
@pytest.mark.parametrize("name", NETWORKS)
def test_only_what_is_trained_moves_and_travels(spec_for: Any, name: str, train: str) -> None:
    module = build(spec_for(name, transfer={"train": train, "rank": 2}, **SMALL))
    head = f"{networks.NETWORKS[name].head}."
    whole = weights.trainable_count(spec_for(name, **SMALL))
    count = Layout.of(module).count
    assert 0 < count < (whole if train == "lora" else 0.6 * whole)
    before = stepped(module)
    moved = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    learned = {key for key, parameter in module.named_parameters() if parameter.requires_grad}
    assert moved <= learned
    assert any(key.startswith(head) for key in moved)
    rest = {key for key in learned if not key.startswith(head)}
    if train == "head":
        assert not rest
    elif train == "lora":
        assert all(f".{transfer.DOWN}." in f".{key}" or f".{transfer.UP}." in f".{key}" for key in rest)
        assert any(f".{transfer.UP}." in key for key in moved)
    else:
        norms = {id(p) for m in module.modules() if isinstance(m, nn.GroupNorm) for p in m.parameters()}
        own = dict(module.named_parameters())
        assert rest
        assert all(id(own[key]) in norms for key in rest)


@pytest.mark.parametrize("name", NETWORKS)
def test_low_rank_additions_start_at_nothing_and_can_be_merged(spec_for: Any, name: str) -> None:
    """The function is the given one until a step is taken; afterwards the plain network can hold it."""
    plain, adapted = build(spec_for(name, **SMALL)), build(spec_for(name, transfer={"train": "lora"}, **SMALL))
    adapted.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(adapted(images), plain(images))
    stepped(adapted)
    assert not torch.allclose(adapted(images), plain(images), atol=1e-3)
    state = transfer.merged(load(weights.state_bytes(adapted)))
    plain.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    torch.testing.assert_close(adapted(images), plain(images), rtol=1e-3, atol=1e-4)


def test_what_travels_is_as_small_as_the_docs_say(spec_for: Any) -> None:
    counts = {
        train: weights.trainable_count(spec_for("resnet18", transfer={"train": train, "rank": 4}))
        for train in transfer.PARTS
    }
    assert counts == {"all": 11172162, "head": 1026, "adapters": 10626, "lora": 144326}


def test_a_frozen_backbone_has_no_dropout(spec_for: Any) -> None:
    spec = spec_for("efficientnet-b0", transfer={"train": "head"}, **{"input.size": [32, 32]})
    module, images = build(spec), torch.randn(2, 1, 32, 32)
    transfer.training_mode(module)
    torch.testing.assert_close(module(images), module(images))
    whole = build(spec_for("efficientnet-b0", **{"input.size": [32, 32]}))
    transfer.training_mode(whole)
    assert not torch.equal(whole(images), whole(images))


def test_low_rank_per_sample_hooks_see_each_layer_once(spec_for: Any) -> None:
    module = build(spec_for("resnet10", transfer={"train": "lora"}, **SMALL))
    networks.check(module)
    calls: dict[str, int] = {}
    for name, part in module.named_modules():
        if any(parameter.requires_grad for parameter in part.parameters(recurse=False)):
            part.register_full_backward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    module(torch.randn(2, 1, 16, 16).requires_grad_()).sum().backward()
    assert len(calls) > 10
    assert set(calls.values()) == {1}


@pytest.fixture
def published(spec_for: Any, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights.state_bytes(build(spec_for("resnet10", **SMALL), seed=7)))
    return path


def test_a_published_model_is_the_start_of_the_next_study(spec_for: Any, published: Path) -> None:
    spec = spec_for("resnet10", **SMALL)
    assert pretrained.initial_state(spec, published, 1) == published.read_bytes()


@pytest.mark.parametrize("train", ["all", "head", "adapters", "lora"])
def test_another_question_gets_a_fresh_head(spec_for: Any, published: Path, train: str) -> None:
    spec = spec_for("resnet10", transfer={"train": train}, **SMALL, **{"task.classes": ["a", "b", "c"]})
    first, again = (pretrained.initial_state(spec, published, 1) for _ in range(2))
    assert first == again != pretrained.initial_state(spec, published, 2)
    state, given = load(first), load(published.read_bytes())
    assert state["fc.weight"].shape == (3, 512)
    for name, array in given.items():
        if not name.startswith("fc."):
            np.testing.assert_array_equal(state[name], array)
    weights.load_state(networks.build(spec), first)


def test_low_rank_additions_of_an_earlier_study_are_merged_for_a_plain_one(spec_for: Any, tmp_path: Path) -> None:
    adapted = build(spec_for("resnet10", transfer={"train": "lora"}, **SMALL))
    stepped(adapted)
    path = tmp_path / "lora.safetensors"
    path.write_bytes(weights.state_bytes(adapted))
    spec = spec_for("resnet10", **SMALL)
    plain = networks.build(spec)
    weights.load_state(plain, pretrained.initial_state(spec, path, 1))
    images = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(adapted(images), plain(images), rtol=1e-3, atol=1e-4)


def test_half_precision_is_widened(spec_for: Any, published: Path, tmp_path: Path) -> None:
    arrays = {name: array.astype(np.float16) for name, array in load(published.read_bytes()).items()}
    save_file(arrays, tmp_path / "half.safetensors")
    state = load(pretrained.initial_state(spec_for("resnet10", **SMALL), tmp_path / "half.safetensors", 1))
    np.testing.assert_array_equal(state["conv1.weight"], arrays["conv1.weight"].astype(np.float32))


def _without(arrays: Any) -> None:
    del arrays["layer1.0.conv1.weight"]


def _other(arrays: Any) -> None:
    arrays["conv1.weight"] = arrays["conv1.weight"][:, :, :3, :3].copy()


def _more(arrays: Any) -> None:
    arrays["layer9.weight"] = np.zeros(3, np.float32)


def _whole(arrays: Any) -> None:
    arrays["fc.bias"] = np.zeros(2, np.int64)


@pytest.mark.parametrize(
    ("change", "words"),
    [(_without, "layer1.0.conv1.weight' is missing"), (_other, r"conv1.weight' is \[64, 1, 3, 3\], not"),
     (_more, "layer9.weight' is unknown"), (_whole, "real numbers")],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_by_name(spec_for: Any, published: Path, change: Any, words: str) -> None:
    arrays = load(published.read_bytes())
    change(arrays)
    save_file(arrays, published)
    with pytest.raises(ValueError, match=words):
        pretrained.initial_state(spec_for("resnet10", **SMALL), published, 1)


def test_a_pickle_is_never_opened(spec_for: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a safetensors file"):
        pretrained.initial_state(spec_for("resnet10", **SMALL), path, 1)
    with pytest.raises(FileNotFoundError):
        pretrained.initial_state(spec_for("resnet10", **SMALL), tmp_path / "none", 1)
