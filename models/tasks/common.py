"""What do the tasks share? Reading a vector of sums by name, the sums of one finding, and means that may be unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import intervals, statistics
from models.fields import Problem
from models.intervals import Interval
from models.statistics import BINS, GROUPS, Floats

NO_IMAGE = "no image was scored"
NOISED_BINS = 32
LEADING: list[tuple[str, int]] = [("examples", 1), ("invalid", 1), ("loss", 1)]
"""How every layout begins: images of the side, those without a finite score, sum of the other images' terms."""


def parts(layout: Sequence[tuple[str, int]], vector: NDArray[Any]) -> dict[str, Floats]:
    """A vector of sums by the names of its layout.

    Raises:
        ValueError: it has another size, or holds a number that is not finite.
    """
    values = np.asarray(vector, np.float64)
    size = sum(count for _, count in layout)
    if values.shape != (size,):
        raise ValueError(f"a statistics vector of this task has {size} numbers, not {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("a statistics vector holds a number that is not finite")
    stops = np.cumsum([count for _, count in layout])
    return {name: values[stop - count : stop] for (name, count), stop in zip(layout, stops, strict=True)}


def vector(pieces: Sequence[Any]) -> Floats:
    """The pieces one behind the other, float64."""
    return np.concatenate([np.asarray(piece, np.float64).ravel() for piece in pieces])


def keep(found: dict[str, float], missing: dict[str, str], name: str, values: Sequence[float | None], why: str) -> None:
    """Note the mean of some values, or the reason why it cannot be known."""
    known = [value for value in values if value is not None]
    if values and len(known) == len(values):
        found[name] = float(np.mean(known))
    else:
        missing[name] = why


def bins_for(findings: int, *, noised: bool = False) -> int:
    """Bins of each histogram, so that all together stay at a few thousand numbers up to 40 findings.

    With noise on every bin carries its own, and few bins are read more exactly than many.
    """
    if noised:
        return NOISED_BINS
    return BINS if findings == 1 else max(50, 2 * BINS // findings)


def noised(spec: Mapping[str, Any]) -> bool:
    """Whether a specification asks for noise."""
    return str(spec.get("privacy", {}).get("mode", "none")) != "none"


def finding_layout(name: str, bins: int) -> list[tuple[str, int]]:
    """The sums of one finding: two histograms of its margin, and the groups of its calibration."""
    return [(f"{name}:with", bins), (f"{name}:without", bins), (f"{name}:groups", 3 * GROUPS)]


def finding_sums(margin: NDArray[Any], truth: NDArray[Any], bins: int) -> list[Floats]:
    """Those sums, from margins [n] and bool [n]."""
    return [
        statistics.histogram(margin[truth], bins),
        statistics.histogram(margin[~truth], bins),
        statistics.calibration_sums(margin, truth),
    ]


def keep_findings(
    found: dict[str, float], missing: dict[str, str], parts: Mapping[str, Floats], names: Sequence[str], why: str
) -> None:
    """Note AUROC, its bound and the calibration error, each as the mean over findings, or why they cannot be known."""
    areas = [statistics.auroc(parts[f"{name}:with"], parts[f"{name}:without"]) for name in names]
    for position, figure in enumerate(("auroc", "auroc_error")):
        keep(found, missing, figure, [None if area is None else area[position] for area in areas], why)
    keep(found, missing, "calibration_error", [statistics.calibration_error(parts[f"{n}:groups"]) for n in names], why)


def auroc_interval(parts: Mapping[str, Floats], names: Sequence[str], value: float) -> Interval | None:
    """The interval of the mean AUROC of some findings."""
    if len(names) == 1:
        return intervals.auroc(parts[f"{names[0]}:with"], parts[f"{names[0]}:without"])
    errors = [intervals.auroc_error(parts[f"{name}:with"], parts[f"{name}:without"]) for name in names]
    return intervals.around(value, errors, high=1.0)


def finding_curves(parts: Mapping[str, Floats], names: Sequence[str]) -> dict[str, Any]:
    """What `models.plots` draws of findings: {"roc": {name: ...}, "calibration": {name: ...}}, the known ones."""
    roc = {name: curve for name in names if (curve := _curve(parts, name)) is not None}
    calibration: dict[str, Any] = {}
    for name in names:
        error = statistics.calibration_error(parts[f"{name}:groups"])
        if error is not None:
            calibration[name] = {**statistics.calibration(parts[f"{name}:groups"]), "error": error}
    return {"roc": roc, "calibration": calibration}


def _curve(parts: Mapping[str, Floats], name: str) -> dict[str, Any] | None:
    positive, negative = parts[f"{name}:with"], parts[f"{name}:without"]
    points, area = statistics.roc(positive, negative), statistics.auroc(positive, negative)
    if points is None or area is None:
        return None
    interval = intervals.auroc(positive, negative)
    return {"false_alarms": points[0], "hits": points[1], "auroc": area[0], "interval": interval}


def class_names(section: Mapping[str, Any], least: int, most: int, example: str) -> list[Problem]:
    """What is wrong with task.classes."""
    classes, where = section.get("classes"), "task.classes"
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) and name for name in classes):
        return [Problem(where, "a list of names is expected", example)]
    if len(classes) < least:
        plural = "class" if len(classes) == 1 else "classes"
        return [Problem(where, f"{len(classes)} {plural} cannot be told apart from anything", example)]
    if len(classes) > most:
        return [Problem(where, f"{len(classes)} classes are too many", f"Write at most {most}.")]
    twice = sorted({name for name in classes if list(classes).count(name) > 1})
    if twice:
        return [Problem(where, f"{', '.join(twice)} stands there twice", "Name every class once.")]
    return []
