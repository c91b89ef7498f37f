"""What did the three hospitals learn, in pictures? One page that opens in any browser, offline."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from client.imaging import Cohort, Membership
from models import plots
from privacy.grants import Claims
from privacy.study import Study
from privacy.study_text import S8

COLUMNS, NARROW_COLUMNS = 8, 4
NARROW = "(max-width: 40rem)"
"""Where a telephone's page begins; the style sheet says the same."""
_STYLE = Path(__file__).with_name("page.css")


def contact_sheet(cohort: Cohort, path: Path, rows: int = 2, columns: int = COLUMNS) -> None:
    """Training images of one hospital as the network sees them, one row per class.

    Only for images that may be shown: made ones and public sets.
    """
    train = cohort.indices(Membership.TRAIN)
    figure = Figure(figsize=(columns * 1.15, rows * 1.35), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, cells in enumerate(grid):
        chosen = [i for i in train if cohort.targets[i] == row][:columns]
        for axes in cells:
            axes.axis("off")
        for axes, i in zip(cells, chosen, strict=False):
            picture = np.asarray(cohort.images[i])
            axes.imshow(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0), cmap="gray")
        if chosen:
            cells[0].set_title(cohort.classes[row], fontsize=9, loc="left")
    FigureCanvasAgg(figure)
    with mpl.rc_context({"savefig.dpi": 130}):
        figure.savefig(path)


def promised(study: Study) -> str:
    """What the study promises to patients, and what it does not, in HTML (RULES S8, N7)."""
    secure = "It has <b>secure aggregation</b>: the coordinator saw sums over the hospitals only."
    if study.secagg.mode == "off":
        secure = "It has <b>no secure aggregation</b>: the coordinator saw each hospital's own update."
    if study.privacy.mode == "none":
        curious = f" {_text(S8)}" if study.secagg.mode == "on" else ""
        return f"This study has <b>no differential privacy</b>. {secure}{curious}"
    claims = Claims.of(study)
    tiers = f"ε {claims.epsilon:f} at δ {claims.delta:f} against everyone who sees only sums"
    if claims.cap != claims.epsilon:
        tiers += f", ε {claims.cap:f} if secure aggregation were wholly broken"
    return (
        f"This study has <b>differential privacy</b> for each patient at one hospital: {tiers}; over several hospitals "
        f"group privacy applies. {secure}"
    )


def write(
    folder: Path,
    study: Study,
    title: str,
    origin: str,
    cohorts: Mapping[str, Cohort],
    broken: Mapping[str, Mapping[str, int]],
    together: Mapping[str, float],
    alone: Mapping[str, Mapping[str, float]],
    facts: Sequence[tuple[str, str]],
) -> Path:
    """Write index.html and its pictures into `folder`, beside the study's exported files, and return its path.

    Args:
        study: what was run; what it promises stands at the top.
        origin: one sentence on where the images come from.
        cohorts: images by hospital, for counts and contact sheets.
        broken: {hospital: {reason: files left out}}.
        together: metrics of the federated model on all hospitals' test images.
        alone: {hospital: metrics} of each hospital's own model on the same images.
        facts: rows of the table about the study.
    """
    sheets = []
    for name, cohort in cohorts.items():
        rows = min(3, len(cohort.classes))
        contact_sheet(cohort, folder / f"images-{name}.png", rows)
        contact_sheet(cohort, folder / f"images-{name}-narrow.png", rows, NARROW_COLUMNS)
        sheets.append(_figure(f"images-{name}", f"{name}: {_scanners(cohort)}", narrow=True))
    dots = {"all hospitals' test images": {"together": together["auroc"], **_auroc(alone)}}
    plots.comparison(dots, folder / "comparison.png")
    plots.comparison(dots, folder / "comparison-narrow.png", narrow=True)
    rounds = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["rounds"]
    plots.curves(rounds, folder / "curves-narrow.png", narrow=True)
    best = max(_auroc(alone).values(), default=0.0)
    gain = together["auroc"] - best
    against = (
        f"; the best hospital alone reaches {best:.3f}" if gain > 0 else f", no better than one alone ({best:.3f})"
    )
    lead = f"Together they reach an AUROC of <b>{together['auroc']:.3f}</b>{against}."
    body = [
        f"<h1>{_text(title)}</h1>",
        f"<p>{lead}</p>",
        f'<p class="soft">{_text(origin)}</p>',
        f'<p class="warn">{promised(study)} It shows how the parts work together, on images that anyone may see.</p>',
        "<h2>Together and alone</h2>",
        _results(together, alone),
        _figure(
            "comparison",
            "The same test images, the same number of training steps, the same first weights.",
            narrow=True,
        ),
        "<h2>Learning</h2>",
        _figure(
            "curves",
            "Loss and AUROC on the hospitals' validation images, summed over all of them, by round.",
            narrow=True,
        ),
        '<div class="two">',
        _figure("roc", "ROC on the test images."),
        _figure("confusion", "Confusion on the test images."),
        "</div>",
        "<h2>The hospitals</h2>",
        _hospitals(cohorts, broken),
        *sheets,
        "<h2>The study</h2>",
        _table(("", ""), facts),
        '<p>Files: <a href="MODEL_CARD.md">model card</a> · <a href="model.safetensors">model</a> · '
        '<a href="metrics.csv">metrics (CSV)</a> · <a href="metrics.json">metrics (JSON)</a> · '
        '<a href="study.json">the signed study</a></p>',
    ]
    page = folder / "index.html"
    page.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head><body><main>{''.join(body)}</main></body></html>\n",
        encoding="utf-8",
    )
    return page


