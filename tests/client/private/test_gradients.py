"""*Group-mean, then clip*: the sum is exact for every network and task, and nobody weighs more than C in it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from client.private import gradients, layers
from client.private.gradients import SLACK, Extra, PatientGradients, capped_loss
from models import networks, tasks, weights
from models.standardised import standardise
from privacy.errors import ConsiliumError
from tests.client.private.private_kit import ONE_PATIENT_EACH, Every, batch, clipped, middle, spec_of, vectors

SLOW = {
    ("resnet50", 3),
    ("se-resnet50", 2),
    ("se-resnet50", 3),
    ("densenet121", 3),
    ("efficientnet-b0", 3),
    ("vnet", 3),
}
SMALLEST = [
    pytest.param(name, [max(network.minimum, network.divisor)] * dims, id=f"{name}-{dims}d",
                 marks=[pytest.mark.long] if (name, dims) in SLOW else [])
    for dims in (2, 3)
    for name, network in networks.NETWORKS.items()
]  # fmt: skip
SPEC = spec_of("resnet-small", [8, 8])
STANDARDISED = {"weight_standardisation": True}
KINDS = [Every, lambda: standardise(Every(), "head")]
LAWS = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


def _equals(network: nn.Module, spec: dict[str, Any]) -> None:
    """In float64 the sum over a patient of one image, one of two, and one who shows infinity is the slow one."""
    network = network.double().eval()
    task, images, targets = batch(spec, 5, dtype=torch.float64)
    owner = np.array([1, 0, -1, 1, 2])
    images[4].view(-1)[3] = float("inf")
    calls: Counter[str] = Counter()
    hooks = [
        part.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, part in network.named_modules()
        if layers.trained(part)
    ]
    found = vectors(network, task, images, targets, np.array([1, 0, -1, 1, -1]))
    clip_norm = middle(found)
    calls.clear()
    total = PatientGradients(network, task, clip_norm).sum(images, targets, owner)
    assert len(calls) == len(hooks)
    assert set(calls.values()) == {1}, "one forward pass, and each layer once in it"
    for hook in hooks:
        hook.remove()
    expected = sum(clipped(vector, clip_norm) for vector in found.values())
    assert np.abs(expected).max() > 0
    assert np.abs(total - expected).max() <= 1e-9 * np.abs(expected).max()


@pytest.mark.parametrize(("name", "size"), SMALLEST)
def test_every_network_gives_the_sum_of_its_patients_clipped_gradients(name: str, size: list[int]) -> None:
    torch.manual_seed(0)
    spec = spec_of(name, size)
    _equals(networks.build(spec), spec)


@pytest.mark.parametrize("norm", ["instance", "frozen", "none"])
@pytest.mark.parametrize("name", ["resnet-small", "densenet-small", "unet", "segresnet"])
def test_so_do_the_other_norms(name: str, norm: str) -> None:
    torch.manual_seed(0)
    spec = spec_of(name, [32, 32], network={"norm": norm})
    network = networks.build(spec)
    for key, value in network.named_parameters():
        if key.endswith((".scale", ".shift")):  # as weights from elsewhere have them
            nn.init.uniform_(value, 0.5, 2)
    _equals(network, spec)


@pytest.mark.parametrize("standardised", [False, True])
@pytest.mark.parametrize("train", ["head", "adapters", "lora"])
@pytest.mark.parametrize(("name", "dims"), [("resnet-small", 2), ("densenet-small", 2), ("unet", 3), ("dynunet", 2)])
def test_so_does_a_part_of_a_network(name: str, dims: int, train: str, standardised: bool) -> None:
    torch.manual_seed(0)
    network = {"weight_standardisation": standardised}
    spec = spec_of(name, [16] * dims, transfer={"train": train}, network=network)
    network = networks.build(spec)
    for key, value in network.named_parameters():
        if "low_rank_up" in key:  # at its start nothing flows through it
            nn.init.normal_(value, std=0.1)
    assert weights.Layout.of(network).count < sum(value.numel() for value in network.parameters())
    _equals(network, spec)


@pytest.mark.parametrize(("name", "size"), SMALLEST)
def test_so_does_a_network_with_standardised_weights(name: str, size: list[int]) -> None:
    torch.manual_seed(0)
    spec = spec_of(name, size, network=STANDARDISED)
    _equals(networks.build(spec), spec)


@pytest.mark.parametrize("norm", ["instance", "none"])
@pytest.mark.parametrize("name", ["resnet-small", "densenet-small", "unet", "segresnet"])
def test_so_does_one_with_standardised_weights_and_another_norm(name: str, norm: str) -> None:
    torch.manual_seed(0)
    spec = spec_of(name, [32, 32], network={"norm": norm, **STANDARDISED})
    _equals(networks.build(spec), spec)


def test_so_does_a_task_whose_labels_are_not_all_known() -> None:
    spec = spec_of("resnet-small", [8, 8], "multilabel")
    _equals(networks.build(spec), spec)


@pytest.mark.parametrize("kind", KINDS)
def test_so_does_a_network_with_every_kind_of_layer_one_of_them_called_twice(kind: Any) -> None:
    network = kind().double()
    task, images, targets = batch(SPEC, 5, dtype=torch.float64)
    owner = np.array([1, 0, -1, 1, 2])
    found = vectors(network, task, images, targets, owner)
    total = PatientGradients(network, task, middle(found)).sum(images, targets, owner)
    np.testing.assert_allclose(total, sum(clipped(v, middle(found)) for v in found.values()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
@pytest.mark.parametrize("write", [0.0, 1e9])
@pytest.mark.parametrize("little", [0, 1 << 30])
def test_every_way_to_the_sum_gives_the_same(
    kept_bytes: int, write: float, little: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms with or without the gradients; gradients kept or made again, one by one or together."""
    monkeypatch.setattr(gradients, "_WRITE", write)
    monkeypatch.setattr(layers, "_LITTLE", little)
    monkeypatch.setattr(layers, "_CHUNK", 5000)
    for network in (*(kind().double() for kind in KINDS), networks.build(SPEC).double()):
        task, images, targets = batch(SPEC, 7, dtype=torch.float64)
        owner = np.array([3, 0, -1, 3, 2, 0, 5])
        found = vectors(network, task, images, targets, owner)
        engine = PatientGradients(network, task, middle(found), kept_bytes=kept_bytes)
        total = engine.sum(images, targets, owner)
        np.testing.assert_allclose(total, sum(clipped(v, middle(found)) for v in found.values()), rtol=0, atol=1e-10)


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest) -> PatientGradients:
    return PatientGradients(request.param(), tasks.get(SPEC), 0.5, capped_loss(4.0, 0.1))


