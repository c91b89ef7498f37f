"""What is asked of a source before any study: its own words, and every image once."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as Pillow

from client.imaging import Columns, Source, load
from client.imaging.loading import READERS
from client.imaging.unasked import question


def _asked(source):
    reader = READERS[source.kind](source)
    reader.survey(lambda: None)
    return question(source, reader)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for at, name in enumerate("abc"):
        Pillow.fromarray(np.full((8, 8), 40 * at, np.uint8)).save(tmp_path / "images" / f"{name}.png")
        Pillow.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "images" / f"{name}_mask.png")
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("header", "rows", "columns", "classes", "target"),
    [
        (("file", "patient", "label"), [("a.png", "p", "mel"), ("b.png", "q", "nv")], {}, ("mel", "nv"), "class"),
        (("file", "patient", "label"), [("a.png", "p", "x;y"), ("b.png", "q", "y")], {}, ("x", "y"), "labels"),
        (("file", "patient", "u", "v"), [("a.png", "p", "1", "0")], {"labels": ("u", "v")}, ("u", "v"), "labels"),
    ],
)
def test_classes_are_the_tables_own_words(folder, table, key, header, rows, columns, classes, target):
    columns = Columns(patient="patient", **columns)
    source = Source(kind="images", path=folder, labels=table(rows, header=header), columns=columns)
    asked = _asked(source)
    assert (asked.classes, asked.target) == (classes, target)
    cohort = load(source, asked.input, asked.classes, {}, key, None, target=asked.target)
    assert len(cohort) == len(rows)
    assert cohort.images.shape[1:] == (3, 64, 64)


def test_masks_are_read_by_their_numbers(folder, table, key):
    names = table([("a.png", "p", "a_mask.png")], header=("file", "patient", "mask"))
    source = Source(kind="images", path=folder, labels=names, columns=Columns(patient="patient", mask="mask"))
    asked = _asked(source)
    cohort = load(source, asked.input, asked.classes, {}, key, None, target=asked.target)
    assert set(np.unique(cohort.targets)) == {0, 255}


def test_tags_and_numbers(tmp_path, dataset, save, table):
    save(dataset(BodyPartExamined="CHEST"), "images/a.dcm")
    save(dataset(BodyPartExamined="HEAD"), "images/b.dcm")
    tagged = _asked(Source(kind="dicom", path=tmp_path / "images", label_tag="BodyPartExamined"))
    assert (tagged.classes, tagged.target) == (("CHEST", "HEAD"), "class")
    np.savez(tmp_path / "s.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.zeros(2))
    plain = _asked(Source(kind="npz", path=tmp_path / "s.npz", one_image_per_patient=True))
    assert plain.classes[:2] == ("0", "1")
    bare = _asked(Source(kind="dicom", path=tmp_path / "images"))
    assert bare.target == "mask"


MANY = np.arange(6 * 5 * 8 * 8).reshape(6, 5, 8, 8).astype(np.uint8)
FLAT, WHOLE = (6, 3, 64, 64), (6, 1, 16, 64, 64)
STORED = {
    "numbers": ({"images": MANY[:, 0], "labels": np.arange(6)}, "class", ("0", "1"), FLAT),
    "reals": ({"images": MANY[:, 0], "labels": np.arange(6) / 1.0}, "class", ("0", "1"), FLAT),
    "words": ({"images": MANY[:, 0], "labels": np.array([*"babaab"])}, "class", ("a", "b"), FLAT),
    "several": ({"images": MANY[:, 0], "labels": np.eye(6)[:, :4]}, "labels", ("0", "1", "2", "3"), FLAT),
    "words together": ({"images": MANY[:, 0], "labels": np.array(["a;b", *"babab"])}, "labels", ("a", "b"), FLAT),
    "masks": ({"images": MANY[:, 0], "masks": MANY[:, 1] % 3}, "mask", ("0", "1"), FLAT),
    "volumes": ({"images": MANY, "labels": np.arange(6), "spacing": np.ones(3)}, "class", ("0", "1"), WHOLE),
    "their masks": ({"images": MANY, "masks": MANY % 3, "spacing": np.ones(3)}, "mask", ("0", "1"), WHOLE),
    "colour": ({"images": MANY[..., :3], "labels": np.arange(6)}, "class", ("0", "1"), FLAT),
    "colour volumes": ({"images": np.stack([MANY] * 3, -1), "labels": np.arange(6)}, "class", ("0", "1"),
                       (6, 3, 16, 64, 64)),
}  # fmt: skip


@pytest.mark.parametrize("part", ["", "train_"])
@pytest.mark.parametrize("name", STORED)
def test_npz_arrays_say_what_can_be_asked(tmp_path, key, name, part):
    arrays, target, classes, shape = STORED[name]
    named = {word if word == "spacing" else f"{part}{word}": array for word, array in arrays.items()}
    np.savez(tmp_path / "s.npz", **named)
    source = Source(kind="npz", path=tmp_path / "s.npz", one_image_per_patient=True)
    asked = _asked(source)
    assert (asked.target, asked.classes[: len(classes)]) == (target, classes)
    cohort = load(source, asked.input, asked.classes, {}, key, None, target=asked.target)
    assert cohort.images.shape == shape
    assert not cohort.quarantine
