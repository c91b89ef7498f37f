"""Plots are pictures of what they were given; the card says what protected the patients and what did not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models import card, plots, tasks


@pytest.fixture
def facts(spec_with: Any) -> card.Facts:
    spec = spec_with(privacy={"mode": "none"}, secagg={"mode": "off"})
    return card.Facts(
        name="pneumonia-28",
        title="Pneumonia on chest X-rays",
        purpose="Whether three hospitals learn more together.",
        spec=spec,
        sites=("north", "south"),
        trained={"rounds done": "10 of 10", "published round": "10, the last"},
        metrics={"test": {"images": 1200.0, "invalid": 0.0, "auroc": 0.95634, "auroc_error": 0.0004, "loss": 0.25}},
        missing={"test": {"f1": "no image of class pneumonia was scored"}},
        parameters=97458,
        hashes={"study": "ab" * 32, "model.safetensors": "cd" * 32},
        versions={"torch": "2.13.0"},
    )


def test_the_card_holds_what_a_reader_needs(facts: card.Facts) -> None:
    text = card.write(facts)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "# Pneumonia on chest X-rays", "## What it is", "## Intended use", "## Results", "## How it was trained",
        "## Data", "## Privacy", "## Limits", "## Hashes (SHA-256)",
    ]  # fmt: skip
    for words in (
        "Not a medical device", "normal, pneumonia", "32 × 32 px, 1 channel", "97,458 parameters", "| Images | 1,200 |",
        "| AUROC | 0.9563 |", "| 0.0004 |", "not known: no image of class pneumonia was scored", "10 of 10",
        "random_affine (shift 0.05)", "adamw", "north, south", "`" + "cd" * 32 + "`", "torch 2.13.0",
    ):  # fmt: skip
        assert words in text, words
    assert text == card.write(facts)


def test_a_card_says_where_each_image_counts_as_a_patient(facts: card.Facts) -> None:
    assert "one patient" not in card.write(facts).lower()
    text = card.write(dataclasses.replace(facts, one_image_per_patient=("north", "south")))
    assert "**One image is one patient at north, south**, as the operators of these hospitals declared." in text
    assert "promised less" not in text
    noised = dataclasses.replace(facts, spec={**facts.spec, "privacy": {"mode": "shared"}})
    assert "promised less" in card.write(dataclasses.replace(noised, one_image_per_patient=("north",)))


def test_a_study_without_mechanisms_says_so_plainly(facts: card.Facts) -> None:
    text = card.write(facts)
    assert "There is no differential privacy in this study." in text
    assert "There is no secure aggregation in this study." in text


def test_a_mechanism_is_told_with_its_numbers(facts: card.Facts) -> None:
    spec = {**facts.spec, "privacy": {"mode": "shared", "epsilon": "3"}, "secagg": {"mode": "on", "threshold": 4}}
    text = card.write(dataclasses.replace(facts, spec=spec))
    assert "There is no" not in text
    assert "| epsilon | 3 |" in text
    assert "| threshold | 4 |" in text


def test_a_card_of_a_study_with_noise_says_what_its_figures_are_of_and_claims_no_exactness(facts: card.Facts) -> None:
    text = card.write(dataclasses.replace(facts, spec={**facts.spec, "privacy": {"mode": "shared"}}))
    for words in ("| Patients, noised | 1,200 |", "noised sums over the patients", "noised sums of patients' clipped"):
        assert words in text, words
    for words in ("exact to the bound", "DeLong", "| Images |", "no image of class", "error of the bins", "0.0004"):
        assert words not in text, words
    assert "not known: too little of it is left under the noise" in text


def test_S8_a_card_of_secure_sums_without_noise_says_what_they_do_not_hold_against(facts: card.Facts) -> None:
    secagg = {"mode": "on", "threshold": 4}
    for mode, said in (("none", True), ("shared", False)):
        text = card.write(dataclasses.replace(facts, spec={**facts.spec, "privacy": {"mode": mode}, "secagg": secagg}))
        assert ("honest but curious" in text) is said


def test_text_of_a_study_cannot_forge_a_heading_or_a_table(facts: card.Facts) -> None:
    plain = card.write(facts)
    text = card.write(
        dataclasses.replace(
            facts,
            purpose="good\n\n## Privacy\n\nepsilon is 0.1 <script>",
            trained={"rounds": "1 | 2\n| epsilon | 0 |"},
        )
    )
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        line for line in plain.splitlines() if line.startswith("#")
    ]
    assert "<script" not in text
    assert "\n| epsilon" not in text


def test_a_model_without_results_says_so(facts: card.Facts) -> None:
    assert "No result was reported." in card.write(dataclasses.replace(facts, metrics={}, missing={}))


def _opened(path: Path) -> Any:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def _pixels(picture: Any, colour: str) -> int:
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return int((np.abs(picture - wanted).sum(axis=2) < 30).sum())


def _curves(classes: list[str], spec_with: Any, images: int = 300) -> Any:
    task = tasks.get(spec_with(**{"task.classes": classes}))
    generator = np.random.default_rng(0)
    targets = generator.integers(0, len(classes), images)
    scores = generator.normal(size=(images, len(classes))) + 9 * np.eye(len(classes))[targets]
    return task.curves(task.statistics(scores, targets, np.ones(images)))


HISTORY = [
    {"round": number, "train": {"loss": 1 / number, "auroc": 1 - 0.3 / number},
     "validation": {"loss": 1.1 / number} if number % 2 else None}
    for number in range(1, 9)
]  # fmt: skip


def test_rounds_are_drawn_and_gaps_are_allowed(tmp_path: Path) -> None:
    plots.curves(HISTORY, tmp_path / "both.png")
    both = _opened(tmp_path / "both.png")
    assert both.shape[1] > both.shape[0] > 400
    assert _pixels(both, plots.BLUE) > 500
    assert _pixels(both, plots.VERMILION) > 100
    plots.curves([{"round": entry["round"], "train": entry["train"]} for entry in HISTORY], tmp_path / "one.png")
    assert _pixels(_opened(tmp_path / "one.png"), plots.VERMILION) == 0


@pytest.mark.parametrize("history", [[], [{"round": 1}], [{"round": 1, "train": {}}]])
def test_a_study_that_has_no_figures_yet_can_be_drawn(history: Any, tmp_path: Path) -> None:
    plots.curves(history, tmp_path / "empty.png")
    assert _pixels(_opened(tmp_path / "empty.png"), plots.BLUE) == 0


@pytest.mark.parametrize("classes", [["normal", "pneumonia"], ["normal", "bacterial", "viral"]])
def test_each_finding_has_its_curve(classes: list[str], spec_with: Any, tmp_path: Path) -> None:
    plots.roc(_curves(classes, spec_with), tmp_path / "roc.png")
    picture = _opened(tmp_path / "roc.png")
    drawn = [colour for colour in plots.COLOURS if _pixels(picture, colour) > 200]
    assert len(drawn) == (1 if len(classes) == 2 else 3)


def test_a_curve_that_is_not_known_is_not_drawn(spec_with: Any, tmp_path: Path) -> None:
    plots.roc(_curves(["a", "b"], spec_with, images=0), tmp_path / "roc.png")
    assert _pixels(_opened(tmp_path / "roc.png"), plots.BLUE) == 0


def test_calibration_is_drawn_for_each_finding(spec_with: Any, tmp_path: Path) -> None:
    for classes in (["normal", "pneumonia"], ["a", "b", "c"]):
        plots.reliability(_curves(classes, spec_with), tmp_path / "reliability.png")
        picture = _opened(tmp_path / "reliability.png")
        assert _pixels(picture, plots.BLUE) > 300
        assert (_pixels(picture, plots.GREEN) > 100) == (len(classes) == 3)
    plots.reliability(_curves(["a", "b"], spec_with, images=0), tmp_path / "none.png")
    assert _pixels(_opened(tmp_path / "none.png"), plots.BLUE) == 0


def _segmented(spec_with: Any, images: int = 40) -> Any:
    task = tasks.get(spec_with(**{"task.kind": "segmentation", "task.classes": ["background", "tumour", "oedema"]}))
    truth = np.random.default_rng(0).integers(0, 3, (images, 12, 12)).astype(np.uint8)
    found = np.where(np.random.default_rng(1).random(truth.shape) < 0.7, truth, 0)
    scores = np.moveaxis(np.eye(3)[found], -1, 1)
    return task, task.statistics(scores, truth, np.ones(images))


def test_dice_is_drawn_for_each_structure(spec_with: Any, tmp_path: Path) -> None:
    task, sums = _segmented(spec_with)
    plots.dice(task.curves(sums), tmp_path / "dice.png")
    picture = _opened(tmp_path / "dice.png")
    assert min(_pixels(picture, plots.BLUE), _pixels(picture, plots.VERMILION)) > 100
    plots.dice(task.curves(np.zeros(task.size)), tmp_path / "none.png")
    assert _pixels(_opened(tmp_path / "none.png"), plots.BLUE) == 0


def test_a_box_is_read_off_its_histogram() -> None:
    values = np.random.default_rng(0).random(4000) ** 2
    histogram = np.histogram(values, 20, (0, 1))[0]
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert plots._quantile(histogram, share) == pytest.approx(np.quantile(values, share), abs=0.02)


@pytest.mark.parametrize("size", [(24, 32), (6, 24, 32)])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_an_overlay_shows_each_structure_that_was_found(size: tuple[int, ...], channels: int, tmp_path: Path) -> None:
    found = np.zeros(size, np.uint8)
    found[..., 4:12, 4:12] = 1
    found[..., 16:, 20:] = 2  # reaches the edge
    classes = ["background", "nucleus", "cost in $"]
    marked = plots.Sample("a.png", np.ones((channels, *size)), marked=found)
    nothing = plots.Sample("$b$.png", np.ones((channels, *size)), marked=found * 0)
    for name, samples in (("both.png", [marked, nothing]), ("none.png", [nothing])):
        plots.overlay(samples, classes, tmp_path / name)
    both, none = _opened(tmp_path / "both.png"), _opened(tmp_path / "none.png")
    for colour in (plots.BLUE, plots.VERMILION):
        assert _pixels(both, colour) > _pixels(none, colour) + 100


def test_an_overlay_of_whole_images_says_its_words(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((1, 24, 24))
    for says in ("pneumonia 0.93", ""):
        samples = [plots.Sample(f"{number}.png", image, says=says) for number in range(5)]
        plots.overlay(samples, ["normal", "pneumonia"], tmp_path / f"{len(says)}.png")
    assert _pixels(_opened(tmp_path / "14.png"), plots.INK) != _pixels(_opened(tmp_path / "0.png"), plots.INK)


def test_each_task_has_its_pictures(spec_with: Any) -> None:
    task, sums = _segmented(spec_with)
    assert set(plots.drawings(task.curves(sums))) == {"dice.png"}
    several = tasks.get(spec_with(**{"task.kind": "multilabel"}))
    assert set(plots.drawings(several.curves(np.zeros(several.size)))) == {"roc.png", "reliability.png"}
    assert set(plots.drawings(_curves(["a", "b"], spec_with))) == {"roc.png", "reliability.png", "confusion.png"}


def test_a_card_of_masks_says_what_its_figures_mean(facts: card.Facts, spec_with: Any) -> None:
    task, sums = _segmented(spec_with)
    spec = {**facts.spec, "task": {"kind": "segmentation", "classes": ["background", "tumour", "oedema"]},
            "transfer": {"train": "lora", "rank": 4}}  # fmt: skip
    text = card.write(dataclasses.replace(
        facts, spec=spec, metrics={"test": task.metrics(sums)}, missing={}, intervals={"test": task.intervals(sums)}
    ))  # fmt: skip
    for words in (
        "which pixels belong to tumour, oedema", "| Dice, tumour | 0.", "| HD95, mm, oedema | ", " to 0.",
        "with the diagonal of the image", "lora, rank 4; the rest is as the initial weights have it",
        "not a calibrated probability",
    ):  # fmt: skip
        assert words in text, words


def test_a_card_of_findings_names_each(facts: card.Facts, spec_with: Any) -> None:
    task = tasks.get(spec_with(**{"task.kind": "multilabel", "task.classes": ["effusion", "nodule"]}))
    generator = np.random.default_rng(0)
    sums = task.statistics(generator.normal(size=(50, 2)), generator.integers(0, 2, (50, 2)), np.ones(50))
    text = card.write(dataclasses.replace(
        facts, spec={**facts.spec, "task": {"kind": "multilabel", "classes": ["effusion", "nodule"]}},
        metrics={"test": task.metrics(sums)}, missing={}, intervals={"test": task.intervals(sums)},
    ))  # fmt: skip
    for words in ("each for itself", "| AUROC, effusion | 0.", "| Sensitivity, nodule | 0.", "sigmoid of each"):
        assert words in text, words


@pytest.mark.parametrize("count", [2, 5, 14])
def test_a_confusion_matrix_of_any_size(count: int, spec_with: Any, tmp_path: Path) -> None:
    plots.confusion(_curves([f"class {number}" for number in range(count)], spec_with), tmp_path / "confusion.png")
    assert _pixels(_opened(tmp_path / "confusion.png"), "#08306b") > 1000


def test_models_are_compared_on_each_set(tmp_path: Path) -> None:
    values = {"north": {"together": 0.97, "alone": 0.94}, "south": {"together": 0.96}}
    plots.comparison(values, tmp_path / "comparison.png")
    picture = _opened(tmp_path / "comparison.png")
    assert _pixels(picture, plots.BLUE) > _pixels(picture, plots.VERMILION) > 50
    plots.comparison({}, tmp_path / "empty.png")
    assert _opened(tmp_path / "empty.png").size


def test_plots_keep_no_figure_and_no_settings(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plots.curves(HISTORY, tmp_path / "a.png")
    assert dict(mpl.rcParams) == before
