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
        assert hospital.patients == hospital.images
        cohort = load(hospital.source, {"channels": 1, "size": [8, 8]}, made.classes, SPLIT, KEY, None)
        for side, part in zip(Membership, ("train", "val", "test"), strict=True):
            official = {image.tobytes() for image in arrays[f"{part}_images"]}
            mine = [np.rint(image * 255).astype(np.uint8).tobytes() for image in cohort.images[cohort.indices(side)]]
            assert mine
            assert official.issuperset(mine)
            dealt += mine
    assert len(dealt) == len(set(dealt)) == 180
    assert made.note == "pneumoniamnist names no patients: each image counts as one patient."


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


SPACING = np.array([3.0, 1.0])
WHO = np.array([f"p{row % 12}" for row in range(60)])
LABELS = {
    "classes": np.array([*"abc"] * 20),
    "several": np.eye(60)[:, :3],
    "masks": None,
    "bytes": np.array([b"a"] * 60),
}


def _arrays(labels: np.ndarray | None, prefix: str, first: int) -> dict[str, np.ndarray]:
    images = np.arange(60 * 8 * 8).reshape(60, 8, 8).astype(np.uint16) + 4096 * first
    arrays = {"images": images, "patients": WHO, "masks": (images % 3).astype(np.uint8)}
    if labels is not None:
        arrays["labels"] = labels
    return {f"{prefix}{word}": array for word, array in arrays.items()}


@pytest.mark.parametrize("name", LABELS)
def test_patients_masks_and_spacing_go_with_their_images(tmp_path, name):
    np.savez(tmp_path / "set.npz", **_arrays(LABELS[name], "", 0), spacing=SPACING)
    made = deal(tmp_path / "set.npz", tmp_path / "out", NAMES)
    assert made.classes == {"classes": ("a", "b", "c"), "bytes": ("a",)}.get(name, ())
    assert made.note == ""
    assert sum(share.patients for share in made.shares) == 12
    whole = dict(np.load(tmp_path / "set.npz"))
    found = []
    for share in made.shares:
        assert not share.source.one_image_per_patient
        mine = dict(np.load(share.source.path))
        assert mine.pop("spacing").tolist() == SPACING.tolist()
        rows = mine["images"][:, 0, 0] // 64
        for word, array in mine.items():
            assert np.array_equal(array, whole[word][rows])
        assert share.patients == len({str(who) for who in mine["patients"]})
        found += rows.tolist()
    assert sorted(found) == list(range(60))


def test_patients_of_an_official_split_stay_together(tmp_path):
    parts = {}
    for first, part in enumerate(("train", "val", "test")):
        arrays = _arrays(LABELS["classes"], f"{part}_", first)
        parts |= arrays | {f"{part}_patients": np.array([f"{part}{who}" for who in WHO])}
    np.savez(tmp_path / "set.npz", **parts)
    made = deal(tmp_path / "set.npz", tmp_path / "out", NAMES)
    assert sum(share.patients for share in made.shares) == 36
    sides = {"train": Membership.TRAIN, "val": Membership.VALIDATION, "test": Membership.TEST}
    for share in made.shares:
        cohort = load(share.source, {"channels": 1, "size": [8, 8]}, made.classes, SPLIT, KEY, None)
        arrays = np.load(share.source.path)
        for part, side in sides.items():
            assert len(cohort.indices(side)) == len(arrays[f"{part}_images"])
        assert len(set(cohort.patients)) == share.patients


def test_masks_beside_an_index_need_no_label(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    images = np.arange(60 * 64).reshape(60, 8, 8).astype(np.uint16)
    np.savez(folder / "images.npz", images=images, masks=images % 3)
    (folder / "index.csv").write_text("\n".join(["file,patient", *(f"{row},{who}" for row, who in enumerate(WHO))]))
    for share in deal(folder, tmp_path / "out", NAMES).shares:
        mine = np.load(share.source.path)
        assert sorted(mine) == ["images", "masks", "patients"]
        assert np.array_equal(mine["masks"], mine["images"] % 3)


def test_images_of_nobody_are_left_out_and_counted(tmp_path):
    who = np.array([1.0, np.nan, 2, 2, np.nan, 3])
    np.savez(tmp_path / "set.npz", images=np.zeros((6, 8, 8), np.uint8), labels=np.zeros(6, int), patients=who)
    made = deal(tmp_path / "set.npz", tmp_path / "out", NAMES)
    assert sum(share.images for share in made.shares) == 4
    assert made.note == "2 images of set name no patient and are left out."


GREY = np.zeros((4, 8, 8), np.uint8)
UNFIT = {
    "no labels": ({"images": GREY}, "“labels” is missing"),
    "labels of one part": ({"train_images": GREY, "train_labels": np.zeros(4), "val_images": GREY}, "“val_labels” is"),
    "too few masks": ({"images": GREY, "masks": GREY[:3]}, "“masks” is missing, or does not fit"),
    "too few patients": ({"images": GREY, "labels": np.zeros(4), "patients": np.zeros(3)}, "“patients” is missing, or"),
    "a patient on two sides": (
        {f"{part}_{word}": array for part in ("train", "test")
         for word, array in {"images": GREY, "labels": np.zeros(4), "patients": np.arange(4)}.items()},
        "4 of 4 patients on two sides",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_arrays_that_do_not_fit_are_not_dealt_out(tmp_path, name):
    arrays, said = UNFIT[name]
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ConsiliumError, match=said):
        deal(tmp_path / "set.npz", tmp_path / "out", NAMES)
    assert not (tmp_path / "out").exists()


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
