"""Intervals hold what they promise: textbook values, and the true value in about 95 of 100 samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from models import intervals, statistics


def test_wilson_as_printed() -> None:
    """Newcombe 1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<857, table I, method 3."""
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
                                   (1, 29, 0.0061, 0.1718)):  # fmt: skip
        assert intervals.wilson(hits, count) == pytest.approx((low, high), abs=1e-4)
    assert intervals.wilson(0, 0) is None


@given(nps.arrays(np.float64, (2, 10), elements=st.integers(0, 4).map(float)))
def test_delong_from_histograms_is_delong_from_images(histograms: np.ndarray) -> None:
    positive, negative = (np.repeat(np.arange(10), counts.astype(int)) for counts in histograms)
    found = intervals.auroc_error(*histograms)
    if len(positive) < 2 or len(negative) < 2:
        assert found is None
        return
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    variance = wins.mean(1).var(ddof=1) / len(positive) + wins.mean(0).var(ddof=1) / len(negative)
    assert found == pytest.approx(np.sqrt(variance), abs=1e-9)


@given(nps.arrays(np.float64, (2, 10), elements=st.integers(0, 6).map(float)))
def test_the_interval_of_an_auroc_holds_it_and_stays_within_bounds(histograms: np.ndarray) -> None:
    area, bounds = statistics.auroc(*histograms), intervals.auroc(*histograms)
    if area is not None and bounds is not None:
        assert 0 <= bounds[0] <= area[0] + 1e-12
        assert area[0] - 1e-12 <= bounds[1] <= 1


def test_a_perfect_order_of_few_images_is_not_certain() -> None:
    positive, negative = np.zeros(10), np.zeros(10)
    positive[9], negative[0] = 8, 50
    bounds = intervals.auroc(positive, negative)
    assert bounds is not None
    assert bounds[0] < 0.7
    assert bounds[1] == 1


def test_the_truth_is_inside_in_about_95_of_100_samples() -> None:
    """Two normal groups one and a half apart have an AUROC of Phi(1.5 / sqrt 2) = 0.8556."""
    generator, truth, inside = np.random.default_rng(3), 0.85556, 0
    for _ in range(400):
        groups = generator.normal(1.5, 1, 60), generator.normal(0, 1, 80)
        bounds = intervals.auroc(*(statistics.histogram(group) for group in groups))
        assert bounds is not None
        inside += bounds[0] <= truth <= bounds[1]
    assert 0.92 <= inside / 400 <= 0.98


def test_calibration_is_told_group_by_group() -> None:
    """Four images predicted at 0.8, of which two have it, and two at 0.3, of which none has: error (4*.3 + 2*.3)/6."""
    margin = np.log(np.array([4, 4, 4, 4, 3 / 7, 3 / 7]))
    sums = statistics.calibration_sums(margin - 1e-9, np.array([1, 1, 0, 0, 0, 0], bool))
    diagram = statistics.calibration(sums)
    np.testing.assert_allclose(diagram["predicted"], [0.3, 0.8], atol=1e-6)
    np.testing.assert_allclose(diagram["observed"], [0.0, 0.5])
    assert diagram["images"].tolist() == [2, 4]
    assert statistics.calibration_error(sums) == pytest.approx(0.3, abs=1e-6)
    assert statistics.calibration_error(np.zeros(30)) is None


@given(nps.arrays(np.float64, st.integers(0, 50), elements=st.floats(-1e6, 1e6)))
def test_calibration_sums_add_up(margin: np.ndarray) -> None:
    truth = np.arange(len(margin)) % 2 == 0
    whole = statistics.calibration_sums(margin, truth)
    half = len(margin) // 2
    parts = [statistics.calibration_sums(margin[s], truth[s]) for s in (slice(half), slice(half, None))]
    np.testing.assert_allclose(parts[0] + parts[1], whole, rtol=1e-12)
    assert whole[: statistics.GROUPS].sum() == len(margin)
