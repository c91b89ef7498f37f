"""Sums of sites give the figures of their union, and a binned AUROC is as exact as it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from models import additive, statistics, tasks
from models.tasks.classification import Classification

SCORE = st.floats(-1e30, 1e30, width=32)


@st.composite
def answers(draw: st.DrawFn, classes: int | None = None, least: int = 0) -> tuple[Any, Any, Any]:
    """Scores [n, K], targets [n] and losses [n] of some images."""
    count = classes or draw(st.integers(2, 4))
    images = draw(st.integers(least, 30))
    near = draw(st.sampled_from([1.0, 30.0, 1e30]))
    scores = draw(nps.arrays(np.float32, (images, count), elements=st.floats(-1, 1, width=32))) * np.float32(near)
    targets = draw(nps.arrays(np.int64, images, elements=st.integers(0, count - 1)))
    losses = draw(nps.arrays(np.float32, images, elements=st.floats(0, 1024, width=32)))
    return scores, targets, losses


def task_of(classes: int, batch_size: int = 8) -> Classification:
    return Classification(tuple(f"class {number}" for number in range(classes)), batch_size)


def exact_auroc(margin: Any, finding: Any) -> float | None:
    """Every pair compared: the definition (Hanley & McNeil 1982)."""
    pairs = margin[finding][:, None] - margin[~finding][None, :]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean()) if pairs.size else None


@given(answers(), st.data())
def test_the_sum_of_two_parts_is_the_whole(answer: Any, data: st.DataObject) -> None:
    scores, targets, losses = answer
    task = task_of(scores.shape[1])
    part = data.draw(nps.arrays(np.bool_, len(targets)))
    parts = [task.statistics(scores[side], targets[side], losses[side]) for side in (part, ~part)]
    whole = task.statistics(scores, targets, losses)
    np.testing.assert_allclose(parts[0] + parts[1], whole, rtol=1e-12)
    assert task.metrics(parts[0] + parts[1]) == pytest.approx(task.metrics(whole), rel=1e-9)
    assert task.missing(parts[0] + parts[1]) == task.missing(whole)


@given(answers(least=2))
def test_the_binned_auroc_is_within_its_bound(answer: Any) -> None:
    scores, targets, _ = answer
    margins = statistics.margins(scores)
    for column in range(scores.shape[1]):
        finding = targets == column
        margin = margins[:, column]
        histograms = statistics.histogram(margin[finding]), statistics.histogram(margin[~finding])
        area, exact = statistics.auroc(*histograms), exact_auroc(margin, finding)
        assert (area is None) == (exact is None)
        if area is not None and exact is not None:
            assert abs(area[0] - exact) <= area[1] + 1e-12
            assert 0 <= area[1] <= 0.5


def test_the_bound_is_reached_when_a_bin_holds_every_score() -> None:
    positive, negative = np.zeros(statistics.BINS), np.zeros(statistics.BINS)
    positive[7], negative[7] = 3, 5
    assert statistics.auroc(positive, negative) == (0.5, 0.5)


def test_a_known_area_and_its_curve() -> None:
    """Five images, worked by hand: of 2 x 3 pairs five are in order, and one shares a bin."""
    positive, negative = np.zeros(statistics.BINS), np.zeros(statistics.BINS)
    positive[[900, 500]] = 1
    negative[[100, 200, 500]] = 1
    assert statistics.auroc(positive, negative) == pytest.approx((5.5 / 6, 0.5 / 6))
    curve = statistics.roc(positive, negative)
    assert curve is not None
    assert np.trapezoid(curve[1], curve[0]) == pytest.approx(5.5 / 6)
    assert (curve[0][0], curve[1][0], curve[0][-1], curve[1][-1]) == (0, 0, 1, 1)


@given(nps.arrays(np.float64, (2, 12), elements=st.integers(0, 5).map(float)))
def test_the_curve_has_the_area_that_is_told(histograms: Any) -> None:
    area, curve = statistics.auroc(*histograms), statistics.roc(*histograms)
    if area is None or curve is None:
        assert area is None
        assert curve is None
        return
    assert (np.diff(curve[0]) >= 0).all()
    assert (np.diff(curve[1]) >= 0).all()
    assert np.trapezoid(curve[1], curve[0]) == pytest.approx(area[0], abs=1e-12)


@given(nps.arrays(np.float64, st.integers(0, 200), elements=st.floats(allow_nan=False)))
def test_every_margin_is_in_one_bin_and_bins_keep_their_order(margin: Any) -> None:
    counts = statistics.histogram(margin)
    assert counts.sum() == len(margin)
    for low, high in zip(np.sort(margin), np.sort(margin)[1:], strict=False):
        first, second = (int(statistics.histogram(np.array([value])).argmax()) for value in (low, high))
        assert first <= second


def test_margins_are_the_logits_of_the_softmax() -> None:
    scores = np.random.default_rng(0).normal(size=(50, 3)) * 3
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(statistics.margins(scores), np.log(shares / (1 - shares)), rtol=1e-9)
    assert statistics.edges()[0] < 4e-6
    assert (np.diff(statistics.edges()) > 0).all()


@given(answers(least=1))
def test_metrics_agree_with_their_definitions(answer: Any) -> None:
    scores, targets, losses = answer
    classes = scores.shape[1]
    task = task_of(classes)
    found = task.metrics(task.statistics(scores, targets, losses))
    predicted = scores.argmax(axis=1)
    assert found["images"] == len(targets)
    assert found["loss"] == pytest.approx(losses.astype(np.float64).mean())
    assert found["accuracy"] == pytest.approx((predicted == targets).mean())
    if len(set(targets)) == classes:
        recalls = [(predicted[targets == k] == k).mean() for k in range(classes)]
        assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
        if classes == 2:
            assert (found["specificity"], found["sensitivity"]) == pytest.approx(tuple(recalls))
            hits = ((predicted == 1) & (targets == 1)).sum()
            assert found["f1"] == pytest.approx(2 * hits / ((predicted == 1).sum() + (targets == 1).sum()))
    else:
        assert "auroc" not in found
        assert "no image of class" in task.missing(task.statistics(scores, targets, losses))["auroc"]


@given(answers())
def test_figures_are_finite_and_each_is_there_or_explained(answer: Any) -> None:
    scores, targets, losses = answer
    task = task_of(scores.shape[1])
    sums = task.statistics(scores, targets, losses)
    found, missing = task.metrics(sums), task.missing(sums)
    expected = {"images", "invalid", "loss", "accuracy", "balanced_accuracy", "f1", "auroc", "auroc_error"} | {
        "calibration_error"
    }
    if scores.shape[1] == 2:
        expected |= {"sensitivity", "specificity"}
    assert all(np.isfinite(value) for value in found.values())
    assert set(found) | set(missing) == expected
    assert not set(found) & set(missing)


def test_no_image_gives_zeros_and_reasons() -> None:
    task = task_of(2)
    sums = task.statistics(np.empty((0, 2)), np.empty(0), np.empty(0))
    assert sums.shape == (task.size,)
    assert not sums.any()
    assert task.metrics(sums) == {"images": 0, "invalid": 0}
    assert task.missing(sums)["auroc"] == "no image was scored"
    assert task.curves(sums)["roc"] == {}


def test_an_image_without_a_finite_score_is_counted_apart() -> None:
    task = task_of(2)
    scores = np.array([[0.0, 1.0], [np.nan, 1.0], [np.inf, 0.0], [2.0, 0.0]])
    sums = task.statistics(scores, np.array([1, 1, 0, 0]), np.array([1.0, 1.0, 1.0, np.nan]))
    assert np.isfinite(sums).all()
    found = task.metrics(sums)
    assert (found["images"], found["invalid"], found["loss"]) == (1, 3, 1)
    assert sums[0] == 4


@pytest.mark.parametrize(
    ("scores", "targets", "losses"),
    [
        (np.zeros((2, 3)), [0, 1], [0.0, 0.0]),
        (np.zeros((2, 2)), [0], [0.0]),
        (np.zeros((2, 2)), [0, 1], [0.0]),
        (np.zeros((2, 2)), [0, 2], [0.0, 0.0]),
        (np.zeros((2, 2)), [0, -1], [0.0, 0.0]),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(scores: Any, targets: Any, losses: Any) -> None:
    with pytest.raises(ValueError, match=r"belong together|outside 0 to 1"):
        task_of(2).statistics(scores, np.array(targets), np.array(losses))


@pytest.mark.parametrize("bad", [np.zeros(5), np.full(task_of(2).size, np.nan), np.full(task_of(2).size, np.inf)])
def test_a_vector_that_is_no_statistics_is_refused(bad: Any) -> None:
    for read in (task_of(2).metrics, task_of(2).missing, task_of(2).curves):
        with pytest.raises(ValueError, match=r"has 2037 numbers|not finite"):
            read(bad)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_layout_is_the_vector(classes: int) -> None:
    task = task_of(classes)
    pairs = 1 if classes == 2 else classes
    assert task.layout[0] == ("examples", 1)
    bins = statistics.BINS if classes == 2 else 2 * statistics.BINS // classes
    assert task.size == 3 + classes**2 + pairs * (2 * bins + 3 * statistics.GROUPS)
    assert task.statistics(np.zeros((1, classes)), np.zeros(1), np.zeros(1)).shape == (task.size,)


@given(answers(classes=2, least=1))
def test_a_vector_survives_the_wire(answer: Any) -> None:
    task = task_of(2)
    sums = task.statistics(*answer)
    wire = np.empty(additive.size(task), np.float32)
    additive.fill(wire, sums, train_examples=7, train_loss_sum=0.5, train_steps=3)
    assert additive.leading(wire) == {"train_examples": 7, "train_loss_sum": 0.5, "train_steps": 3}
    assert task.metrics(additive.task_sums(wire)) == pytest.approx(task.metrics(sums), rel=1e-6, abs=1e-6)
    assert sum(size for _, size in additive.layout(task)) == len(wire)


def test_the_loss_divides_by_the_batch_size_of_the_study_also_when_a_batch_is_short(spec_with: Any) -> None:
    task = tasks.get(spec_with(**{"optimiser.batch_size": 8}))
    outputs, targets = torch.randn(3, 2), torch.tensor([0, 1, 1])
    torch.testing.assert_close(task.loss(outputs, targets), task.losses(outputs, targets).sum() / 8)
    full = torch.randn(8, 2), torch.randint(0, 2, (8,))
    torch.testing.assert_close(task.loss(*full), torch.nn.functional.cross_entropy(*full))


@given(nps.arrays(np.float32, (6, 3), elements=st.floats(-30, 30, width=32)), st.permutations(range(6)))
def test_the_term_of_an_image_depends_on_that_image_alone(scores: Any, order: list[int]) -> None:
    task = task_of(3)
    targets = torch.arange(6) % 3
    together = task.losses(torch.from_numpy(scores), targets)
    moved = task.losses(torch.from_numpy(scores)[list(order)], targets[list(order)])
    assert together[list(order)].tolist() == moved.tolist()
    assert together[:1].tolist() == task.losses(torch.from_numpy(scores)[:1], targets[:1]).tolist()


def test_a_task_that_does_not_exist_is_refused(spec_with: Any) -> None:
    with pytest.raises(ValueError, match="Did you mean classification"):
        tasks.get(spec_with(**{"task.kind": "classificatio"}))
