"""The operator's declaration: who the patient is, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.imaging import Columns, Source
from client.imaging.labels import class_of
from privacy.errors import ConsiliumError


def test_a_declaration_survives_the_file(tmp_path):
    source = Source(
        kind="dicom",
        path=Path("images"),
        labels=Path("labels.csv"),
        columns=Columns(patient="mrn", label="finding"),
        classes={"pos": "opacity"},
        modalities=("DX",),
    )
    (tmp_path / "source.toml").write_text(source.to_toml(), encoding="utf-8")
    assert Source.from_file(tmp_path / "source.toml") == source.anchored(tmp_path)
    assert Source.from_fields(source.model_dump(mode="json")) == source


WRONG = {
    "two answers to who is the patient": (
        {"kind": "npz", "path": "a.npz", "one_image_per_patient": True, "columns": {"patient": "p"}},
        "exclude each other",
    ),
    "NIfTI without a table or masks": ({"kind": "nifti", "path": "a"}, "needs a label table"),
    "NIfTI whose patient nobody names": (
        {"kind": "nifti", "path": "a", "labels": "l.csv"},
        "nothing names the patient",
    ),
    "masks without a word on patients": ({"kind": "images", "path": "a", "masks": "a/m"}, "nothing names the patient"),
    "a tag of files that have none": (
        {"kind": "images", "path": "a", "labels": "l.csv", "label_tag": "Modality", "one_image_per_patient": True},
        "--label-tag is for DICOM only",
    ),
    "a tag in place of a keyword": (
        {"kind": "dicom", "path": "a", "label_tag": "(0008,0060)"},
        "“\\(0008,0060\\)” for --label-tag; near it are Modality",
    ),
    "a mistyped keyword": ({"kind": "dicom", "path": "a", "label_tag": "Modalty"}, "near it are Modality,"),
    "a word that is near no keyword": ({"kind": "dicom", "path": "a", "label_tag": "x" * 90}, "such as BodyPart"),
    "a folder of masks beside DICOM": ({"kind": "dicom", "path": "a", "masks": "a/m"}, "masks is a folder"),
    "a patient column without a table": (
        {"kind": "dicom", "path": "a", "columns": {"patient": "p"}},
        "give --labels",
    ),
    "blank headers and no patient": (
        {"kind": "dicom", "path": "a", "labels": "l.csv", "placeholder_headers": True},
        "leaves nobody to name the patient",
    ),
    "an unknown kind": ({"kind": "tiff", "path": "a"}, "kind"),
    "an unknown field": ({"kind": "npz", "path": "a", "labells": "b"}, "labells"),
    "a declaration that is not a yes": ({"kind": "npz", "path": "a", "one_image_per_patient": "yes"}, "one_image"),
    "a split column for DICOM": (
        {"kind": "dicom", "path": "a", "labels": "l.csv", "columns": {"split": "s"}},
        "--split-column",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_declaration_says_what_to_put_right(name):
    fields, said = WRONG[name]
    with pytest.raises(ConsiliumError, match=said) as caught:
        Source.from_fields(fields, "site.toml")
    assert caught.value.subject == "site.toml"
    assert caught.value.remedy.startswith("Put right: ")


def test_a_file_that_is_no_declaration(tmp_path):
    (tmp_path / "source.toml").write_bytes(b"\xff\xfe not toml")
    with pytest.raises(ConsiliumError, match="data connect"):
        Source.from_file(tmp_path / "source.toml")


@pytest.mark.parametrize(("kind", "what"), [("dicom", "no such image folder"), ("npz", "no such image file")])
def test_what_is_not_there_is_named(tmp_path, kind, what):
    source = Source(kind=kind, path=tmp_path / "gone", labels=tmp_path / "gone.csv")
    with pytest.raises(ConsiliumError, match=what):
        source.check()


@pytest.mark.parametrize(
    ("value", "index"),
    [
        ("Normal", 0),
        ("OPACITY", 1),
        ("1", 1),
        ("1.0", 1),
        ("pos", 1),
        ("2", None),
        ("", None),
        ("nan", None),
        ("0.5", None),
    ],
)
def test_labels_match_by_own_word_name_or_number(value, index):
    assert class_of(value, ("normal", "opacity"), {"pos": "opacity"}) == index


def test_a_name_wins_over_a_number():
    assert class_of("1", ("1", "0"), {}) == 0
