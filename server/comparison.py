"""How do several models compare, in figures? One table of (model, whose test images) with files beside it.

A folder gets `comparison.csv`, `comparison.json` and `comparison.png`. Figures of hospitals together are figures of
their summed statistics, never means of means.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from models.statistics import NAMES
from privacy.files import replacing, write_atomically
from privacy.terminal import table

ALL = "all hospitals"
SHOWN = 4


@dataclass(frozen=True)
class Row:
    """The figures of one model on one set of test images."""

    model: str
    images_of: str
    metrics: Mapping[str, float]


def write(folder: Path, rows: Sequence[Row], primary: str, facts: Mapping[str, Any]) -> None:
    """Write the three files; `facts` say in the JSON what was run."""
    from models import plots  # matplotlib: heavy, and needed at the very end only

    folder.mkdir(parents=True, exist_ok=True)
    body = {**facts, "primary": primary, "results": [_record(row) for row in rows]}
    text = json.dumps(body, indent=1, sort_keys=True) + "\n"
    write_atomically(folder / "comparison.json", text.encode(), 0o644)
    write_atomically(folder / "comparison.csv", _csv(rows).encode(), 0o644)
    dots: dict[str, dict[str, float]] = {}
    for row in rows:
        if primary in row.metrics:
            dots.setdefault(row.images_of, {})[row.model] = row.metrics[primary]
    with replacing(folder / "comparison.png") as part:
        plots.comparison(dots, part, primary)


def shown(rows: Sequence[Row], primary: str) -> Table:
    """The same for a terminal: the study's own metric first, then a few more."""
    others = [name for name in NAMES if name != primary and any(name in row.metrics for row in rows)]
    columns = [primary, *others[: SHOWN - 1]]
    lines = [
        (row.model, row.images_of, f"{row.metrics.get('images', 0):.0f}", *(_number(row.metrics, c) for c in columns))
        for row in rows
    ]
    return table("model", "test images of", "images", *(NAMES.get(c, c) for c in columns), rows=lines)


def _number(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.3f}" if name in metrics else "not known"


def _record(row: Row) -> dict[str, Any]:
    return {"model": row.model, "images_of": row.images_of, "metrics": dict(row.metrics)}


def _csv(rows: Sequence[Row]) -> str:
    names = sorted({name for row in rows for name in row.metrics})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "test_images_of", *names])
    for row in rows:
        writer.writerow([row.model, row.images_of, *(row.metrics.get(name, "") for name in names)])
    return text.getvalue()
