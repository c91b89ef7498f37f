"""Label tables as hospitals write them: headers, file names, odd words, and what is said where nothing fits."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as Pillow

from client.imaging import Columns, Source
from client.imaging.folder import ImageFolder
from client.imaging.labels import check_table, unlike
from client.imaging.records import Quarantined, Reason, Target, Wanted
from privacy.errors import ConsiliumError

WANTED = Wanted(1, 2, ("a", "b"))
PATIENT = Columns(patient="patient")


@pytest.fixture
def images(tmp_path):
    """(name, ...) -> a folder with a small PNG under each name, whatever its ending."""

    def make(*names):
        for name in names:
            file = tmp_path / "images" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Pillow.fromarray(np.eye(4, dtype=np.uint8)).save(file, "png")
        return tmp_path / "images"

    return make


def _listed(source, wanted=WANTED):
    reader = ImageFolder(source)
    reader.survey(lambda: None)
    return reader.index(wanted)


@pytest.mark.parametrize("said", ["ISIC_1", "isic_1", "ISIC_1.PNG", "isic_1.png", "Deep/isic_1", ".\\Deep\\ISIC_1.png"])
def test_capitals_and_endings_may_be_left_to_the_file(images, table, said):
    source = Source(
        kind="images", path=images("Deep/ISIC_1.png", "c.png"), labels=table([(said, "p", "a")]), columns=PATIENT
    )
    listing = _listed(source)
    assert [record.path for record in listing.records] == ["Deep/ISIC_1.png"]
    assert [(item.path, item.reason) for item in listing.quarantine] == [("c.png", Reason.NO_LABEL)]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("x/a.png", "y/a.png"), ["a"]),  # two files
        (("x/a.png", "y/A.jpg"), ["a"]),
        (("x/a.png", "y/a"), ["A"]),
        (("A.png",), ["a.png", "a.PNG"]),  # two rows
        (("a.png",), ["a.jpg"]),  # another file
        (("1.2.840.png",), ["1.2"]),  # dots in a UID are no ending
        (("001.png",), ["1"]),
    ],
)
def test_a_name_that_could_be_another_files_is_not_guessed_at(images, table, files, said):
    rows = [(name, f"p{at}", "a") for at, name in enumerate(said)]
    listing = _listed(Source(kind="images", path=images(*files), labels=table(rows), columns=PATIENT))
    assert not listing.records
    assert {item.reason for item in listing.quarantine} == {Reason.NO_LABEL, Reason.NO_FILE}


def test_a_whole_name_goes_before_one_that_is_like_it(images, table):
    rows = [("a.png", "p", "a"), ("A.png", "q", "b")]
    listing = _listed(Source(kind="images", path=images("a.png", "A.png"), labels=table(rows), columns=PATIENT))
    assert {record.path: record.patient for record in listing.records} == {"a.png": "p", "A.png": "q"}


@pytest.mark.parametrize(
    ("entries", "files", "pair"),
    [
        (["1", "2"], ["001.png", "010.png", "100.png"], ("1", "001.png")),
        (["/data/x/b.png"], ["a.png", "b.png"], ("/data/x/b.png", "b.png")),
        (["img-7"], ["img_7.png", "other.png"], ("img-7", "img_7.png")),
    ],
)
def test_names_that_do_not_find_each_other_are_shown_side_by_side(entries, files, pair):
    out = [Quarantined(name, Reason.NO_LABEL) for name in files]
    assert unlike(out) == ""
    out += [Quarantined(name, Reason.NO_FILE) for name in ["(empty)", *entries]]
    assert unlike(out).startswith(f"The table names “{pair[0]}” where the folder has “{pair[1]}”")


def test_spaces_around_a_header_do_not_count(images, table):
    labels = table([("a.png", "p", "a")], header=("file ", " patient", "label"))
    assert len(_listed(Source(kind="images", path=images("a.png"), labels=labels, columns=PATIENT)).records) == 1


@pytest.mark.parametrize(
    ("header", "columns", "said"),
    [
        (
            ("file", "mrn", "label"),
            {"patient": "patient"},
            "“file”, “mrn”, “label”: connect it again with --patient-col",
        ),
        (("file", "patient", "dx"), {"patient": "patient"}, "with --label-column"),
        (("file", "patient", "label"), {"patient": "patient", "labels": ("a",)}, "with --labels-column"),
        (("file", "patient", "label", "label "), {"patient": "patient"}, "several columns “label”"),
    ],
)
def test_a_wrong_column_is_told_at_once_with_its_option(images, table, header, columns, said):
    labels = table([("a.png", "p", "a", "b")], header=header)
    source = Source(kind="images", path=images("a.png"), labels=labels, columns=Columns(**columns))
    with pytest.raises(ConsiliumError, match=said):
        check_table(source)


def test_a_label_column_is_not_asked_for_where_masks_may_take_its_place(images, table):
    labels = table([("a.png", "p", "m.png")], header=("file", "patient", "mask"))
    check_table(
        Source(kind="images", path=images("a.png"), labels=labels, columns=Columns(patient="patient", mask="mask"))
    )
    check_table(Source(kind="dicom", path=images("a.png"), labels=labels, columns=PATIENT))


def test_an_odd_word_in_the_split_column_is_named_with_its_line(images, table):
    rows = [("a.png", "p", "a", "train"), ("b.png", "q", "b", "holdout")]
    labels = table(rows, header=("file", "patient", "label", "split"))
    columns = Columns(patient="patient", split="split")
    with pytest.raises(ConsiliumError, match=r"line 3: “holdout”.*--no-own-split"):
        _listed(Source(kind="images", path=images("a.png", "b.png"), labels=labels, columns=columns))


@pytest.mark.parametrize(
    ("rows", "path", "reason", "said"),
    [
        ([("a.png", "p", "maybe")], "a.png", Reason.UNKNOWN_LABEL, "neither yes nor no"),
        ([("a.png", "p", "yes"), ("a.png", "q", "yes")], "a.png", Reason.PATIENTS, "two rows, two patients"),
        ([("../b.png", "p", "yes")], "../b.png", Reason.SYMLINK, "leads out of the folder"),
        ([("/etc/passwd", "p", "yes")], "/etc/passwd", Reason.SYMLINK, "leads out of the folder"),
        ([("x/../b.png", "p", "yes")], "x/../b.png", Reason.NO_FILE, "no such image"),
    ],
)
def test_reasons_say_what_it_is(images, table, rows, path, reason, said):
    labels = table(rows, header=("file", "patient", "Mass"))
    source = Source(
        kind="images", path=images("a.png"), labels=labels, columns=Columns(patient="patient", labels=("Mass",))
    )
    found = {item.path: item for item in _listed(source, Wanted(1, 2, ("Mass",), Target.LABELS)).quarantine}
    assert found[path].reason is reason
    assert said in found[path].text
    assert "header" not in found[path].text
