"""A folder of DICOM files: labels, patients, copies, links, and nothing that stops the rest."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import generate_uid

from client.imaging import Columns, Source
from client.imaging.dicom_folder import DicomFolder
from client.imaging.records import Reason, Target, Wanted
from privacy.errors import ConsiliumError

CLASSES = ("normal", "opacity")
WANTED = Wanted(1, 2, CLASSES)


def _folder(tmp_path: Path, **fields) -> DicomFolder:
    settings = {"columns": Columns(patient="patient"), **fields}
    return DicomFolder(Source(kind="dicom", path=tmp_path / "images", labels=tmp_path / "labels.csv", **settings))


def _index(folder: DicomFolder):
    ticks = []
    folder.survey(lambda: ticks.append(1))
    listing = folder.index(WANTED)
    assert len(ticks) == folder.size()
    return {r.path: r for r in listing.records}, {q.path: q.reason for q in listing.quarantine}


def test_files_are_found_below_and_matched_by_path_or_unique_name(tmp_path, dataset, save, table):
    save(dataset(), "images/deep/er/a.dcm")
    save(dataset(PatientID="P2"), "images/b.dcm")
    table([("deep/er/a.dcm", "p1", "normal"), (".\\b.dcm", "p2", "Opacity")])
    records, out = _index(_folder(tmp_path))
    assert not out
    assert {path: (r.patient, r.target, r.scanner) for path, r in records.items()} == {
        "b.dcm": ("p2", 1, "Maker Model"),
        "deep/er/a.dcm": ("p1", 0, "Maker Model"),
    }


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_name_without_its_folder_is_enough_where_it_is_unique(tmp_path, dataset, save, table, delimiter):
    save(dataset(), "images/2024/a.dcm")
    table([("a.dcm", "p1", "1.0")], delimiter=delimiter)
    records, _ = _index(_folder(tmp_path))
    assert records["2024/a.dcm"].target == 1


@pytest.mark.parametrize("match", ["instance", "series"])
def test_rows_can_name_uids(tmp_path, dataset, save, table, match):
    made = dataset()
    save(made, "images/a.dcm")
    uid = made.SOPInstanceUID if match == "instance" else made.SeriesInstanceUID
    table([(uid, "p1", "normal"), ("1.2.3", "p9", "normal")])
    records, out = _index(_folder(tmp_path, match=match))
    assert list(records) == ["a.dcm"]
    assert out == {"1.2.3": Reason.NO_FILE}


def test_each_bad_file_has_its_reason_and_the_rest_goes_on(tmp_path, dataset, save, table):
    good = save(dataset(), "images/good.dcm")
    (tmp_path / "images/letter.dcm").write_text("not an image")
    (tmp_path / "images/cut.dcm").write_bytes(good.read_bytes()[:-30])
    save(dataset(PatientID="P2", Modality="SEG"), "images/mask.dcm")
    save(dataset(PatientID="P3", Modality="MR"), "images/mr.dcm")
    frames = np.zeros((3, 12, 16), np.uint16).reshape(36, 16)
    save(dataset(frames, PatientID="P4", Rows=12, NumberOfFrames="3"), "images/movie.dcm")
    save(dataset(PatientID="P5"), "images/stranger.dcm")
    save(dataset(PatientID="P6"), "images/odd.dcm")
    save(dataset(PatientID="P7"), "images/torn.dcm")
    save(dataset(PatientID="P8"), "images/nobody.dcm")
    os.mkfifo(tmp_path / "images/pipe.dcm")
    rows = [
        (f"{name}.dcm", name, "normal") for name in ("good", "letter", "cut", "mask", "mr", "movie", "pipe", "gone")
    ]
    rows += [("odd.dcm", "odd", "maybe"), ("torn.dcm", "torn", "normal"), ("torn.dcm", "torn", "opacity")]
    table([*rows, ("nobody.dcm", " ", "normal")])
    records, out = _index(_folder(tmp_path, modalities=("CR", "DX")))
    assert {path: record.count for path, record in records.items()} == {"good.dcm": 1, "movie.dcm": 3}
    assert out == {
        "letter.dcm": Reason.NOT_DICOM,
        "cut.dcm": Reason.TRUNCATED,
        "mask.dcm": Reason.MODALITY,
        "mr.dcm": Reason.MODALITY,
        "stranger.dcm": Reason.NO_LABEL,
        "odd.dcm": Reason.UNKNOWN_LABEL,
        "torn.dcm": Reason.LABELS,
        "nobody.dcm": Reason.NO_PATIENT,
        "pipe.dcm": Reason.NOT_REGULAR,
        "gone.dcm": Reason.NO_FILE,
    }


def test_links_never_lead_out_of_the_folder(tmp_path, dataset, save, table):
    save(dataset(), "images/inside.dcm")
    secret = save(dataset(PatientID="P2"), "elsewhere/secret.dcm")
    (tmp_path / "images/link.dcm").symlink_to(secret)
    (tmp_path / "images/linked").symlink_to(secret.parent)
    (tmp_path / "images/dangling.dcm").symlink_to(tmp_path / "images" / "nothing")
    table([("inside.dcm", "p1", "normal"), ("link.dcm", "p2", "normal"), ("../elsewhere/secret.dcm", "p2", "normal")])
    records, out = _index(_folder(tmp_path))
    assert list(records) == ["inside.dcm"]
    assert out == {
        "link.dcm": Reason.SYMLINK,
        "linked": Reason.SYMLINK,
        "dangling.dcm": Reason.NOT_REGULAR,
        "../elsewhere/secret.dcm": Reason.SYMLINK,
    }


def test_a_copy_is_kept_once(tmp_path, dataset, save, table):
    first = save(dataset(), "images/a.dcm")
    shutil.copy(first, tmp_path / "images/b.dcm")
    table([("a.dcm", "p1", "normal"), ("b.dcm", "p1", "normal")])
    records, out = _index(_folder(tmp_path))
    assert list(records) == ["a.dcm"]
    assert out == {"b.dcm": Reason.DUPLICATE}


def test_a_truncated_copy_does_not_displace_the_whole_one(tmp_path, dataset, save, table):
    whole = save(dataset(), "images/b.dcm")
    (tmp_path / "images/a.dcm").write_bytes(whole.read_bytes()[:-30])
    table([("a.dcm", "p1", "normal"), ("b.dcm", "p1", "normal")])
    records, out = _index(_folder(tmp_path))
    assert list(records) == ["b.dcm"]
    assert out == {"a.dcm": Reason.TRUNCATED}


@pytest.mark.parametrize("shared", ["PatientID", "SeriesInstanceUID", "StudyInstanceUID", "SOPInstanceUID"])
def test_one_patient_under_two_names_is_left_out(tmp_path, dataset, save, table, shared):
    tag = {"PatientID": "P1"}.get(shared) or generate_uid()
    for number, name in enumerate("ab"):
        made = dataset(**{"PatientID": f"Q{number}", **({"SOPInstanceUID": tag} if shared == "SOPInstanceUID" else {})})
        setattr(made, shared, tag)
        save(made, f"images/{name}.dcm")
    save(dataset(PatientID="P3"), "images/c.dcm")
    table([("a.dcm", "one", "normal"), ("b.dcm", "two", "normal"), ("c.dcm", "three", "opacity")])
    records, out = _index(_folder(tmp_path))
    assert list(records) == ["c.dcm"]
    assert out == {"a.dcm": Reason.PATIENTS, "b.dcm": Reason.PATIENTS}


def test_placeholder_headers_are_believed_only_when_declared(tmp_path, dataset, save, table):
    for name in "ab":
        save(dataset(PatientID="ANONYMOUS"), f"images/{name}.dcm")
    table([("a.dcm", "one", "normal"), ("b.dcm", "two", "normal")])
    assert not _index(_folder(tmp_path))[0]
    assert len(_index(_folder(tmp_path, placeholder_headers=True))[0]) == 2


def test_the_patient_comes_from_the_header_where_the_table_has_none(tmp_path, dataset, save, table):
    save(dataset(PatientID="MRN7"), "images/a.dcm")
    table([("a.dcm", "normal")], header=("file", "label"))
    records, _ = _index(_folder(tmp_path, columns=Columns()))
    assert records["a.dcm"].patient == "MRN7"


def test_a_folder_that_names_no_patient_is_refused(tmp_path, dataset, save, table):
    save(dataset(PatientID=""), "images/a.dcm")
    table([("a.dcm", "normal")], header=("file", "label"))
    with pytest.raises(ConsiliumError, match="--one-image-per-patient") as caught:
        _index(_folder(tmp_path, columns=Columns()))
    assert caught.value.what == "No image says who its patient is"
    records, _ = _index(_folder(tmp_path, columns=Columns(), one_image_per_patient=True))
    assert records["a.dcm"].patient == "a.dcm"


def test_a_false_declaration_of_one_image_per_patient_is_noticed(tmp_path, dataset, save, table):
    for name in "ab":
        save(dataset(PatientID="P1"), f"images/{name}.dcm")
    table([("a.dcm", "normal"), ("b.dcm", "normal")], header=("file", "label"))
    folder = _folder(tmp_path, columns=Columns(), one_image_per_patient=True)
    _, out = _index(folder)
    assert out == {"a.dcm": Reason.PATIENTS, "b.dcm": Reason.PATIENTS}
    assert all("against --one-image-per-patient" in item.text for item in folder.index(WANTED).quarantine)


def test_where_some_images_name_their_patient_the_source_is_not_said_to_name_none(tmp_path, dataset, save, table):
    save(dataset(PatientID=""), "images/a.dcm")
    save(dataset(PatientID="P2"), "images/b.dcm")
    table([("a.dcm", "normal"), ("b.dcm", "maybe")], header=("file", "label"))
    records, out = _index(_folder(tmp_path, columns=Columns()))
    assert not records
    assert out == {"a.dcm": Reason.NO_PATIENT, "b.dcm": Reason.UNKNOWN_LABEL}


def test_a_segmentation_without_its_images_is_not_called_of_another_modality_alone(tmp_path, dataset, save):
    save(dataset(Modality="SEG"), "images/liver.dcm")
    folder = DicomFolder(Source(kind="dicom", path=tmp_path / "images"))
    folder.survey(lambda: None)
    (left,) = folder.index(Wanted(1, 2, ("background", "liver"), Target.MASK)).quarantine
    assert (left.reason, left.detail) == (Reason.MODALITY, "SEG of images that are not here")


def test_a_missing_column_names_those_there_are(tmp_path, dataset, save, table):
    save(dataset(), "images/a.dcm")
    table([("a.dcm", "p", "normal")], header=("file", "mrn", "label"))
    with pytest.raises(ConsiliumError, match="“mrn”"):
        _folder(tmp_path)


def test_the_fingerprint_follows_files_and_table(tmp_path, dataset, save, table):
    file = save(dataset(), "images/a.dcm")
    table([("a.dcm", "p1", "normal")])

    def fingerprint():
        folder = _folder(tmp_path)
        folder.survey(lambda: None)
        return folder.fingerprint()

    first = fingerprint()
    os.utime(file, ns=(1, 1))
    assert fingerprint() == first  # touched, not changed
    save(dataset(), "images/a.dcm")
    second = fingerprint()
    table([("a.dcm", "p1", "opacity")])
    assert len({first, second, fingerprint()}) == 3


def test_reasons_carry_no_patient_data(tmp_path, dataset, save, table):
    save(dataset(PatientID="SECRET-MRN", PatientName="Doe^Jane", Modality="JANE DOE"), "images/a.dcm")
    save(dataset(PatientID="SECRET-MRN", Modality="doe, jane"), "images/b.dcm")
    save(dataset(PatientID="SECRET-MRN"), "images/c.dcm")
    save(dataset(PatientID="SECRET-MRN"), "images/d.dcm")
    table([("c.dcm", "x", "normal"), ("d.dcm", "y", "Jane Doe")])
    folder = _folder(tmp_path, modalities=("CR",))
    folder.survey(lambda: None)
    listing = folder.index(WANTED)
    words = " ".join(item.text for item in listing.quarantine).lower()
    assert len(listing.quarantine) == 3
    assert "secret" not in words
    assert "doe, jane" not in words


def test_real_folder_is_listed_whole(real_set, tmp_path, table):
    """Every real scanner's file by its PatientID; what has none or is no DICOM has a reason."""
    root = real_set("scanner_dicom")
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.dcm"))
    labels = table([(name, str(i % 2)) for i, name in enumerate(names)], header=("file", "label"))
    folder = DicomFolder(Source(kind="dicom", path=root, labels=labels))
    records, out = _index(folder)
    assert len(records) + len(out) == folder.size()
    assert len(records) >= 90
    assert set(out.values()) <= {Reason.NOT_DICOM, Reason.NO_PATIENT, Reason.DUPLICATE}
    (picture,) = folder.opener.read(next(iter(records.values())), WANTED)
    assert picture.image.dtype == np.float32
