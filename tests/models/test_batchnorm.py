"""A batch norm whose statistics are part of the model: as torch has it, one vector with the weights, without noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from client.private.fitness import demand
from models import adapters, fields, networks, pretrained, transfer, weights
from models.architectures import Shape
from models.batchnorm import TravellingBatchNorm
from models.weights import Layout
from privacy.errors import ConsiliumError
from privacy.study import Study
from privacy.study_text import explain
from tests import study_kit
from tests.study_kit import Sections

BATCH = {"network.norm": "batch", "input.size": [32, 32]}


def monais(name: str) -> nn.Module:
    """The network as MONAI builds it, with torch's batch norms and without what draws by chance."""
    network = networks.NETWORKS[name]
    torch.manual_seed(5)
    return still(network.make(Shape(1, (32, 32), 2), "batch", fields.read(network.parameters, {})))


def still(module: nn.Module) -> nn.Module:
    """The same without dropout and stochastic depth."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0
        if hasattr(part, "drop_connect_rate"):
            part.drop_connect_rate = 0
    return module


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_it_is_torchs_batch_norm_in_training_and_at_work(dims: int) -> None:
    kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    theirs, ours = kind(3, eps=1e-3, momentum=0.2).double(), TravellingBatchNorm(3, 1e-3, 0.2).double()
    with torch.no_grad():
        for mine, other in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
            mine.copy_(nn.init.uniform_(other, 0.5, 2))
    for _ in range(4):
        images = 2 + 3 * torch.randn(5, 3, *[4] * dims, dtype=torch.float64)
        wanted, found = theirs(images), ours(images)
        torch.testing.assert_close(found, wanted)
        for part, outputs in ((theirs, wanted), (ours, found)):
            part.zero_grad()
            (outputs**3).sum().backward()
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
    torch.testing.assert_close(ours.running_mean.data, theirs.running_mean)
    torch.testing.assert_close(ours.running_var.data, theirs.running_var)
    theirs.eval()
    ours.eval()
    torch.testing.assert_close(ours(images), theirs(images))
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    ours(100 * images)
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_study_may_have_monais_network_with_its_batch_norms(spec_for: Any, tmp_path: Path, name: str) -> None:
    """From a file of it, the same function in training and at work."""
    theirs = monais(name)
    save_file({key: value.clone() for key, value in theirs.state_dict().items()}, tmp_path / "w.safetensors")
    ours = still(networks.build(spec_for(name, **BATCH)))
    weights.load_state(ours, pretrained.initial_state(spec_for(name, **BATCH), tmp_path / "w.safetensors", 1))
    images = torch.randn(4, 1, 32, 32)
    for training in (True, False):
        for module in (theirs, ours):
            module.train(training)
        wanted, found = theirs(images), ours(images)
        assert (found - wanted).abs().max() <= 1e-4 * wanted.std()
    assert not any(isinstance(part, _BatchNorm) for part in ours.modules())


def test_statistics_travel_with_the_weights_and_no_gradient_reaches_them(spec_for: Any) -> None:
    module = networks.build(spec_for("resnet-small", **BATCH)).train()
    first = weights.trainable_vector(module)
    assert Layout.of(module).count == sum(value.numel() for value in module.state_dict().values())
    module(3 + torch.randn(4, 1, 32, 32)).square().mean().backward()
    statistics = {name: value for name, value in module.named_parameters() if "running_" in name}
    assert statistics
    assert all(value.grad is None for value in statistics.values())
    moved = weights.trainable_vector(module)
    assert not np.array_equal(first, moved)
    other = networks.build(spec_for("resnet-small", **BATCH))
    weights.load_trainable(other, moved)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in other.state_dict().items())


def test_kept_at_a_site_they_do_not_travel(spec_for: Any) -> None:
    module = networks.build(spec_for("resnet-small", local={"norms": "local"}, **BATCH))
    own = weights.local_names(module)
    assert {name.rpartition(".")[2] for name in own} == {"weight", "bias", "running_mean", "running_var"}
    layout = Layout.of(module)
    assert not own & {name for name, travels in zip(layout.names, layout.trainable, strict=True) if travels}


def test_unless_it_is_asked_for_it_is_refused(spec_for: Any) -> None:
    module = networks.build(spec_for("resnet-small", **BATCH))
    with pytest.raises(ValueError, match="mix patients"):
        adapters.check(module)
    with pytest.raises(ConsiliumError, match="mix patients"):
        demand(module)


def test_one_image_has_no_spread(spec_for: Any) -> None:
    spec = spec_for("resnet-small", **BATCH, **{"optimiser.batch_size": 1})
    (problem,) = networks.problems(spec, (32, 32))
    assert problem.where == "optimiser.batch_size"


MOVED: list[Sections] = [
    {"aggregation": {"strategy": "fedavgm"}},
    {"aggregation": {"strategy": "fedadam"}},
    {"aggregation": {"strategy": "fedyogi"}},
    {"aggregation": {"server_learning_rate": "2"}},
    {"aggregation": {"minimum_sites": 4}, "secagg": {"mode": "on"}},
]


@pytest.mark.parametrize("sections", MOVED)
def test_statistics_that_travel_are_averaged_as_they_are_or_not_at_all(sections: Sections) -> None:
    batch = study_kit.merged(sections, {"network": {"norm": "batch"}})
    with pytest.raises(ConsiliumError, match="statistics of a batch norm"):
        study_kit.study("tiny", study_kit.FIVE, **batch)
    kept = study_kit.study("tiny", study_kit.FIVE, **study_kit.merged(batch, {"local": {"norms": "local"}}))
    assert kept.network.norm == "batch"


@pytest.mark.parametrize(("norms", "told"), [("shared", True), ("local", False)])
def test_a_hospital_is_told_that_statistics_leave(norms: str, told: bool) -> None:
    study = study_kit.study("tiny", network={"norm": "batch"}, local={"norms": norms})
    said = " ".join(text for _, text in explain(study))
    assert ("mean and variance of its images' features" in said) == told


@pytest.mark.parametrize("train", ["head", "adapters", "lora"])
def test_what_is_trained_in_part_keeps_the_statistics_it_was_given(spec_for: Any, train: str) -> None:
    module = networks.build(spec_for("resnet-small", transfer={"train": train}, **BATCH))
    transfer.training_mode(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(torch.randn(4, 1, 32, 32))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    learned = {name for name, value in module.named_parameters() if value.requires_grad}
    assert learned
    assert not any("running_" in name for name in learned)


def test_noise_and_batch_norm_exclude_each_other() -> None:
    text = study_kit.draft("tiny", study_kit.FIVE, network={"norm": "batch"})
    assert Study.from_toml(text).network.norm == "batch"
    noise = '\n[privacy]\nmode = "per-site"\nnoise_multiplier = "1"\nsampling_rate = "0.1"\nexpected_patients = 10\n'
    with pytest.raises(ConsiliumError, match="act on each other"):
        Study.from_toml(text + noise)
