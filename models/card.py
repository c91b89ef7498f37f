"""What must whoever uses a model know of it? The text of MODEL_CARD.md.

The headings follow model cards (Mitchell 2019, arXiv 1810.03993) and what hospitals ask for besides: how it was
trained, by whom, what protected the patients and what did not, and hashes that tie the file to the signed study.
The only numbers derived from patients are the metrics, each summed over all sites that answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.statistics import COUNTS, title

_NO_NOISE = (
    "**There is no differential privacy in this study.** The updates of the hospitals carry no noise, so what was "
    "learned may allow conclusions about single patients (membership inference, reconstruction). Treat the model "
    "file itself as patient-related data."
)
_NO_SECAGG = (
    "**There is no secure aggregation in this study.** The coordinator could see the update of every single "
    "hospital, and the sums behind its results."
)
_NO_NOISE_IN_THE_SUM = (
    "**Without noise, secure aggregation holds against a coordinator that is honest but curious only.** One varying "
    "models and hospitals between rounds can take differences, and one crafted model sent to all can make the sum tell "
    "more."
)
_INTERVALS = (
    "In brackets stand 95 % intervals. They take every image for itself; where a patient has several, the truth is "
    "less sure than they say."
)
_FIGURES = (
    "Every figure is made of sums over the images of all sites that answered. Test images had no part in training "
    "or in choosing the round. "
)
_NOISED_FIGURES = (
    "Every figure is made of noised sums over the patients of all sites that answered, each patient's images averaged "
    "first; counts are of patients, and noised too. Test patients had no part in training or in choosing the round."
)
_IN_NOISE = "too little of it is left under the noise"
_NOISED_RESULTS = (
    "The results are of sums over patients with noise on them, each patient's images averaged first, so they have no "
    "intervals: another draw of the noise would give others, most of all with few patients."
)


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Attributes:
        name, title, purpose: of the study; contact may be empty.
        spec: the specification, as `Study.spec()` gives it; its sections "privacy" and "secagg" hold a `mode`.
        sites: names of the hospitals that took part.
        trained: how it went, in the order to print: {"rounds done": "10 of 10", "published round": "10, the last"}.
        metrics: {"test": {metric: value}, ...}; sums over all sites.
        missing: {"test": {metric: why it is not known}, ...}.
        intervals: {"test": {metric: (low, high)}, ...}, of 95 %.
        parameters: trainable parameters.
        hashes: {"study": hex, "model.safetensors": hex, ...}.
        versions: {"torch": "2.13.0", ...}.
        promise: what a study with noise promises each patient, a sentence each.
        one_image_per_patient: those of the sites whose operators declared that one image is one patient.
    """

    name: str
    title: str
    purpose: str
    spec: Mapping[str, Any]
    sites: Sequence[str]
    trained: Mapping[str, str]
    metrics: Mapping[str, Mapping[str, float]]
    parameters: int
    hashes: Mapping[str, str]
    missing: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    promise: Sequence[str] = ()
    one_image_per_patient: Sequence[str] = ()
    contact: str = ""


_MEASURES = {
    "classification": "AUROC comes from histograms and is exact to the bound given; its interval is DeLong's. Those of "
    "proportions are Wilson's. The calibration error is taken over ten groups of predicted probability.",
    "multilabel": "Every finding is judged for itself, from a probability of one half on; figures without a name are "
    "means over findings. AUROC comes from histograms and is exact to the bound given; its interval is DeLong's. "
    "Those of proportions are Wilson's.",
    "segmentation": "Dice is a mean over the images in which the structure is there or was marked, and 0 where only "
    "one of the two holds; images with neither count as neither good nor bad. HD95 is a mean over the images in which "
    "both hold; its second row counts those of Dice, with the diagonal of the image where a structure was missed or "
    "invented. HD95 is in mm where the images' spacing is known, else in pixels.",
}
"""What the figures of a task mean."""

_PROBABILITY = {
    True: "The score of a pixel is not a calibrated probability, and the edge of a mask is not a measurement.",
    False: "A score is a probability only as far as the calibration above holds, and at these hospitals.",
}


