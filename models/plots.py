"""How does a study look? Pictures of its rounds and of what its model got right and wrong, as PNG files.

Drawn off screen with matplotlib's Agg canvas, without pyplot, so that nothing is kept between calls and no display is
needed. The colours are told apart by people with any kind of colour vision (Okabe & Ito 2008) and the lines by shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from models.statistics import title

BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE)
INK, FAINT = "#222222", "#D8D8D8"
MARKERS = ("o", "s", "^", "D", "v", "P")
_STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def drawings(curves: Mapping[str, Any]) -> dict[str, Callable[[Mapping[str, Any], Path], None]]:
    """File names and what draws them, for what `Task.curves` gave."""
    known = {"roc": roc, "calibration": reliability, "confusion": confusion, "dice": dice}
    files = {"calibration": "reliability.png"}
    return {files.get(name, f"{name}.png"): draw for name, draw in known.items() if name in curves}


def curves(history: Sequence[Mapping[str, Any]], path: Path, metric: str = "auroc", *, narrow: bool = False) -> None:
    """Loss and one metric over the rounds, side by side.

    Args:
        history: one entry per round: {"round": int, "<part>": {metric: value}, ...}; the parts, such as "train" and
            "validation", become lines. A part or a metric that is missing in a round leaves a gap.
        path: the PNG file to write.
        metric: what stands beside the loss.
        narrow: one above the other, for a telephone's width.
    """
    parts = [key for key in dict.fromkeys(key for entry in history for key in entry) if key != "round"]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 7.2) if narrow else (9.6, 3.9), layout="constrained")
        for axes, name in zip(figure.subplots(*((2, 1) if narrow else (1, 2))), ("loss", metric), strict=True):
            _lines(axes, history, parts, name)
        _save(figure, path)


def roc(curves: Mapping[str, Any], path: Path) -> None:
    """The ROC curve of each class that has one.

    Args:
        curves: as from `Task.curves`.
        path: the PNG file to write.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.0, 5.0), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=(0, (4, 4)))
        axes.annotate("guessing", (0.62, 0.57), color="#777777", rotation=45, fontsize=9)
        for index, (name, curve) in enumerate(curves["roc"].items()):
            colour = COLOURS[index % len(COLOURS)]
            label = f"{name}  (AUROC {curve['auroc']:.3f}{_interval(curve.get('interval'))})"
            axes.plot(curve["false_alarms"], curve["hits"], color=colour, linewidth=2.2, label=label)
            if len(curves["roc"]) == 1:
                axes.fill_between(curve["false_alarms"], curve["hits"], color=colour, alpha=0.08, linewidth=0)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        axes.set_xlabel("false alarms: share of images without the finding")
        axes.set_ylabel("found: share of images with the finding")
        axes.set_title("ROC")
        if curves["roc"]:
            axes.legend(loc="lower right")
        else:
            axes.text(0.5, 0.3, "not known: a class has no images", ha="center", color="#777777")
        _save(figure, path)


def confusion(curves: Mapping[str, Any], path: Path) -> None:
    """The confusion matrix: counts, shaded by the share of the true class.

    Args:
        curves: as from `Task.curves`.
        path: the PNG file to write.
    """
    table, classes = curves["confusion"], curves["classes"]
    shares = table / table.sum(axis=1, keepdims=True).clip(min=1)
    side = min(14.0, 2.6 + 0.95 * len(classes))
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        axes = figure.subplots()
        picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if len(classes) <= 12:
            for row in range(len(classes)):
                for column in range(len(classes)):
                    share, count = shares[row, column], table[row, column]
                    colour = "white" if share > 0.55 else INK
                    axes.text(column, row, f"{count:,.0f}\n{share:.0%}", ha="center", va="center", color=colour)
        turned = 35 if max(map(len, classes)) > 10 or len(classes) > 5 else 0
        axes.set_xticks(range(len(classes)), classes, rotation=turned, ha="right" if turned else "center")
        axes.set_yticks(range(len(classes)), classes)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="model says", ylabel="truth", title="Confusion")
        figure.colorbar(picture, ax=axes, shrink=0.8, format=PercentFormatter(1.0)).outline.set_visible(False)
        _save(figure, path)