OWNERS = st.lists(st.integers(-1, 4), min_size=6, max_size=6).map(lambda owner: np.array(owner, np.int64))
NEAR = 1e-5


@LAWS
@given(OWNERS, st.integers(0, 99))
def test_the_sum_is_that_of_each_patient_alone_and_each_weighs_at_most_C(
    engine: PatientGradients, owner: Any, seed: int
) -> None:
    _, images, targets = batch(SPEC, 6, seed)
    images *= 10
    alone = [engine.sum(images, targets, np.where(owner == p, p, -1)) for p in range(5) if p in owner]
    assert all(np.linalg.norm(vector) <= 0.5 for vector in alone)
    np.testing.assert_allclose(engine.sum(images, targets, owner), sum(alone, np.zeros(engine.size)), atol=NEAR)


@LAWS
@given(OWNERS, st.integers(0, 99))
def test_a_patient_taken_away_takes_his_clipped_vector_and_nothing_else(
    engine: PatientGradients, owner: Any, seed: int
) -> None:
    _, images, targets = batch(SPEC, 6, seed)
    without = np.where(owner == owner.max(), -1, owner)
    apart = engine.sum(images, targets, owner) - engine.sum(images, targets, without)
    np.testing.assert_allclose(apart, engine.sum(images, targets, np.where(owner == owner.max(), owner, -1)), atol=NEAR)
    assert np.linalg.norm(apart) <= 0.5


