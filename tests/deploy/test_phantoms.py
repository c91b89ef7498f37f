"""The demo's images: valid, labelled synthetic, the same every time, and readable by the imaging room."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from pydicom import dcmread

from client.imaging import Membership, Source, load
from deploy.demo import phantoms

KEY = b"k" * 32
SPEC = {"channels": 1, "size": [64, 64]}
SPLIT = {"validation": 0.15, "test": 0.2}


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory):
    return phantoms.generate(tmp_path_factory.mktemp("phantoms"), patients=24)


@pytest.fixture(scope="module")
def cohorts(hospitals):
    return {h.name: load(h.source, SPEC, phantoms.CLASSES, SPLIT, KEY, None) for h in hospitals}


def _hash(folder):
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name in ("a", "b", "c"):
        phantoms.generate(tmp_path / name, seed=8 if name == "c" else 7, patients=5)
    assert _hash(tmp_path / "a") == _hash(tmp_path / "b") != _hash(tmp_path / "c")


def test_every_image_says_that_it_is_synthetic(hospitals):
    for hospital in hospitals:
        files = list((hospital.folder / "images").glob("PHANTOM-*/*.dcm"))
        assert len(files) == hospital.images
        for file in files:
            header = dcmread(file, stop_before_pixels=True)
            assert str(header.PatientName).startswith("PHANTOM^")
            assert header.ImageComments.startswith("Synthetic phantom")


def test_the_hospitals_scanners_differ(hospitals):
    seen = {}
    for hospital in hospitals:
        headers = [dcmread(f, stop_before_pixels=True) for f in (hospital.folder / "images").glob("PHANTOM-*/*.dcm")]
        seen[hospital.name] = {
            (h.Manufacturer, h.Rows, h.BitsStored, h.PhotometricInterpretation, h.file_meta.TransferSyntaxUID.name)
            for h in headers
        }
    everything = set.union(*seen.values())
    assert len(everything) == sum(len(kinds) for kinds in seen.values())
    assert {kind[3] for kind in everything} == {"MONOCHROME1", "MONOCHROME2"}
    assert {kind[2] for kind in everything} == {12, 16}
    assert any("JPEG-LS" in kind[4] for kind in everything)


def test_everything_is_read_or_left_out_for_the_planted_reason(hospitals, cohorts):
    planted = {"truncated": 1, "not-dicom": 1, "no-pixel-data": 1, "no-label": 1, "duplicate": 1}
    for hospital in hospitals:
        cohort = cohorts[hospital.name]
        assert len(cohort) == hospital.images
        assert len(set(cohort.patients)) == hospital.patients
        assert cohort.summary()["quarantine"] == planted
        assert sum(planted.values()) == hospital.broken
        assert set(cohort.targets[list(cohort.indices(Membership.TRAIN))].tolist()) == {0, 1}


def test_all_hospitals_show_dark_lungs_between_bright_walls(cohorts):
    """Polarity and window are undone the same way everywhere: spine brighter than lung, air outside black."""
    for cohort in cohorts.values():
        mean = np.asarray(cohort.images).mean(axis=(0, 1))
        spine, lungs, corner = mean[30:40, 31:33].mean(), mean[24:32, 16:20].mean(), mean[:3, :3].mean()
        assert corner < lungs < spine


def test_the_opacity_brightens_the_lungs(hospitals, cohorts):
    lungs = np.concatenate([np.asarray(c.images)[:, 0, 20:44, 12:52].mean(axis=(1, 2)) for c in cohorts.values()])
    labels = np.concatenate([c.targets for c in cohorts.values()])
    assert lungs[labels == 1].mean() > lungs[labels == 0].mean()


def test_the_written_declaration_is_the_one_returned(hospitals):
    for hospital in hospitals:
        assert Source.from_file(hospital.folder / "source.toml") == hospital.source