def reliability(curves: Mapping[str, Any], path: Path) -> None:
    """What was predicted against what was found, and how many images each point stands for.

    Args:
        curves: as from `Task.curves`; at most six findings are drawn.
        path: the PNG file to write.
    """
    shown = list(curves["calibration"].items())[: len(COLOURS)]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.0, 5.8), layout="constrained")
        axes, below = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=(0, (4, 4)))
        axes.annotate("calibrated", (0.62, 0.57), color="#777777", rotation=45, fontsize=9)
        width = 0.08 / max(1, len(shown))
        for index, (name, group) in enumerate(shown):
            colour, marker = COLOURS[index], MARKERS[index]
            label = f"{name}  (error {group['error']:.3f})"
            axes.plot(
                group["predicted"], group["observed"], color=colour, marker=marker, markersize=5.5,
                linewidth=2, label=label,
            )  # fmt: skip
            tenths = np.minimum(np.floor(np.asarray(group["predicted"]) * 10), 9) / 10 + 0.05
            places = tenths + (index - (len(shown) - 1) / 2) * width
            below.bar(places, group["images"], width=width, color=colour)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), title="Reliability")
        axes.set_ylabel("share of images with the finding")
        below.set(xlabel="predicted probability", ylabel="images")
        below.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
        if shown:
            axes.legend(loc="upper left")
        else:
            axes.text(0.5, 0.3, "not known: no image was scored", ha="center", color="#777777")
        _save(figure, path)


def dice(curves: Mapping[str, Any], path: Path) -> None:
    """How Dice is distributed over the images, per structure: quartiles as a box, the mean as a dot.

    Args:
        curves: as from `Task.curves`; the boxes are read off histograms and as exact as their bins are wide.
        path: the PNG file to write.
    """
    boxes = curves["dice"]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 1.5 + 0.75 * max(1, len(boxes))), layout="constrained")
        axes = figure.subplots()
        for row, (name, box) in enumerate(boxes.items()):
            colour = COLOURS[row % len(COLOURS)]
            low, first, middle, third, high = (
                _quantile(box["histogram"], share) for share in (0.05, 0.25, 0.5, 0.75, 0.95)
            )
            axes.plot([low, high], [row, row], color=colour, linewidth=1.6, zorder=2)
            axes.barh(row, third - first, left=first, height=0.42, color=colour, alpha=0.28, edgecolor=colour, zorder=3)
            axes.plot([middle, middle], [row - 0.21, row + 0.21], color=colour, linewidth=2.4, zorder=4)
            axes.plot(box["mean"], row, "o", color=INK, markersize=6, zorder=5)
            if box["interval"] is not None:
                axes.plot(box["interval"], [row, row], color=INK, linewidth=2.4, zorder=5)
            both, missed, invented, _ = box["images"]
            text = f"{name}\n{both + missed + invented:,.0f} images, {missed:,.0f} missed, {invented:,.0f} invented"
            axes.text(0.0, row - 0.30, text, fontsize=9, va="bottom", color=INK)
        axes.set_yticks([])
        axes.set(xlim=(-0.01, 1.01), ylim=(len(boxes) - 0.4, -0.9), title="Dice, image by image")
        axes.set_xlabel("box: quartiles, line: 5 % to 95 %, dot: mean with its 95 % interval")
        axes.grid(visible=False, axis="y")
        if not boxes:
            axes.text(0.5, -0.5, "not known: no image shows a structure", ha="center", color="#777777")
        _save(figure, path)


@dataclass(frozen=True)
class Sample:
    """One image that anybody may see, and a model's answer.

    Attributes:
        name: of its file.
        image: float32 [channels, height, width] or [channels, depth, height, width]; three channels are colours, of
            another number the first is shown.
        marked: uint8 [height, width] or [depth, height, width], the class of each pixel; None where none was asked.
        says: the answer in words, where it is about the whole image.
    """

    name: str
    image: Any
    marked: Any = None
    says: str = ""


def overlay(samples: Sequence[Sample], classes: Sequence[str], path: Path) -> None:
    """Images with the outlines, or the words, of what a model finds in them; of volumes the middle slice.

    For public sample images, which whoever calls has chosen: a picture of a patient stays in the hospital.

    Args:
        samples: at least one.
        classes: their names, the background first where pixels are marked.
        path: the PNG file to write.
    """
    columns = min(4, len(samples))
    rows = math.ceil(len(samples) / columns)
    named = [COLOURS[number % len(COLOURS)] for number in range(len(classes) - 1)]
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(max(4.2, 2.7 * columns), 3.1 * rows + 0.7), layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in places:
            axes.set_axis_off()
        for axes, sample in zip(places, samples, strict=False):
            _answered(axes, sample, named)
        if any(sample.marked is not None for sample in samples):
            lines = [Line2D([], [], color=colour, linewidth=2.2) for colour in named]
            figure.legend(lines, [_plain(name) for name in classes[1:]], loc="outside lower center", ncols=columns)
        said = "Sample images that may be shown to anybody.\nWhat the model says of them is not checked."
        figure.suptitle(said, fontsize=9)
        _save(figure, path)