@LAWS
@given(OWNERS, st.integers(0, 99))
def test_batches_cut_between_patients_give_the_same_sum(engine: PatientGradients, owner: Any, seed: int) -> None:
    _, images, targets = batch(SPEC, 6, seed)
    first = owner < 2
    parts = [engine.sum(images[at], targets[at], owner[at]) for at in (first, ~first)]
    np.testing.assert_allclose(sum(parts), engine.sum(images, targets, owner), atol=NEAR)


@LAWS
@given(OWNERS, st.permutations(range(6)), st.integers(0, 99))
def test_neither_order_nor_numbers_matter(engine: PatientGradients, owner: Any, order: list[int], seed: int) -> None:
    _, images, targets = batch(SPEC, 6, seed)
    renamed = np.where(owner < 0, -1, 1000 - owner)[order]
    total = engine.sum(images[order], targets[order], renamed)
    np.testing.assert_allclose(total, engine.sum(images, targets, owner), atol=NEAR)


@LAWS
@given(OWNERS, st.sampled_from([0.0, 1e30, float("inf"), float("nan")]))
def test_padding_may_show_anything(engine: PatientGradients, owner: Any, value: float) -> None:
    _, images, targets = batch(SPEC, 6)
    before = engine.sum(images, targets, owner)
    images[torch.from_numpy(owner == -1)] = value
    assert np.array_equal(before, engine.sum(images, targets, owner))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        spec_of("unet", [16, 16]),
        spec_of("efficientnet-b0", [32, 32]),
        spec_of("resnet-small", [8, 8], network=STANDARDISED),
        spec_of("unet", [16, 16], network=STANDARDISED),
    ],
)
def test_N4_a_patient_that_is_not_finite_is_absent_to_the_last_bit(spec: dict[str, Any], value: float) -> None:
    network = networks.build(spec).eval()
    task, images, targets = batch(spec, 6)
    engine = PatientGradients(network, task, 0.5, capped_loss(4.0))
    absent = engine.sum(images, targets, np.array([0, 1, 2, 3, 4, -1]))
    images[5].view(-1)[:40] = value
    assert np.array_equal(engine.sum(images, targets, ONE_PATIENT_EACH), absent)
    assert np.isfinite(absent).all()
    assert np.abs(absent).max() > 0


def test_N4_one_bad_image_takes_its_patient_and_no_other(engine: PatientGradients) -> None:
    _, images, targets = batch(SPEC, 6)
    images[2, 0, 0, 0] = float("nan")
    total = engine.sum(images, targets, np.array([0, 1, 0, 1, 2, 2]))
    np.testing.assert_allclose(total, engine.sum(images, targets, np.array([-1, 1, -1, 1, 2, 2])), atol=NEAR)


@pytest.mark.parametrize("count", [1, 4, 16])
def test_many_images_weigh_no_more_than_one(engine: PatientGradients, count: int) -> None:
    _, images, targets = batch(SPEC, count)
    total = engine.sum(100 * images, targets, np.full(count, 7))
    assert 0.25 <= np.linalg.norm(total) <= 0.5
    same = images[:1].expand(count, -1, -1, -1)
    repeated = engine.sum(same, targets[:1].expand(count), np.full(count, 7))
    np.testing.assert_allclose(repeated, engine.sum(images[:1], targets[:1], np.array([7])), atol=NEAR)


