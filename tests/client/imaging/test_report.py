"""Duplicates by their pixels, and the operator's page: whole, by itself, and harmless whatever names are in it."""

from __future__ import annotations

import csv
import stat
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image as Pillow

from client.imaging import Cohort, Membership, Quarantined, Reason, near, report
from client.imaging.cohort import Origin
from client.imaging.near import across, copies, prints


def _image(seed: int, size=(40, 50)) -> np.ndarray:
    coarse = np.random.default_rng(seed).random((6, 7)).astype(np.float32)
    return np.asarray(Pillow.fromarray(coarse).resize(size[::-1], Pillow.Resampling.BICUBIC))[None]


def _altered(image: np.ndarray) -> np.ndarray:
    """Another size, another brightness, and JPEG in between."""
    values = Pillow.fromarray((np.clip(image[0], 0, 1) * 255).astype(np.uint8)).resize((64, 60))
    return np.asarray(values, np.float32)[None] / 300 + 0.1


def test_equal_and_altered_copies_are_found_across_sides_only():
    images = [_image(seed) for seed in range(30)]
    images += [images[3].copy(), _altered(images[4]), _altered(images[5])]
    sides = ["train"] * 30 + ["test", "test", "train"]
    found = across([prints(image) for image in images], sides)
    assert [(pair.first, pair.second, pair.exact) for pair in found] == [(3, 30, True), (4, 31, False)]
    assert found[1].distance <= near.NEAR


def test_empty_images_are_not_called_alike():
    flat = [np.zeros((1, 20, 20), np.float32), np.full((1, 20, 20), 0.5, np.float32)]
    assert not across([prints(image) for image in flat], ["train", "test"])


@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 90, 17), (2, 9, 30, 40), (1, 1, 1)])
def test_prints_of_any_shape(shape):
    found = prints(np.random.default_rng(0).random(shape).astype(np.float32))
    assert (len(found.exact), len(found.near)) == (32, 64)


def test_copies_between_patients_are_counted_on_whichever_side():
    same = prints(_image(1))
    assert copies([same, same, prints(_image(2))], ["p", "q", "r"]) == 2
    assert copies([same, same], ["p", "p"]) == 0


def test_real_leaky_set_is_seen_through(real_set):
    """Hundreds of the files are copies, and 64 stand in the published training part and in the test part."""
    folder = real_set("brain_tumour_mri_2d")
    images = np.load(folder / "images_48.npz")["images"].astype(np.float32) / 255
    with (folder / "index.csv").open(newline="", encoding="utf-8") as stream:
        sides = [row["split"] for row in csv.DictReader(stream)]
    found = [prints(image[None]) for image in images]
    assert len(found) - len({item.exact for item in found}) >= 200
    pairs = across(found, sides)
    assert len({pair.second for pair in pairs if pair.exact} | {pair.first for pair in pairs if pair.exact}) >= 64


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.links += [value for name, value in attrs if name in {"src", "href"}]
        if tag not in {"meta", "img", "line", "polyline", "i"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass


def _cohort(targets, classes=("a", "b"), shape=(1, 24, 30)):
    count = len(targets)
    rng = np.random.default_rng(0)
    images = rng.random((count, *shape)).astype(np.float32)
    nasty = "<script>alert(1)</script>&\udce9.dcm"
    return Cohort(
        images=images,
        targets=targets,
        patients=tuple(f"p{at}" for at in range(count)),
        membership=tuple([Membership.TRAIN] * (count - 2) + [Membership.TEST, Membership.VALIDATION]),
        classes=classes,
        quarantine=tuple(Quarantined(f"{at}{nasty}", Reason.TRUNCATED) for at in range(600)),
        scanners=Counter({nasty: count - 1}),
        patient_rule="One image is one patient, as the operator declared.",
        origins=tuple(Origin(nasty, nasty, prints(images[at % (count - 1)])) for at in range(count)),
        missing=Counter({"PatientSex": 3}),
    )


@pytest.mark.parametrize(
    "cohort",
    [
        _cohort(np.array([0, 1] * 6)),
        _cohort(np.array([[0, 1]] * 12, np.float32)),
        _cohort(np.random.default_rng(0).integers(0, 2, (12, 24, 30)).astype(np.uint8)),
        _cohort(np.zeros((12, 5, 24, 30), np.uint8), shape=(2, 5, 24, 30)),
        _cohort(np.array([0, 1] * 6), shape=(3, 24, 30)),
    ],
    ids=["class", "labels", "mask", "volumes", "colour"],
)
def test_the_page_stands_by_itself_and_runs_nothing(cohort, tmp_path):
    pairs = cohort.duplicates()
    file = report.write(tmp_path / "reports" / "r.html", "archive <b>", cohort, pairs, {"Checked": "today"})
    text = file.read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.tags["script"] == 0
    assert page.tags["b"] == 4  # the four figures, and none from a name
    assert page.tags["img"] >= 8
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "default-src 'none'" in text
    assert "It stays at this site" in text
    assert "One image is one patient" in text
    assert "The first 500 of 600." in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(pairs) == 1
    assert not list(file.parent.glob(".report-*"))