def write(facts: Facts) -> str:
    """The whole card as Markdown."""
    blocks = [
        f"# {_line(facts.title)}",
        "*For research. Not a medical device, and not approved for decisions about a patient.*",
        *_about(facts),
        "## Results",
        _results(facts),
        _NOISED_FIGURES
        if _noised(facts.spec)
        else _FIGURES + _MEASURES[facts.spec["task"].get("kind", "classification")],
        *_training(facts),
        "## Data",
        f"Images of {len(facts.sites)} hospitals ({_line(', '.join(facts.sites))}). No image, no list of patients and "
        "no figure of a single hospital stands here; the weights and the results above are all that was derived from "
        "patients." + _declared(facts),
        "## Privacy",
        *_privacy(facts.spec, facts.promise),
        "## Limits",
        "- It was measured on images of the same hospitals that trained it. Elsewhere, with other scanners, other "
        "patients or another share of the finding, expect it to be worse, and measure it before use.\n"
        f"- {_NOISED_RESULTS if _noised(facts.spec) else _INTERVALS} Nothing is broken down by scanner, age or sex.\n"
        "- " + _PROBABILITY[facts.spec["task"].get("kind", "classification") == "segmentation"],
        "## Hashes (SHA-256)",
        _table(("what", "hash"), [(key, f"`{value}`") for key, value in facts.hashes.items()]),
    ]
    if facts.versions:
        listed = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
        blocks.append(f"Made with {_line(listed)}.")
    return "\n\n".join(blocks) + "\n"


def _about(facts: Facts) -> list[str]:
    image = facts.spec["input"]
    question, output = _question(facts.spec["task"])
    size = " × ".join(str(side) for side in image["size"])
    channels = f"{image['channels']} channel{'s' if image['channels'] > 1 else ''}"
    network = facts.spec["network"]
    norm = f"norm {network.get('norm', 'group')}"
    norm += " (the images of a batch acted on each other)" if norm == "norm batch" else ""
    norm += " (batch norms of the initial weights, as a scale and a shift)" if norm == "norm frozen" else ""
    norm += ", weights standardised" if network.get("weight_standardisation", False) else ""
    contact = f" Questions: {_line(facts.contact)}." if facts.contact else ""
    return [
        "## What it is",
        f"Study **{_line(facts.name)}**. {_line(facts.purpose)}{contact}",
        _table(
            ("", ""),
            [
                ("question", question),
                ("input", f"{size} {'px' if len(image['size']) == 2 else 'voxels'}, {channels}, float32"),
                ("output", output),
                ("network", f"{network['name']}, {norm}, {facts.parameters:,} parameters"),
                ("preparation", _steps(image.get("transforms", ())) + ", resized to the input size"),
            ],
        ),
        "## Intended use",
        "Research on images like those it was trained on: to compare methods, and to prepare a clinical study. A "
        "person who is qualified to read the image answers for every finding.",
    ]


def _question(task: Mapping[str, Any]) -> tuple[str, str]:
    """What is asked, and what comes out."""
    kind, classes = task.get("kind", "classification"), task["classes"]
    names, count = ", ".join(classes), len(classes)
    if kind == "segmentation":
        scores = f"{count} raw scores for every pixel, in the order {names}; their softmax sums to one"
        return f"which pixels belong to {', '.join(classes[1:])}", scores
    if kind == "multilabel":
        each = f"{count} raw score{'s' if count > 1 else ''} in the order above; the sigmoid of each is its probability"
        return f"which of {names} does an image show, each for itself", each
    return f"which of {names} does an image show", f"{count} raw scores in the order above; their softmax sums to one"


def _training(facts: Facts) -> list[str]:
    settings = {key: value for key, value in facts.spec.get("optimiser", {}).items() if key != "name"}
    optimiser = facts.spec.get("optimiser", {}).get("name", "")
    rows = [
        *facts.trained.items(),
        ("optimiser", f"{optimiser} ({', '.join(f'{key} {_number(value)}' for key, value in settings.items())})"),
        ("augmentation", _steps(facts.spec["input"].get("augmentation", ()))),
    ]
    transfer = facts.spec.get("transfer", {})
    if transfer.get("train", "all") != "all":
        rank = f", rank {transfer['rank']}" if transfer["train"] == "lora" else ""
        rows.append(("trained part", f"{transfer['train']}{rank}; the rest is as the initial weights have it"))
    return ["## How it was trained", _table(("", ""), rows)]


