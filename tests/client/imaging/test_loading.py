"""A declared source to a cohort: progress, the cache, and images that do not depend on their neighbours."""

from __future__ import annotations

import errno
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.imaging import Columns, Membership, Reason, Source, cache, load
from privacy.errors import ConsiliumError

CLASSES = ("normal", "opacity")
SPEC = {"channels": 1, "size": [6, 8]}
SPLIT = {"validation": 0.2, "test": 0.3}


@pytest.fixture
def hospital(tmp_path, dataset, save, table):
    """12 patients, 18 images, one text file among them."""
    rows = []
    for patient in range(12):
        for image in range(1 + patient % 2):
            pixels = np.random.default_rng([patient, image]).integers(0, 4096, (12, 16)).astype(np.uint16)
            save(dataset(pixels, PatientID=f"P{patient}"), f"images/{patient}-{image}.dcm")
            rows.append((f"{patient}-{image}.dcm", f"p{patient}", CLASSES[patient % 2]))
    (tmp_path / "images" / "note.dcm").write_text("not an image")
    labels = table(rows)
    return Source(kind="dicom", path=tmp_path / "images", labels=labels, columns=Columns(patient="patient"))


def _entries(folder):
    return [item for item in folder.iterdir() if item.is_dir()]


def _load(source, key, cache_dir=None, **more):
    return load(source, SPEC, CLASSES, SPLIT, key, cache_dir, **more)


def test_a_hospital_becomes_a_cohort(hospital, key):
    steps = []
    cohort = _load(hospital, key, progress=lambda done, total: steps.append((done, total)))
    assert cohort.images.shape == (18, 1, 6, 8)
    assert cohort.images.dtype == np.float32
    assert cohort.targets.dtype == np.int64
    assert len(set(cohort.patients)) == 12
    assert not any("p1" in name for name in cohort.patients if not set(name) <= set("0123456789abcdef"))
    assert [(q.path, q.reason) for q in cohort.quarantine] == [("note.dcm", Reason.NOT_DICOM)]
    assert cohort.scanners == {"Maker Model": 18}
    assert steps[-1] == (38, 38)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_images_cannot_be_written(hospital, key, tmp_path):
    for cohort in (_load(hospital, key), _load(hospital, key, tmp_path / "cache")):
        with pytest.raises(ValueError, match="read-only"):
            cohort.images[0, 0, 0, 0] = 1


def test_the_second_load_reads_no_image(hospital, key, tmp_path):
    prepared = []

    def prepare(image):
        prepared.append(image)
        return image[:, ::2, ::2]

    first = _load(hospital, key, tmp_path / "cache", prepare=prepare)
    assert len(prepared) == 18
    second = _load(hospital, key, tmp_path / "cache", prepare=prepare)
    assert len(prepared) == 18
    assert np.array_equal(first.images, second.images)
    assert (first.patients, first.membership) == (second.patients, second.membership)
    assert (first.quarantine, first.scanners) == (second.quarantine, second.scanners)


def test_a_changed_file_input_or_key_is_prepared_anew(hospital, key, tmp_path):
    folder = tmp_path / "cache"
    _load(hospital, key, folder)
    (hospital.path / "0-0.dcm").unlink()
    assert len(_load(hospital, key, folder)) == 17
    load(hospital, {**SPEC, "size": [4, 4]}, CLASSES, SPLIT, key, folder)
    _load(hospital, key[::-1], folder)
    assert len(_entries(folder)) == 4


def test_another_split_uses_the_same_images(hospital, key, tmp_path):
    folder = tmp_path / "cache"
    _load(hospital, key, folder)
    everyone = load(hospital, SPEC, CLASSES, {}, key, folder)
    assert set(everyone.membership) == {Membership.TRAIN}
    assert len(_entries(folder)) == 1


def test_the_cache_is_private_and_does_not_grow(hospital, key, tmp_path):
    folder = tmp_path / "cache"
    for side in range(4, 4 + cache.KEEP + 2):
        load(hospital, {**SPEC, "size": [side, side]}, CLASSES, SPLIT, key, folder)
    entries = _entries(folder)
    assert len(entries) == cache.KEEP
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(entry.stat().st_mode) == 0o700 for entry in entries)


@pytest.mark.parametrize("damage", ["images.raw", "targets.raw", "facts.json"])
def test_a_damaged_cache_is_made_again(hospital, key, tmp_path, damage):
    folder = tmp_path / "cache"
    first = np.array(_load(hospital, key, folder).images)
    (file,) = folder.glob(f"*/{damage}")
    file.write_bytes(file.read_bytes()[:50])
    assert np.array_equal(_load(hospital, key, folder).images, first)


def test_a_full_disk_costs_the_cache_only(hospital, key, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    assert len(_load(hospital, key, tmp_path / "cache")) == 18
    assert not _entries(tmp_path / "cache")


def test_a_transform_that_fails_on_one_image_leaves_it_out(hospital, key):
    calls = []

    def prepare(image):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("odd image")
        return image[:, ::2, ::2] if len(calls) > 2 else image * np.nan

    cohort = _load(hospital, key, prepare=prepare)
    assert len(cohort) == 16
    assert {q.reason for q in cohort.quarantine} == {Reason.PREPARATION, Reason.NOT_DICOM}


def test_a_source_without_a_usable_image_says_why(hospital, key):
    for file in hospital.path.glob("*.dcm"):
        file.write_text("ruined")
    with pytest.raises(ConsiliumError, match="19 × not a DICOM file"):
        _load(hospital, key)


def test_classes_the_table_does_not_know(hospital, key):
    with pytest.raises(ConsiliumError, match="18 × the label is none of the classes"):
        load(hospital, SPEC, ("cat", "dog"), SPLIT, key, None)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gone=st.sets(st.integers(0, 11), max_size=10))
def test_n5_a_patients_images_and_side_do_not_depend_on_the_others(hospital, key, tmp_path, gone):
    """Whoever else is taken away, those who stay have the same pixels, labels and side."""
    whole = _load(hospital, key)
    folder = tmp_path / "fewer"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(hospital.path, folder)
    for file in folder.glob("*-*.dcm"):
        if int(file.name.split("-")[0]) in gone:
            file.unlink()
    fewer = _load(hospital.model_copy(update={"path": folder}), key)
    assert len(set(fewer.patients)) == 12 - len(gone)
    for side in Membership:
        for name, rows in fewer.groups(side).items():
            before = whole.groups(side)[name]
            assert np.array_equal(whole.images[before], fewer.images[rows])
            assert np.array_equal(whole.targets[before], fewer.targets[rows])


def test_rubbish_by_the_thousand_is_counted(hospital, key):
    rng = np.random.default_rng(0)
    for number in range(1000):
        (Path(hospital.path) / f"rubbish-{number}").write_bytes(rng.bytes(int(rng.integers(0, 400))))
    cohort = _load(hospital, key)
    assert len(cohort) == 18
    assert cohort.summary()["quarantine"] == {"not-dicom": 1001}
