"""Dice and HD95 of one image, their sums over sites, what empty masks mean, and a loss of one image at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from models import additive, tasks
from models.tasks import surfaces
from models.tasks.segmentation import DICE_BINS, Segmentation

TASK = Segmentation(("background", "tumour", "oedema"), 4)


def scores_of(labels: Any, classes: int = 3) -> Any:
    """Raw scores whose largest is at the label."""
    return np.moveaxis(10 * np.eye(classes, dtype=np.float32)[np.asarray(labels, int)], -1, 1)


def sums(found: Any, truth: Any, spacing: Any = None, task: Segmentation = TASK) -> Any:
    truth = np.asarray(truth, np.uint8)
    return task.statistics(scores_of(found, len(task.classes)), truth, np.full(len(truth), 0.5), spacing)


def label_maps(dims: int, count: int) -> Any:
    return nps.arrays(np.uint8, (2, count, *[7] * dims), elements=st.integers(0, 2))


@given(st.integers(2, 3).flatmap(lambda dims: nps.arrays(np.bool_, (2, *[8] * dims))), st.data())
def test_hd95_is_monais(pair: Any, data: Any) -> None:
    from monai.metrics import compute_hausdorff_distance

    found, truth = pair
    found.flat[data.draw(st.integers(0, found.size - 1))] = True
    truth.flat[data.draw(st.integers(0, truth.size - 1))] = True
    spacing = np.array(data.draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=found.ndim, max_size=found.ndim)))
    ours = surfaces.hd95(found, truth, spacing)
    hot = [torch.from_numpy(mask)[None, None].float() for mask in (found, truth)]
    theirs = compute_hausdorff_distance(*hot, include_background=True, percentile=95, spacing=spacing.tolist())
    assert ours == pytest.approx(float(theirs), rel=1e-3, abs=1e-3), "which interpolates in float32"
    assert ours == surfaces.hd95(truth, found, spacing), "it has no direction"
    assert ours <= np.linalg.norm(np.array(found.shape) * spacing)


def test_two_squares_worked_by_hand() -> None:
    """A square of 4 x 4, and the same 2 px to the right of it: 8 px in common, and surfaces 2 px = 1 mm apart."""
    truth, found = np.zeros((1, 12, 12)), np.zeros((1, 12, 12))
    truth[0, 4:8, 2:6], found[0, 4:8, 4:8] = 1, 1
    values = TASK.metrics(sums(found, truth, [[3.0, 0.5]]))
    assert values["dice:tumour"] == pytest.approx(2 * 8 / 32)
    assert values["hd95:tumour"] == pytest.approx(1.0)
    assert (values["missed:tumour"], values["invented:tumour"], values["loss"]) == (0, 0, 0.5)


def test_the_empty_masks_rule() -> None:
    """Both empty: counted apart. One empty: Dice 0, HD95 not counted, or the diagonal, sqrt((8 * 2)^2 + (6 * 1)^2)."""
    full, empty = np.zeros((8, 6)), np.zeros((8, 6))
    full[2:5, 2:5] = 1
    found = np.stack([full, empty, full, empty])
    truth = np.stack([full, full, empty, empty])
    values = TASK.metrics(sums(found, truth, np.tile([2.0, 1.0], (4, 1))))
    diagonal = np.hypot(16, 6)
    assert values["images"] == 4
    assert values["dice:tumour"] == pytest.approx(1 / 3)
    assert values["hd95:tumour"] == 0
    assert values["hd95_all:tumour"] == pytest.approx(2 * diagonal / 3)
    assert (values["missed:tumour"], values["invented:tumour"]) == (1, 1)
    assert "dice:oedema" not in values
    why = TASK.missing(sums(found, truth))
    assert why["dice:oedema"] == why["dice"] == "no image shows oedema, and none was marked"


@given(label_maps(2, 3), label_maps(2, 2))
def test_the_sums_of_two_sites_are_those_of_their_union(first: Any, second: Any) -> None:
    apart = sums(*first) + sums(*second)
    together = sums(*np.concatenate([first, second], axis=1))
    np.testing.assert_allclose(apart, together, rtol=1e-12)
    np.testing.assert_allclose(sums(*first[:, ::-1]), sums(*first), rtol=1e-12)


@given(label_maps(3, 3))
def test_figures_are_the_means_of_single_images(maps: Any) -> None:
    values, whole = TASK.metrics(sums(*maps)), []
    for found, truth in zip(*maps, strict=True):
        alone = TASK.metrics(sums(found[None], truth[None]))
        if "dice:tumour" in alone:
            whole.append((alone["dice:tumour"], alone["hd95_all:tumour"]))
            tumour = found == 1, truth == 1
            assert alone["dice:tumour"] == pytest.approx(
                2 * (tumour[0] & tumour[1]).sum() / (tumour[0].sum() + tumour[1].sum())
            )
    if whole:
        assert (values["dice:tumour"], values["hd95_all:tumour"]) == pytest.approx(tuple(np.mean(whole, axis=0)))


@given(label_maps(2, 4))
def test_figures_are_finite_and_each_is_there_or_explained(maps: Any) -> None:
    vector = sums(*maps)
    found, missing, bounds = TASK.metrics(vector), TASK.missing(vector), TASK.intervals(vector)
    names = {f"{figure}{about}" for figure in ("dice", "hd95", "hd95_all") for about in ("", ":tumour", ":oedema")}
    counts = {f"{what}:{name}" for what in ("missed", "invented") for name in ("tumour", "oedema")}
    assert found.keys() | missing.keys() == {"images", "invalid", "loss"} | names | counts
    assert not found.keys() & missing.keys()
    assert all(np.isfinite(value) for value in found.values())
    assert bounds.keys() <= found.keys()
    for name, (low, high) in bounds.items():
        assert low <= found[name] <= high
    assert vector.shape == (TASK.size,) == (3 + 2 * (10 + DICE_BINS),)


def test_the_interval_of_a_mean_is_the_textbooks() -> None:
    generator = np.random.default_rng(2)
    found, truth = (generator.random((2, 40, 12, 12)) < 0.4).astype(np.uint8)
    vector = sums(found, truth)
    each = [TASK.metrics(sums(f[None], t[None]))["dice:tumour"] for f, t in zip(found, truth, strict=True)]
    half = 1.96 * np.std(each, ddof=1) / np.sqrt(40)
    wire = np.empty(additive.size(TASK), np.float32)
    additive.fill(wire, vector)
    for sent in (vector, additive.task_sums(wire)):
        low, high = TASK.intervals(sent)["dice:tumour"]
        assert (low, high) == pytest.approx((np.mean(each) - half, np.mean(each) + half), rel=1e-4)


def test_an_image_without_a_finite_score_is_counted_apart() -> None:
    labels = np.ones((2, 6, 6), np.uint8)
    scores = scores_of(labels)
    scores[1, 0, 0, 0] = np.nan
    vector = TASK.statistics(scores, labels, np.array([0.25, 0.25]))
    assert np.isfinite(vector).all()
    values = TASK.metrics(vector)
    assert (values["images"], values["invalid"], values["loss"], values["dice:tumour"]) == (1, 1, 0.25, 1)
    nothing = TASK.statistics(scores_of(labels)[:0], labels[:0], np.zeros(0))
    assert not nothing.any()
    assert TASK.missing(nothing)["hd95"] == "no image was scored"


@pytest.mark.parametrize(
    ("scores", "truth", "losses"),
    [
        (np.zeros((2, 3, 6, 6)), np.zeros((2, 6, 5)), np.zeros(2)),
        (np.zeros((2, 2, 6, 6)), np.zeros((2, 6, 6)), np.zeros(2)),
        (np.zeros((2, 3, 6, 6)), np.zeros((2, 6, 6)), np.zeros(1)),
        (np.zeros((2, 3, 6, 6)), np.full((2, 6, 6), 3), np.zeros(2)),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(scores: Any, truth: Any, losses: Any) -> None:
    with pytest.raises(ValueError, match=r"belong together|outside 0 to 2"):
        TASK.statistics(scores, truth, losses)


@pytest.mark.parametrize("size", [(8, 8), (4, 6, 8)])
def test_the_loss_is_monais_dice_and_cross_entropy_image_by_image(size: tuple[int, ...]) -> None:
    from monai.losses import DiceCELoss

    outputs, truth = torch.randn(3, 3, *size), torch.randint(0, 3, (3, *size))
    theirs = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, smooth_nr=1.0, smooth_dr=1.0)
    each = torch.stack([theirs(outputs[i : i + 1], truth[i : i + 1, None]) for i in range(3)])
    torch.testing.assert_close(TASK.losses(outputs, truth.to(torch.uint8)), each)
    torch.testing.assert_close(TASK.loss(outputs, truth), each.sum() / 4), "over the study's batch size, not over three"


def test_an_absent_structure_that_is_not_marked_costs_nothing() -> None:
    truth = torch.zeros(1, 8, 8, dtype=torch.uint8)
    sure = torch.from_numpy(scores_of(truth.numpy()) * 10)
    assert float(TASK.losses(sure, truth)) < 1e-4
    marked = sure.clone()
    marked[:, 1, :2] += 200
    assert float(TASK.losses(marked, truth)) > 0.4


def test_targets_and_kinds_are_named(spec_with: Any) -> None:
    for kind, target in (("classification", "class"), ("multilabel", "labels"), ("segmentation", "mask")):
        spec = spec_with(**{"task.kind": kind, "network.name": "unet" if target == "mask" else "resnet-small"})
        assert tasks.get(spec).target == tasks.target(spec["task"]) == target
        assert tasks.get(spec).size < 6000
