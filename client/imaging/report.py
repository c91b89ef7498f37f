"""What does a hospital want to see of its own images before it lends them to a study? One page, that stays at the site.

It opens in any browser without a network: counts, class balance, scanners, missing tags, values, a contact sheet, what
was left out and why, and images that stand on both sides of the split. It holds images and file names of patients, and
says so.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.imaging import near
from client.imaging.charts import bars, histogram, keys, table, text, tile
from client.imaging.cohort import Cohort
from client.imaging.near import Doubles
from client.imaging.records import WORDS, Membership, Quarantined, Reason, Target

SAMPLED = 400
PER_CLASS = 8
MOST_CLASSES = 24
MOST_ROWS = 500
PAIRS_SHOWN = 12
MOST_SCANNERS = 6

_STYLE = Path(__file__).with_name("report.css")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write(file: Path, name: str, cohort: Cohort, pairs: Doubles, facts: Mapping[str, str]) -> Path:
    """Write the page, readable by this user only, whole or not at all; returns its path.

    Args:
        name: the data source's name at this site.
        pairs: what `Cohort.duplicates` found.
        facts: lines for the head of the page, such as when it was checked and for which study.

    Raises:
        OSError: the folder cannot be written.
    """
    body = "".join(
        [
            f"<h1>{text(name)}</h1>",
            *(f'<p class="soft">{text(label)}: {text(value)}</p>' for label, value in facts.items() if value),
            f'<p class="soft">{text(cohort.patient_rule)}</p>',
            '<p class="warn">This page holds images and file names of patients. It stays at this site.</p>',
            _cards(cohort, pairs),
            _sides(cohort),
            _balance(cohort),
            _scanners(cohort),
            _missing(cohort),
            _values(cohort),
            _sheet(cohort),
            _duplicates(cohort, pairs),
            _left_out(cohort.quarantine),
        ]
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(name)}: data report</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=".report-", dir=file.parent)  # 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(page)
        os.replace(part, file)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return file


def _cards(cohort: Cohort, pairs: Doubles) -> str:
    cards = {
        "images": len(cohort),
        "patients": len(set(cohort.patients)),
        "left out": len(cohort.quarantine),
        "pairs on two sides": pairs.count,
    }
    shape = " × ".join(str(side) for side in cohort.images.shape[2:])
    tiles = "".join(f'<div class="card"><b>{count:,}</b>{label}</div>' for label, count in cards.items())
    return (
        f'<div class="cards">{tiles}</div>'
        f'<p class="soft">Prepared as {cohort.images.shape[1]} × {shape} values an image.</p>'
    )


def _sides(cohort: Cohort) -> str:
    rows = []
    for side in Membership:
        chosen = cohort.indices(side)
        patients = len({cohort.patients[at] for at in chosen})
        rows.append((side.value, len(chosen), patients, f"{len(chosen) / patients:.1f}" if patients else "–"))
    head = ("side", "images", "patients", "images a patient")
    return f"<h2>Sides of the split</h2>{table(head, rows, numbers=(1, 2, 3))}"


def _balance(cohort: Cohort) -> str:
    everyone = np.arange(len(cohort), dtype=np.int64)
    counts = dict(zip(cohort.classes, cohort.counts(everyone).tolist(), strict=True))
    found = {name: count for name, count in counts.items() if count}
    said = {
        Target.CLASS: "Images of each class.",
        Target.LABELS: "Images that carry each label; one image may carry several.",
        Target.MASK: "Images in which each class has at least one pixel.",
    }[cohort.target]
    absent = [name for name, count in counts.items() if not count]
    words = (
        f'<p class="soft">Without any image: {text(", ".join(absent))}.</p>' if 0 < len(absent) <= MOST_CLASSES else ""
    )
    return f'<h2>Classes</h2><p class="soft">{said}</p>{bars(found, len(cohort))}{words}'


def _scanners(cohort: Cohort) -> str:
    if not cohort.scanners:
        return '<h2>Scanners</h2><p class="soft">The files do not name any.</p>'
    unnamed = len(cohort) - sum(cohort.scanners.values())
    counts = dict(cohort.scanners.most_common()) | ({"": unnamed} if unnamed else {})
    return f"<h2>Scanners</h2>{bars(counts, len(cohort))}"


def _missing(cohort: Cohort) -> str:
    if not cohort.missing:
        return ""
    rows = [(tag, count) for tag, count in cohort.missing.most_common()]
    return (
        '<h2>Missing tags</h2><p class="soft">DICOM files in which a usual tag is absent or empty.</p>'
        f"{table(('tag', 'files'), rows, numbers=(1,))}"
    )


def _values(cohort: Cohort) -> str:
    groups: dict[str, list[NDArray[np.float32]]] = {}
    common = [name for name, _ in cohort.scanners.most_common(MOST_SCANNERS - 1)]
    for at in _spread(np.arange(len(cohort)), SAMPLED):
        scanner = cohort.origins[at].scanner if cohort.origins else ""
        group = scanner if scanner in common else ("others" if common else "all images")
        groups.setdefault(group, []).append(np.asarray(cohort.images[at]).ravel())
    drawn = histogram({name: np.concatenate(values) for name, values in sorted(groups.items())})
    return (
        '<h2>Values</h2><p class="soft">How often each value occurs in the prepared images, by scanner; the height is '
        f"on a square-root scale, from up to {SAMPLED} images.</p>{drawn}"
    )


def _sheet(cohort: Cohort) -> str:
    parts = ['<h2>Contact sheet</h2><p class="soft">Prepared images, spread over the source.</p>']
    if cohort.target is Target.MASK:
        named = [name for name in cohort.classes[1:] if len(cohort.classes) <= MOST_CLASSES]
        parts.append(f'<p class="legend">{keys(named)}</p>')
        parts.append(_tiles(cohort, np.arange(len(cohort)), 2 * PER_CLASS))
        return "".join(parts)
    shown = 0
    for index, name in enumerate(cohort.classes):
        is_class = cohort.target is Target.CLASS
        fitting = np.flatnonzero(cohort.targets == index if is_class else cohort.targets[:, index] > 0)
        if len(fitting) and shown < MOST_CLASSES:
            shown += 1
            parts.append(f"<h3>{text(name)}</h3>{_tiles(cohort, fitting, PER_CLASS)}")
    return "".join(parts)


def _tiles(cohort: Cohort, places: NDArray[Any], most: int) -> str:
    return f'<div class="tiles">{"".join(_tile(cohort, at) for at in _spread(places, most))}</div>'


def _tile(cohort: Cohort, at: int) -> str:
    mask = np.asarray(cohort.targets[at]) if cohort.target is Target.MASK else None
    caption = cohort.origins[at].path if cohort.origins else f"image {at}"
    return tile(cohort.images[at], mask, caption)


def _duplicates(cohort: Cohort, pairs: Doubles) -> str:
    same = near.copies([origin.prints for origin in cohort.origins], cohort.patients)
    parts = [
        '<h2>The same image on two sides</h2><p class="soft">Equal pixels, or a difference hash of which at most '
        f"{near.NEAR} of 256 bits differ; images of one value are left aside. Two patients with one image are often "
        "one patient with two numbers: a model would be tested on what it was trained on.</p>",
        f"<p>Pairs: {pairs.count:,}. Images that another patient has too, pixel for pixel, on any side: {same:,}.</p>",
    ]
    tiles = [
        f'<div class="pair">{_tile(cohort, pair.first)}{_tile(cohort, pair.second)}</div>'
        for pair in pairs.examples[:PAIRS_SHOWN]
    ]
    rows = [
        (
            cohort.origins[pair.first].path,
            cohort.membership[pair.first],
            cohort.origins[pair.second].path,
            cohort.membership[pair.second],
            "equal" if pair.exact else f"{pair.distance} bits",
            pair.count,
        )
        for pair in pairs.examples
    ]
    if rows:
        parts += [
            f'<div class="tiles">{"".join(tiles)}</div>',
            '<p class="soft">One example of each two pictures that are alike, the most alike first, and how many pairs '
            f"have the same two: at most {near.MOST_LISTED} equal ones and as many near ones.</p>",
            table(("image", "side", "image", "side", "differ", "pairs"), rows, numbers=(5,)),
        ]
    return "".join(parts)


def _left_out(quarantine: tuple[Quarantined, ...]) -> str:
    counts: Counter[Reason] = Counter(item.reason for item in quarantine)
    parts = ["<h2>Left out</h2>"]
    if not quarantine:
        return f'{parts[0]}<p class="soft">Nothing.</p>'
    parts.append(bars({WORDS[reason]: count for reason, count in counts.most_common()}))
    rows = [(item.path, item.text) for item in quarantine[:MOST_ROWS]]
    parts.append(f"<h3>Files</h3>{table(('file', 'reason'), rows)}")
    if len(quarantine) > MOST_ROWS:
        parts.append(f'<p class="soft">The first {MOST_ROWS} of {len(quarantine):,}.</p>')
    return "".join(parts)


def _spread(places: NDArray[Any], most: int) -> list[int]:
    chosen = np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(np.int64)
    return [int(places[at]) for at in chosen]