def test_augmentations_are_averaged_before_the_norm_is_taken() -> None:
    """Two images with opposite gradients cancel; clipped one by one they would not be this short."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3, bias=False)).double()
    nn.init.zeros_(network[1].weight)
    task, images, _ = batch(SPEC, 1, dtype=torch.float64)
    pair, engine = torch.cat([images, -0.9 * images]), PatientGradients(network, task, 0.01)
    total = engine.sum(pair, torch.zeros(2, dtype=torch.int64), np.array([0, 0]))
    mean = sum(vectors(network, task, pair, torch.zeros(2, dtype=torch.int64), np.array([0, 1])).values()) / 2
    np.testing.assert_allclose(total, clipped(mean, 0.01), atol=1e-12)


@pytest.mark.parametrize("images", [0, 3])
def test_no_patient_gives_zeros(engine: PatientGradients, images: int) -> None:
    _, shown, targets = batch(SPEC, images)
    total = engine.sum(shown, targets, np.full(images, -1))
    assert total.dtype == np.float64
    assert np.array_equal(total, np.zeros(engine.size))


def test_N6_extra_numbers_are_clipped_with_the_gradient_as_one_vector() -> None:
    network, (task, images, targets) = Every().double(), batch(SPEC, 3, dtype=torch.float64)
    owner = np.array([0, 1, 1])
    losses = task.losses(network(images), targets).detach().numpy()
    means = {0: losses[0], 1: losses[1:].mean()}
    cap = float(np.mean(list(means.values())))
    found = {
        p: np.append(v, 2.0 * min(means[p], cap)) for p, v in vectors(network, task, images, targets, owner).items()
    }
    for clip_norm in (0.1, 1000.0):
        engine = PatientGradients(network, task, clip_norm, capped_loss(cap, 2.0))
        total = engine.sum(images, targets, owner)
        assert engine.size == len(total) == engine.layout.count + 1
        np.testing.assert_allclose(total, sum(clipped(v, clip_norm) for v in found.values()), atol=1e-12)


def test_extra_numbers_see_one_patient_only_and_are_as_many_as_said() -> None:
    task, images, targets = batch(SPEC, 2)
    with pytest.raises(ValueError, match="2 extra numbers were promised"):
        PatientGradients(Every(), task, 1.0, Extra(2, lambda loss: loss.reshape(1))).sum(
            images, targets, np.array([0, 1])
        )
    seen: list[Any] = []
    count = Extra(1, lambda loss: seen.append(loss.shape) or torch.ones(1))
    total = PatientGradients(Every(), task, 1e6, count).sum(images, targets, np.array([0, 1]))
    assert seen == [()]
    assert total[-1] == 2.0


def test_the_network_is_left_as_it_was() -> None:
    network = networks.build(spec_of("resnet-small", [8, 8], transfer={"train": "head"})).train()
    task, images, targets = batch(SPEC, 2)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    asked = {name: value.requires_grad for name, value in network.named_parameters()}
    engine = PatientGradients(network, task, 1.0)
    engine.sum(images, targets, np.array([0, 1]))
    with pytest.raises(IndexError):
        engine.sum(images, targets + 5, np.array([0, 1]))
    assert {name: value.requires_grad for name, value in network.named_parameters()} == asked
    assert all(value.grad is None for value in network.parameters())
    assert not any(part._forward_hooks for part in network.modules())
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert network.training


def test_half_precision_in_the_network_does_not_loosen_the_bound() -> None:
    class Half(Every):
        def forward(self, x: Tensor) -> Tensor:
            """As on a GPU: convolutions in bfloat16."""
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    task, images, targets = batch(SPEC, 4)
    owner, half, whole = np.array([0, 1, 1, -1]), Half(), Every()
    total = PatientGradients(half, task, 1e6).sum(images, targets, owner)
    expected = PatientGradients(whole, task, 1e6).sum(images, targets, owner)
    assert np.linalg.norm(total - expected) <= 0.05 * np.linalg.norm(expected)
    for patient in (0, 1):
        alone = PatientGradients(half, task, 0.01).sum(images, targets, np.where(owner == patient, 0, -1))
        assert np.linalg.norm(alone) == pytest.approx(0.01 * (1 - SLACK), rel=1e-5)


@pytest.mark.parametrize("section", [{}, STANDARDISED])
def test_the_bound_holds_in_float32_for_every_patient_of_a_large_network(section: dict[str, Any]) -> None:
    spec = spec_of("resnet10", [32, 32], network=section)
    network = networks.build(spec)
    task, images, targets = batch(spec, 4)
    engine = PatientGradients(network, task, 1.0)
    for patient in range(4):
        alone = engine.sum(images, targets, np.where(np.arange(4) == patient, 0, -1))
        assert np.linalg.norm(alone) == pytest.approx(1 - SLACK, rel=SLACK / 50)


def test_a_patient_whose_gradient_is_the_rest_of_a_large_cancellation_is_clipped_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of a million and a little, half of which count against the other half: float32 cannot add that up."""

    class Against(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 3).requires_grad_(False)
            self.signs = torch.tensor([[1.0], [-1.0]] * 4)

        def forward(self, x: Tensor) -> Tensor:
            """[n, 1, 8, 8] -> [n, 3]."""
            return self.head(torch.tanh((self.rows(x[:, 0]) * self.signs).sum(1)))

    monkeypatch.setattr(gradients, "_WRITE", 1e9)
    torch.manual_seed(5)
    network = Against()
    task, images, targets = batch(SPEC, 8)
    images = 1e6 + images

    def worst() -> float:
        engine = PatientGradients(network, task, 1e-3)
        alone = [engine.sum(images, targets, np.where(np.arange(8) == patient, 0, -1)) for patient in range(8)]
        return max(float(np.linalg.norm(vector)) for vector in alone)

    assert 0 < worst() <= 1e-3
    monkeypatch.setattr(gradients, "CANCELLED", float("inf"))
    assert worst() > 1e-3, "without that, rounding breaks the bound"


