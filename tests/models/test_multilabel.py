"""Findings are judged each for itself; an answer that nobody knows costs nothing and is counted nowhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from models import statistics
from models.tasks.multilabel import MultiLabel

TASK = MultiLabel(("effusion", "nodule"), 4)


@st.composite
def answers(draw: st.DrawFn, least: int = 0) -> Any:
    count = draw(st.integers(least, 20))
    scores = draw(nps.arrays(np.float32, (count, 2), elements=st.floats(-20, 20, width=32)))
    targets = draw(nps.arrays(np.float32, (count, 2), elements=st.sampled_from([0.0, 1.0, np.nan])))
    return scores, targets, np.full(count, 0.5)


def test_figures_worked_by_hand() -> None:
    scores = np.array([[2.0, -1.0], [1.0, 1.0], [-1.0, -2.0], [-2.0, 3.0]])
    targets = np.array([[1, 0], [0, 1], [1, np.nan], [0, 1]], np.float32)
    found = TASK.metrics(TASK.statistics(scores, targets, np.ones(4)))
    assert found["images"] == 4
    assert found["exact_match"] == pytest.approx(2 / 4), "the second and the third have a wrong effusion"
    assert (found["sensitivity:effusion"], found["specificity:effusion"]) == (0.5, 0.5)
    assert (found["sensitivity:nodule"], found["specificity:nodule"]) == (1, 1)
    assert found["balanced_accuracy"] == pytest.approx(0.75)
    assert found["f1"] == pytest.approx((0.5 + 1) / 2)
    assert found["auroc:effusion"] == pytest.approx(3 / 4)
    assert found["auroc"] == pytest.approx((0.75 + 1) / 2)


@given(answers(), answers())
def test_the_sums_of_two_sites_are_those_of_their_union(first: Any, second: Any) -> None:
    union = [np.concatenate(pair) for pair in zip(first, second, strict=True)]
    np.testing.assert_allclose(
        TASK.statistics(*first) + TASK.statistics(*second), TASK.statistics(*union), rtol=1e-9, atol=1e-12
    )


@given(answers())
def test_figures_are_finite_and_each_is_there_or_explained(answer: Any) -> None:
    vector = TASK.statistics(*answer)
    found, missing, bounds = TASK.metrics(vector), TASK.missing(vector), TASK.intervals(vector)
    means = {"loss", "exact_match", "auroc", "auroc_error", "calibration_error", "balanced_accuracy", "f1"}
    own = {f"{figure}:{name}" for figure in ("auroc", "sensitivity", "specificity") for name in TASK.classes}
    assert found.keys() | missing.keys() == {"images", "invalid"} | means | own
    assert not found.keys() & missing.keys()
    assert all(np.isfinite(value) for value in found.values())
    assert all(
        0 <= low <= found[name] + 1e-9 and found[name] - 1e-9 <= high <= 1 for name, (low, high) in bounds.items()
    )
    assert vector.shape == (TASK.size,)
    assert vector[0] == len(answer[0])


@given(answers(least=1))
def test_what_nobody_knows_changes_nothing(answer: Any) -> None:
    scores, targets, losses = answer
    other = scores.copy()
    other[np.isnan(targets)] *= -1
    np.testing.assert_array_equal(TASK.statistics(scores, targets, losses), TASK.statistics(other, targets, losses))
    outputs = torch.tensor(scores, requires_grad=True)
    terms = TASK.losses(outputs, torch.from_numpy(targets))
    terms.sum().backward()
    assert outputs.grad is not None
    assert not outputs.grad[torch.isnan(torch.from_numpy(targets))].any()
    assert torch.isfinite(terms).all()


def test_the_loss_is_binary_cross_entropy_over_all_findings_and_the_studys_batch() -> None:
    outputs, truth = torch.randn(3, 2), torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, float("nan")]])
    terms = TASK.losses(outputs, truth)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(outputs[:2], truth[:2], reduction="none").mean(1)
    torch.testing.assert_close(terms[:2], expected)
    half = torch.nn.functional.binary_cross_entropy_with_logits(outputs[2, :1], truth[2, :1]) / 2
    torch.testing.assert_close(terms[2], half)
    torch.testing.assert_close(TASK.loss(outputs, truth), terms.sum() / 4)


@pytest.mark.parametrize("bad", [0.5, 2.0, -1.0, np.inf])
def test_other_answers_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="neither 0 nor 1 nor NaN"):
        TASK.statistics(np.zeros((1, 2)), np.array([[0, bad]]), np.zeros(1))
    with pytest.raises(ValueError, match="belong together"):
        TASK.statistics(np.zeros((1, 2)), np.zeros((1, 3)), np.zeros(1))


@pytest.mark.parametrize("count", [1, 5, 14, 40])
def test_many_findings_stay_a_few_thousand_numbers(count: int) -> None:
    task = MultiLabel(tuple(f"finding {n}" for n in range(count)), 4)
    assert task.size <= 4 + 2 * statistics.BINS * 2 + count * (4 + 3 * statistics.GROUPS)
