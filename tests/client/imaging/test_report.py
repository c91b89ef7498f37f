"""Duplicates by their pixels, and the operator's page: whole, by itself, and harmless whatever names are in it."""

from __future__ import annotations

import csv
import html
import itertools
import re
import stat
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from client.imaging import Cohort, Membership, Quarantined, Reason, near, report
from client.imaging.cohort import Origin
from client.imaging.near import Prints, across, copies, prints


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
    assert [(pair.first, pair.second, pair.exact) for pair in found.examples] == [(3, 30, True), (4, 31, False)]
    assert found.examples[1].distance <= near.NEAR
    assert found.count == 2


def test_empty_images_are_not_called_alike():
    """Nor equal: the slices above the heads of forty patients are no copies of one another."""
    flat = [np.zeros((1, 20, 20), np.float32), np.full((1, 20, 20), 0.5, np.float32)] * 50
    flat += [np.stack([np.full((9, 9, 9), value, np.float32) for value in (0.1, 0.2)])] * 50
    found = [prints(image) for image in flat]
    assert across(found, ["train", "train", "test"] * 50).count == 0
    assert copies(found, [f"p{at}" for at in range(150)]) == 0


def test_a_picture_in_thousands_of_copies_is_one_example_and_its_pairs_are_counted():
    found = across([prints(_image(4))] * 4000 + [prints(_altered(_image(4)))] * 10, ["train"] * 3000 + ["test"] * 1010)
    assert found.count == 3000 * 1000 + 3000 * 10
    assert [(pair.first, pair.second, pair.exact, pair.count) for pair in found.examples] == [
        (0, 3000, True, 3_000_000),
        (0, 4000, False, 30_000),
    ]


@given(
    st.lists(st.tuples(st.integers(0, 20), st.sampled_from(["train", "validation", "test"])), max_size=60),
    st.sampled_from([3, 512]),
)
def test_the_count_is_that_of_every_pair_and_the_examples_are_the_most_alike(images, block):
    """Twenty pictures of which some differ by few bits, in copies on any side, against looking at each pair."""
    hashes = [((1 << 99) - 1) ^ ((1 << (picture % 7) * 2) - 1) << 120 * (picture // 7) for picture in range(21)]
    found = [Prints(f"{picture:032x}", f"{hashes[picture]:064x}") for picture, _ in images]
    sides = [side for _, side in images]
    expected = Counter[tuple[int, int, int]]()
    for (one, here), (other, there) in itertools.combinations(images, 2):
        distance = (hashes[one] ^ hashes[other]).bit_count()
        if here != there and distance <= near.NEAR:
            expected[distance, min(one, other), max(one, other)] += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "_BLOCK", block)
        patch.setattr(near, "MOST_LISTED", 5)
        doubles = across(found, sides)
    assert doubles.count == expected.total()
    for pair in doubles.examples:
        one, other = sorted((images[pair.first][0], images[pair.second][0]))
        assert pair.count == expected[pair.distance, one, other]
        assert pair.exact == (one == other)
        assert sides[pair.first] != sides[pair.second]
        assert pair.first < pair.second
    for exact in (True, False):
        wanted = sorted(distance for distance, one, other in expected if exact == (one == other))
        assert [pair.distance for pair in doubles.examples if pair.exact == exact] == wanted[:5]


@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 90, 17), (2, 9, 30, 40), (1, 1, 2)])
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
    doubles = across(found, sides)
    exact = [pair for pair in doubles.examples if pair.exact]
    assert len({pair.second for pair in exact} | {pair.first for pair in exact}) >= 64
    assert doubles.count >= sum(pair.count for pair in doubles.examples) >= 64


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


NASTY = "<script>alert(1)</script>&\udce9.dcm"


def _section(text: str, heading: str) -> str:
    """The part of the page under one heading."""
    (found,) = [part for part in text.split("<h2>") if part.startswith(f"{heading}</h2>")]
    return found


def _bars(section: str) -> list[tuple[str, str]]:
    return re.findall(r'class="name">(.*?)</span>.*?class="count">([\d,]+) ', section)


def _cohort(targets, classes=("a", "b"), shape=(1, 24, 30)):
    count = len(targets)
    rng = np.random.default_rng(0)
    images = rng.random((count, *shape)).astype(np.float32)
    return Cohort(
        images=images,
        targets=targets,
        patients=tuple(f"p{at}" for at in range(count)),
        membership=tuple([Membership.TRAIN] * (count - 2) + [Membership.TEST, Membership.VALIDATION]),
        classes=classes,
        quarantine=tuple(Quarantined(f"{at}{NASTY}", Reason.TRUNCATED) for at in range(600)),
        scanners=Counter({NASTY: count - 1}),
        patient_rule="One image is one patient, as the operator declared.",
        origins=tuple(Origin(NASTY, NASTY, prints(images[at % (count - 1)])) for at in range(count)),
        missing=Counter({"PatientSex": 3}),
    )


@pytest.mark.parametrize(
    ("cohort", "counts", "classes"),
    [
        (_cohort(np.array([0, 1, 1] * 4)), [("a", "4"), ("b", "8")], "Images of each class."),
        (_cohort(np.array([[0, 1]] * 12, np.float32)), [("b", "12")], "Without any image: a."),
        (
            _cohort(np.random.default_rng(0).integers(0, 2, (12, 24, 30)).astype(np.uint8)),
            [("a", "12"), ("b", "12")],
            "at least one pixel",
        ),
        (_cohort(np.zeros((12, 5, 24, 30), np.uint8), shape=(2, 5, 24, 30)), [("a", "12")], "Without any image: b."),
        (_cohort(np.array([0, 1] * 6), shape=(3, 24, 30)), [("a", "6"), ("b", "6")], "Images of each class."),
    ],
    ids=["class", "labels", "mask", "volumes", "colour"],
)
def test_the_page_stands_by_itself_says_what_there_is_and_runs_nothing(cohort, counts, classes, tmp_path):
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
    assert pairs.count == 1
    assert not list(file.parent.glob(".report-*"))
    scanner = html.escape(NASTY).replace("\udce9", "?")
    assert _bars(_section(text, "Classes")) == counts
    assert classes in _section(text, "Classes")
    assert _bars(_section(text, "Scanners")) == [(scanner, "11"), ("not named", "1")]
    assert "<td>PatientSex</td><td class=number>3</td>" in _section(text, "Missing tags")
    assert "<td>train</td><td class=number>10</td><td class=number>10</td>" in _section(text, "Sides of the split")
    values = _section(text, "Values")
    assert re.search(r'<polyline points="10\.0,[\d., ]{500,}"', values)
    assert scanner in values
    assert _section(text, "Contact sheet").count("<img ") >= 8
    assert "Pairs: 1. Images that another patient has too, pixel for pixel, on any side: 2." in text
    assert "<td>equal</td><td class=number>1</td>" in _section(text, "The same image on two sides")
    assert _bars(_section(text, "Left out")) == [("the file ends too early", "600")]