def test_what_is_called_with_other_rows_than_images_is_refused() -> None:
    class Coils(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each, self.head = nn.Conv2d(1, 2, 3), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            """Two halves of an image as two images."""
            halves = self.each(torch.cat(x.chunk(2, 2)))
            return self.head(halves.mean((2, 3)).reshape(2, len(x), -1).mean(0))

    task, images, targets = batch(SPEC, 2)
    with pytest.raises(ConsiliumError, match=r"one row for each image: module 'each'"):
        PatientGradients(Coils(), task, 1.0).sum(images, targets, np.array([0, 1]))


def test_what_writes_over_an_input_that_was_recorded_is_refused() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            """Adds in place to what the second layer has read."""
            x = self.one(x.flatten(1)) * 1.0
            y = self.two(x)
            x += 1.0
            return y

    task, images, targets = batch(SPEC, 2)
    with pytest.raises(ConsiliumError, match=r"written over after the layer had read it: module 'two'"):
        PatientGradients(Residual(), task, 1.0).sum(images, targets, np.array([0, 1]))


def test_a_task_that_mixes_images_into_one_number_is_refused() -> None:
    class Mixed:
        def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
            """One term for all."""
            return outputs.mean()

    _, images, targets = batch(SPEC, 2)
    mixed: Any = Mixed()
    with pytest.raises(ConsiliumError, match="one term of the loss for each image"):
        PatientGradients(Every(), mixed, 1.0).sum(images, targets, np.array([0, 1]))


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clip_norm_is_a_positive_number(clip_norm: float) -> None:
    with pytest.raises(ConsiliumError, match="clip norm"):
        PatientGradients(Every(), tasks.get(SPEC), clip_norm)


@pytest.mark.parametrize("owner", [np.array([0, -2]), np.array([0.0, 1.0]), np.array([[0], [1]]), np.array([0])])
def test_an_owner_of_another_form_is_refused(engine: PatientGradients, owner: Any) -> None:
    _, images, targets = batch(SPEC, 2)
    with pytest.raises(ValueError, match="owner"):
        engine.sum(images, targets, owner)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="this machine has no GPU: bfloat16 on CUDA is NOT tested here"
)
def test_on_a_gpu_the_sum_is_that_of_the_processor_within_bfloat16() -> None:
    spec = spec_of("unet", [32, 32])
    network = networks.build(spec).eval()
    task, images, targets = batch(spec, 5)
    owner = np.array([1, 0, -1, 1, 2])
    expected = PatientGradients(network, task, 0.1).sum(images, targets, owner)
    network = network.cuda()
    engine = PatientGradients(network, task, 0.1)
    total = engine.sum(images.cuda(), targets.cuda(), owner)
    assert np.linalg.norm(total - expected) <= 0.05 * np.linalg.norm(expected)
    for patient in range(3):
        alone = engine.sum(images.cuda(), targets.cuda(), np.where(owner == patient, 0, -1))
        assert np.linalg.norm(alone) <= 0.1


def test_the_tests_reach_every_network() -> None:
    names = {Path(param.id or "").name.rsplit("-", 1)[0] for param in SMALLEST}
    assert names == set(networks.NETWORKS)