def _declared(facts: Facts) -> str:
    """Where images name no patient, on the word of whom each counts as one."""
    names = facts.one_image_per_patient
    if not names:
        return ""
    whom = "the operator of that hospital" if len(names) == 1 else "the operators of these hospitals"
    promised = " and is promised less than stands below" if _noised(facts.spec) else ""
    return (
        f"\n\n**One image is one patient at {_line(', '.join(names))}**, as {whom} declared. A patient who has several "
        f"images there all the same counts as several, may stand in training and in test{promised}."
    )


def _statistics(spec: Mapping[str, Any]) -> str:
    own = spec.get("local", {}).get("norms", "shared") == "local"
    batch = spec["network"].get("norm", "group") == "batch"
    return " and of the mean and variance of its images' features" if batch and not own else ""


def _noised(spec: Mapping[str, Any]) -> bool:
    return str(spec.get("privacy", {}).get("mode", "none")) != "none"


def _privacy(spec: Mapping[str, Any], promise: Sequence[str]) -> list[str]:
    left = (
        "noised sums of patients' clipped gradients, or an update made of them, and the noised sums behind the results"
        if _noised(spec)
        else f"an update of the weights{_statistics(spec)} per round and the sums behind the results"
    )
    paragraphs = [
        f"Images stayed in the hospitals. What left each hospital was {left}, recorded in that hospital's own journal."
    ]
    privacy, secagg = dict(spec.get("privacy", {})), dict(spec.get("secagg", {}))
    if privacy.get("mode", "none") == "none":
        paragraphs.append(_NO_NOISE)
    else:
        paragraphs += ["\n".join(f"- {sentence}" for sentence in promise)] if promise else []
        paragraphs.append("Differential privacy, as the signed study sets it:")
        paragraphs.append(_table(("parameter", "value"), [(key, _number(value)) for key, value in privacy.items()]))
    if secagg.get("mode", "off") in {"off", "none"}:
        paragraphs.append(_NO_SECAGG)
    else:
        paragraphs.append("Secure aggregation, as the signed study sets it:")
        paragraphs.append(_table(("parameter", "value"), [(key, _number(value)) for key, value in secagg.items()]))
        if privacy.get("mode", "none") == "none":
            paragraphs.append(_NO_NOISE_IN_THE_SUM)
    return paragraphs


def _results(facts: Facts) -> str:
    named = [*facts.metrics.values(), *facts.missing.values()]
    names = dict.fromkeys(["images", *(name for values in named for name in values)])
    rows, noised = [], _noised(facts.spec)
    for name in names:
        if noised and name.partition(":")[0] == "auroc_error":  # a bound of the bins, which the noise is not held to
            continue
        cells = []
        for part, values in facts.metrics.items():
            reason = facts.missing.get(part, {}).get(name)
            reason = _IN_NOISE if reason and noised else reason
            if name in values:
                cells.append(_figure(name, values[name]) + _bounds(name, facts.intervals.get(part, {}).get(name)))
            else:
                cells.append(f"not known: {reason}" if reason else "")
        if any(cells):
            rows.append(("Patients, noised" if noised and name == "images" else title(name), *cells))
    if not rows:
        return "No result was reported."
    return _table(("", *facts.metrics), rows)


def _figure(name: str, value: float) -> str:
    if name.partition(":")[0] in COUNTS:
        return f"{value:,.0f}"
    return f"{value:.2f}" if name.startswith("hd95") else f"{value:.4f}"


def _bounds(name: str, interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({_figure(name, interval[0])} to {_figure(name, interval[1])})"


def _steps(entries: Sequence[Mapping[str, Any]]) -> str:
    listed = []
    for entry in entries:
        given = ", ".join(f"{key} {_number(value)}" for key, value in entry.get("parameters", {}).items())
        listed.append(f"{entry['name']} ({given})" if given else entry["name"])
    return ", ".join(listed) or "none"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_line(str(cell)).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _line(text: str) -> str:
    """Text of a study on one line, so that it cannot open a heading or a table of its own."""
    return " ".join(text.split()).replace("<", "&lt;")


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