def comparison(
    values: Mapping[str, Mapping[str, float]], path: Path, metric: str = "auroc", *, narrow: bool = False
) -> None:
    """One metric of several models on several test sets, as dots in rows.

    Args:
        values: {test set: {model: value}}, for example {"north": {"together": 0.97, "alone": 0.94}}.
        path: the PNG file to write.
        metric: what the values are.
        narrow: for a telephone's width: the models stand below, and the only test set in the heading.
    """
    models = list(dict.fromkeys(model for row in values.values() for model in row))
    with mpl.rc_context(_STYLE):
        width, height = (4.8, 1.3 + 0.15 * len(models)) if narrow else (7.2, 1.6)
        figure = Figure(figsize=(width, height + 0.5 * max(1, len(values))), layout="constrained")
        axes = figure.subplots()
        for position, row in enumerate(values.values()):
            known = [value for value in row.values() if math.isfinite(value)]
            if known:
                axes.plot([min(known), max(known)], [position] * 2, color=FAINT, linewidth=4, zorder=1)
        for index, model in enumerate(models):
            rows = [position for position, row in enumerate(values.values()) if model in row]
            dots = [row[model] for row in values.values() if model in row]
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            axes.scatter(dots, rows, color=colour, marker=marker, s=60, label=model, zorder=2)
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_title(title(metric))
        if narrow and len(values) == 1:
            axes.set_yticks([])
            axes.set_title(f"{title(metric)}, {next(iter(values))}")
        if models and narrow:
            figure.legend(loc="outside lower left", ncols=2)
        elif models:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        _save(figure, path)


def _answered(axes: Axes, sample: Sample, colours: Sequence[str]) -> None:
    """One image with its answer."""
    image, heading = np.asarray(sample.image, dtype=np.float64), _plain(sample.name)
    marked = None if sample.marked is None else np.asarray(sample.marked)
    if image.ndim == 4:
        middle = image.shape[1] // 2
        heading += f"\nslice {middle + 1} of {image.shape[1]}"
        image, marked = image[:, middle], None if marked is None else marked[middle]
    if sample.says:
        heading += f"\n{_plain(sample.says)}"
    low, high = image.min(), image.max()
    picture = (image - low) / (high - low or 1.0)
    picture = np.moveaxis(picture, 0, -1) if len(picture) == 3 else picture[0]
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(heading, fontsize=8.5, fontweight="normal")
    for number, colour in enumerate(colours, start=1):
        if marked is not None and (marked == number).any():
            padded = np.pad((marked == number).astype(float), 1)  # so that what reaches the edge is closed there
            sides = [np.arange(-1, side + 1) for side in marked.shape]
            axes.contour(sides[1], sides[0], padded, levels=[0.5], colors=[colour], linewidths=1.8)


def _plain(words: str) -> str:
    """Somebody's words, cut where they are long, without a sign that matplotlib takes for mathematics."""
    return (words if len(words) <= 34 else f"{words[:33]}…").replace("$", r"\$")


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f", {bounds[0]:.3f} to {bounds[1]:.3f}"


def _quantile(histogram: Any, share: float) -> float:
    """A quantile of values in [0, 1], from their histogram, evenly spread inside each bin."""
    counts = np.asarray(histogram, dtype=np.float64)
    below = np.concatenate([[0.0], np.cumsum(counts)])
    return float(np.interp(share * below[-1], below, np.linspace(0, 1, len(below))))


def _lines(axes: Axes, history: Sequence[Mapping[str, Any]], parts: Sequence[str], metric: str) -> None:
    rounds = [entry["round"] for entry in history]
    highest = 0.0
    for index, part in enumerate(parts):
        values = [(entry.get(part) or {}).get(metric, math.nan) for entry in history]
        known = [value for value in values if math.isfinite(value)]
        if not known:
            continue
        highest = max(highest, *known)
        marker = MARKERS[index % len(MARKERS)] if len(rounds) <= 40 else None
        style: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            "linewidth": 2.0,
            "marker": marker,
            "markersize": 4.5,
        }
        axes.plot(rounds, values, label=f"{part}, at last {known[-1]:.3f}", **style)
    axes.set_title(title(metric))
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if metric == "loss" or metric.startswith("hd95"):
        axes.set_ylim(0, highest * 1.08 or 1)
    else:
        axes.set_ylim(top=1.005)
    if highest:
        axes.legend(loc="upper right" if metric == "loss" else "lower right")
    else:
        axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center", color="#777777")


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", facecolor="white")
