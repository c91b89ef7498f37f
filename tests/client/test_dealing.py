"""Dealing one set out to several hospitals: by patient, the same in every run, official splits kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client.dealing import Share, deal, hospital_of
from client.imaging import Membership, load
from privacy.errors import ConsiliumError

NAMES = ("north", "south", "west")
SPLIT = {"validation": 0.1, "test": 0.1}
KEY = bytes(32)


def _medmnist(tmp_path, count=60):
    rng = np.random.default_rng(3)
    arrays = {}
    for part in ("train", "val", "test"):
        arrays[f"{part}_images"] = rng.integers(0, 255, (count, 8, 8)).astype(np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 2, (count, 1)).astype(np.uint8)
    np.savez(tmp_path / "pneumoniamnist.npz", **arrays)
    return tmp_path / "pneumoniamnist.npz", arrays


def test_an_official_split_stays_with_each_image(tmp_path):
    file, arrays = _medmnist(tmp_path)
    made = deal(file, tmp_path / "out", NAMES)
    assert made.classes == ("normal", "pneumonia")
    dealt = []
    for hospital in made.shares:
        assert hospital.source.one_image_per_patient
        cohort = load(hospital.source, {"channels": 1, "size": [8, 8]}, made.classes, SPLIT, KEY, None)
        for side, part in zip(Membership, ("train", "val", "test"), strict=True):
            official = {image.tobytes() for image in arrays[f"{part}_images"]}
            mine = [np.rint(image * 255).astype(np.uint8).tobytes() for image in cohort.images[cohort.indices(side)]]
            assert mine
            assert official.issuperset(mine)
            dealt += mine
    assert len(dealt) == len(set(dealt)) == 180


def test_no_patient_is_at_two_hospitals(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    patients = [f"p{i % 40}" for i in range(150)]
    np.savez(folder / "images.npz", images=np.zeros((150, 8, 8), np.uint8))
    lines = ["file,label,group", *(f"{i},{i % 2},{patient}" for i, patient in enumerate(patients))]
    (folder / "index.csv").write_text("\n".join(lines))
    made = deal(folder, tmp_path / "out", NAMES)
    who = [set(np.load(h.source.path)["patients"].tolist()) for h in made.shares]
    assert sum(map(len, who)) == len(set.union(*who)) == 40
    assert sum(h.images for h in made.shares) == 150
    assert [h.patients for h in made.shares] == [len(names) for names in who]


def test_what_cannot_be_dealt_out_is_named(tmp_path):
    with pytest.raises(ConsiliumError, match="no image set that can be dealt out"):
        deal(tmp_path, tmp_path / "out", NAMES)
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8), np.uint8))
    (tmp_path / "index.csv").write_text("file,label\n1,0\n2,1\n")
    with pytest.raises(ConsiliumError, match="patient"):
        deal(tmp_path, tmp_path / "out", NAMES)


def test_dealing_repeats_itself_and_another_seed_deals_otherwise():
    first = [hospital_of(f"p{i}", i % 2, 7, 5) for i in range(500)]
    assert first == [hospital_of(f"p{i}", i % 2, 7, 5) for i in range(500)]
    assert first != [hospital_of(f"p{i}", i % 2, 8, 5) for i in range(500)]
    assert min(first.count(number) for number in range(5)) > 60


def test_hospitals_may_differ_in_whom_they_see():
    """With a mix of 4 and 5 hospitals, 4 of 8 patients with finding 1 go to hospital 1."""
    at = [hospital_of(f"p{i}", 1, 7, 5, mix=4) for i in range(2000)]
    assert at.count(1) == pytest.approx(1000, abs=100)


def _two_folders(tmp_path: Path) -> Path:
    for name in ("bern", "basel"):
        folder = tmp_path / "set" / name
        folder.mkdir(parents=True)
        np.savez(folder / "images.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4) % 2)
        (folder / "source.toml").write_text('kind = "npz"\npath = "images.npz"\none_image_per_patient = true\n')
    return tmp_path / "set"


def test_a_folder_for_each_hospital_is_taken_as_it_is(tmp_path):
    data = _two_folders(tmp_path)

    def folders(names) -> dict[str, str]:
        shares: tuple[Share, ...] = deal(data, tmp_path / "out", names).shares
        return {share.name: share.folder.name for share in shares}

    assert folders(("bern", "basel")) == {"bern": "bern", "basel": "basel"}
    assert folders(("one", "two")) == {"one": "basel", "two": "bern"}
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConsiliumError, match="another number"):
        deal(data, tmp_path / "out", NAMES)