def _results(together: Mapping[str, float], alone: Mapping[str, Mapping[str, float]]) -> str:
    models = {"together": together, **{f"{name} alone": metrics for name, metrics in alone.items()}}
    best = max(metrics["auroc"] for metrics in models.values())
    rows = "".join(
        f"<tr{' class=best' if metrics['auroc'] == best else ''}><td>{_text(name)}</td>"
        + "".join(
            f'<td class="number" data-label="{label}">{metrics.get(key, float("nan")):.3f}</td>'
            for key, label in _SHOWN.items()
        )
        + "</tr>"
        for name, metrics in models.items()
    )
    head = "".join(f'<th class="number">{label}</th>' for label in _SHOWN.values())
    return f'<table class="rows"><tr><th>model</th>{head}</tr>{rows}</table>'


_SHOWN = {"auroc": "AUROC", "balanced_accuracy": "balanced accuracy", "accuracy": "accuracy", "loss": "loss"}


def _hospitals(cohorts: Mapping[str, Cohort], broken: Mapping[str, Mapping[str, int]]) -> str:
    rows = []
    for name, cohort in cohorts.items():
        reasons = ", ".join(f"{count} × {reason}" for reason, count in broken.get(name, {}).items()) or "none"
        sides = " / ".join(str(len(cohort.indices(side))) for side in Membership)
        rows.append((name, str(len(cohort)), str(len(set(cohort.patients))), sides, reasons))
    return _table(("hospital", "images", "patients", "train / validation / test", "left out, and why"), rows)


def _scanners(cohort: Cohort) -> str:
    return ", ".join(cohort.scanners) or "scanner not stated"


def _auroc(models: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {name: metrics["auroc"] for name, metrics in models.items()}


def _figure(name: str, caption: str, *, narrow: bool = False) -> str:
    """A picture NAME.png; with `narrow`, NAME-narrow.png in its place on a telephone."""
    alt = html.escape(caption, quote=True)
    small = f'<source media="{NARROW}" srcset="{name}-narrow.png">' if narrow else ""
    picture = f'<picture>{small}<img src="{name}.png" alt="{alt}"></picture>'
    return f"<figure>{picture}<figcaption>{_text(caption)}</figcaption></figure>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """With a heading each row becomes a card on a telephone, and each cell says its column; without, it stays."""
    top = "<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in head) + "</tr>" if any(head) else ""
    lines = ""
    for row in rows:
        cells = (f'<td data-label="{_text(key)}">{_text(cell)}</td>' for key, cell in zip(head, row, strict=True))
        lines += f"<tr>{''.join(cells)}</tr>"
    return f"<table{' class=rows' if top else ''}>{top}{lines}</table>"


def _text(value: str) -> str:
    return html.escape(value)
