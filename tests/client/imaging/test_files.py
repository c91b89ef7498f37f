"""NIfTI, PNG and JPEG: values, orientations, masks, labels of several kinds, and every way of being bad."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image as Pillow

from client.imaging import Columns, Membership, Source, load
from client.imaging.masks import classes_of, resampled
from client.imaging.nifti import examine_nifti, read_nifti
from client.imaging.pictures import examine_picture, read_picture
from client.imaging.records import Reason, Unusable, Wanted
from privacy.errors import ConsiliumError

GREY, COLOUR = Wanted(1, 2, ("a", "b")), Wanted(3, 2, ("a", "b"))
CLASSES = ("background", "one", "two")


def _same(image):
    return image


def _nifti(file: Path, values, affine=None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), file)
    return file


def _png(file: Path, values, mode=None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(values, mode).save(file)
    return file


def _reason(call):
    with pytest.raises(Unusable) as caught:
        call()
    return caught.value.reason


# ---- NIfTI ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", "SLA", "RPI"])
def test_every_orientation_comes_out_the_same_way(tmp_path, codes):
    """The same body, stored along other axes: the head is last, the back is below, the left is to the right."""
    body = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)  # slices, rows, columns of an axial view
    stored = nibabel.Nifti1Image(body.transpose(2, 1, 0), np.diag([-0.5, -1.5, 3.0, 1.0]))  # columns, rows, slices: LPS
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt(tuple("LPS")), nibabel.orientations.axcodes2ornt(tuple(codes))
    )
    nibabel.save(stored.as_reoriented(turn), tmp_path / "v.nii.gz")
    picture = read_nifti(tmp_path / "v.nii.gz", Wanted(1, 3, (), units=True))
    assert np.array_equal(picture.image[0], body)
    assert picture.spacing == (3.0, 1.5, 0.5)
    assert examine_nifti(tmp_path / "v.nii.gz") == {"shape": [2, 3, 4]}


def test_values_are_stretched_or_windowed_and_units_are_kept(tmp_path):
    values = np.array([[[0.0, 50.0], [100.0, 200.0]]], np.float32)
    file = _nifti(tmp_path / "v.nii", values)
    shown = read_nifti(file, Wanted(1, 3, ())).image
    assert sorted(shown.ravel().tolist()) == [0.0, 0.25, 0.5, 1.0]
    windowed = nibabel.Nifti1Image(values, np.eye(4))
    windowed.header["cal_min"], windowed.header["cal_max"] = 50, 100
    nibabel.save(windowed, file)
    assert sorted(read_nifti(file, Wanted(1, 3, ())).image.ravel().tolist()) == [0.0, 0.0, 1.0, 1.0]
    assert read_nifti(file, Wanted(1, 3, (), units=True)).image.max() == 200


def test_a_fourth_axis_is_channels(tmp_path):
    file = _nifti(tmp_path / "v.nii", np.random.default_rng(0).random((3, 4, 5, 2)).astype(np.float32))
    assert read_nifti(file, Wanted(2, 3, ())).image.shape == (2, 5, 4, 3)
    assert _reason(lambda: read_nifti(file, Wanted(1, 3, ()))) is Reason.CHANNELS


def test_bad_nifti_has_a_reason(tmp_path):
    whole = _nifti(tmp_path / "v.nii.gz", np.random.default_rng(0).random((9, 9, 9)).astype(np.float32))
    wanted = Wanted(1, 3, ())

    def reason(name: str, data: bytes) -> Reason:
        (tmp_path / name).write_bytes(data)
        try:
            examine_nifti(tmp_path / name)
            read_nifti(tmp_path / name, wanted)
        except Unusable as bad:
            return bad.reason
        raise AssertionError(name)

    data = whole.read_bytes()
    assert reason("text.nii", b"Dear colleague, " * 40) is Reason.NOT_IMAGE
    assert reason("other.csv", data) is Reason.NOT_IMAGE
    assert reason("empty.nii", b"") is Reason.NOT_IMAGE
    assert reason("cut.nii.gz", data[:-600]) is Reason.TRUNCATED
    plain = bytearray(gzip.decompress(data))
    plain[42:48] = np.array([30000, 30000, 3000], "<i2").tobytes()
    assert reason("bomb.nii", bytes(plain)) is Reason.BOMB
    _nifti(tmp_path / "nan.nii", np.full((2, 2, 2), np.nan, np.float32))
    assert _reason(lambda: read_nifti(tmp_path / "nan.nii", wanted)) is Reason.NON_FINITE


def test_volumes_with_label_maps_beside_them(tmp_path, key):
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        _nifti(tmp_path / f"set/images/{name}.nii.gz", rng.random((5, 6, 7)).astype(np.float32))
        _nifti(tmp_path / f"set/labels/{name}.nii.gz", rng.integers(0, 3, (5, 6, 7)).astype(np.uint8))
    _nifti(tmp_path / "set/images/alone.nii.gz", rng.random((5, 6, 7)).astype(np.float32))
    _nifti(tmp_path / "set/images/odd.nii.gz", rng.random((5, 6, 7)).astype(np.float32))
    _nifti(tmp_path / "set/labels/odd.nii.gz", np.full((5, 6, 7), 9, np.uint8))
    _nifti(tmp_path / "set/images/size.nii.gz", rng.random((5, 6, 7)).astype(np.float32))
    _nifti(tmp_path / "set/labels/size.nii.gz", np.zeros((5, 6, 6), np.uint8))
    source = Source(kind="nifti", path=tmp_path / "set", masks=tmp_path / "set/labels", one_image_per_patient=True)
    source.check()
    spec = {"channels": 1, "size": [7, 6, 5]}
    cohort = load(source, spec, CLASSES, {}, key, None, prepare=_same, target="mask")
    assert cohort.targets.shape == (3, 7, 6, 5)
    assert {item.path.split("/")[-1]: item.reason for item in cohort.quarantine} == {
        "alone.nii.gz": Reason.NO_MASK,
        "odd.nii.gz": Reason.MASK,
        "size.nii.gz": Reason.MASK,
    }
    cut = load(source, {"channels": 1, "size": [6, 5]}, CLASSES, {}, key, None, prepare=_same, target="mask")
    assert cut.images.shape == (21, 1, 6, 5)
    assert np.array_equal(cut.targets, cohort.targets.reshape(21, 6, 5))
    assert len(set(cut.patients)) == 3
    with pytest.raises(ConsiliumError, match="no labels"):
        load(source, spec, CLASSES, {}, key, None)


# ---- PNG and JPEG --------------------------------------------------------------------------------------------


def test_grey_colour_and_deep_pictures(tmp_path):
    deep = np.array([[0, 65535], [32768, 1]], np.uint16)
    assert read_picture(_png(tmp_path / "d.png", deep), GREY).image[0, 0, 1] == 1.0
    colour = np.zeros((2, 3, 3), np.uint8)
    colour[..., 0] = 255
    file = _png(tmp_path / "c.png", colour)
    assert read_picture(file, COLOUR).image.shape == (3, 2, 3)
    assert _reason(lambda: read_picture(file, GREY)) is Reason.CHANNELS
    same = _png(tmp_path / "s.png", np.full((2, 3, 3), 51, np.uint8))
    assert read_picture(same, GREY).image.tolist() == [[[pytest.approx(0.2)] * 3] * 2]
    assert read_picture(_png(tmp_path / "g.png", deep.astype(np.uint8)), COLOUR).image.shape == (3, 2, 2)


def test_a_jpeg_is_turned_upright(tmp_path):
    values = np.zeros((16, 32), np.uint8)
    values[:, :16] = 255
    about = Pillow.Exif()
    about[0x0112] = 6  # turn by 90 degrees
    Pillow.fromarray(values).save(tmp_path / "j.jpg", exif=about)
    image = read_picture(tmp_path / "j.jpg", GREY).image[0]
    assert image.shape == (32, 16)
    assert image[0].mean() > 0.9
    assert image[-1].mean() < 0.1


def test_bad_pictures_have_a_reason(tmp_path):
    whole = _png(tmp_path / "w.png", np.random.default_rng(0).integers(0, 255, (40, 40)).astype(np.uint8)).read_bytes()

    def reason(name: str, data: bytes) -> Reason:
        (tmp_path / name).write_bytes(data)
        try:
            examine_picture(tmp_path / name)
            read_picture(tmp_path / name, GREY)
        except Unusable as bad:
            return bad.reason
        raise AssertionError(name)

    assert reason("text.png", b"Dear colleague, " * 40) is Reason.NOT_IMAGE
    assert reason("cut.png", whole[:-300]) is Reason.TRUNCATED
    bomb = bytearray(whole)
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    assert reason("bomb.png", bytes(bomb)) in {Reason.BOMB, Reason.DAMAGED}
    out = io.BytesIO()
    Pillow.new("L", (13000, 11000)).save(out, "PNG")
    assert reason("large.png", out.getvalue()) is Reason.BOMB


def test_masks_in_a_column_by_number_or_own_word(tmp_path, table, key):
    for name, patient in (("a", 0), ("b", 1)):
        _png(tmp_path / f"images/{name}.png", np.full((6, 8), 100 + patient, np.uint8))
        marks = np.zeros((6, 8), np.uint8)
        marks[:2], marks[4:] = 128, 255
        _png(tmp_path / f"images/{name}_mask.png", marks)
    names = table([("a.png", "p", "a_mask.png"), ("b.png", "q", "b_mask.png")], header=("file", "patient", "mask"))
    source = Source(
        kind="images", path=tmp_path / "images", labels=names, columns=Columns(patient="patient", mask="mask"),
        classes={"128": "one", "255": "two"},
    )  # fmt: skip
    cohort = load(source, {"channels": 1, "size": [3, 4]}, CLASSES, {}, key, None, target="mask")
    assert cohort.targets[0].tolist() == [[1] * 4, [0] * 4, [2] * 4]
    assert not cohort.quarantine
    assert cohort.summary()["split"]["train"]["classes"] == {"background": 2, "one": 2, "two": 2}


def test_a_mask_path_cannot_leave_the_folder(tmp_path, table, key):
    _png(tmp_path / "images/a.png", np.zeros((4, 4), np.uint8))
    _png(tmp_path / "images/b.png", np.zeros((4, 4), np.uint8))
    _png(tmp_path / "images/ok.png", np.ones((4, 4), np.uint8))
    _png(tmp_path / "secret.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "images/link.png").symlink_to(tmp_path / "secret.png")
    rows = [("a.png", "p", "../secret.png"), ("b.png", "q", "link.png"), ("a.png", "p", "../secret.png")]
    names = table(rows, header=("file", "patient", "mask"))
    source = Source(
        kind="images", path=tmp_path / "images", labels=names, columns=Columns(patient="patient", mask="mask")
    )
    with pytest.raises(ConsiliumError, match="3 × a link or a table entry that leads out"):
        load(source, {"channels": 1, "size": [4, 4]}, ("background", "x"), {}, key, None, target="mask")


def test_black_and_white_masks_of_two_classes_need_no_words():
    values = np.array([[0, 255]], np.uint8)
    assert classes_of(values, ("background", "vessel"), {}).tolist() == [[0, 1]]
    assert _reason(lambda: classes_of(values, CLASSES, {})) is Reason.MASK
    assert _reason(lambda: classes_of(values, ("background", "vessel"), {"254": "vessel"})) is Reason.MASK
    assert _reason(lambda: classes_of(np.array([0.5]), CLASSES, {})) is Reason.MASK


def test_masks_are_resized_by_their_nearest_pixels():
    mask = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert resampled(mask, (2, 2)).tolist() == [[5, 7], [13, 15]]
    assert resampled(resampled(mask, (8, 12)), (4, 4)).tolist() == mask.tolist()


@pytest.mark.parametrize(
    ("header", "rows", "columns"),
    [
        (("file", "patient", "label"), [("a.png", "p", "mass; nodule"), ("b.png", "q", "No finding")], {}),
        (
            ("file", "patient", "Mass", "nodule", "other"),
            [("a.png", "p", "1", "yes", "x"), ("b.png", "q", "0.0", "False", "")],
            {"labels": ("Mass", "nodule", "other")},
        ),
    ],
)
def test_several_labels_in_one_column_or_in_several(tmp_path, table, key, header, rows, columns):
    for name in "abc":
        _png(tmp_path / f"images/{name}.png", np.full((4, 4), ord(name), np.uint8))
    rows = [*rows, ("c.png", "r", *["perhaps"] * (len(header) - 2))]
    source = Source(
        kind="images", path=tmp_path / "images", labels=table(rows, header=header),
        columns=Columns(patient="patient", **columns),
    )  # fmt: skip
    cohort = load(source, {"channels": 1, "size": [4, 4]}, ("mass", "nodule"), {}, key, None, target="labels")
    assert cohort.targets.dtype == np.float32
    assert cohort.targets.tolist() == [[1, 1], [0, 0]]
    assert [(item.path, item.reason) for item in cohort.quarantine] == [("c.png", Reason.UNKNOWN_LABEL)]
    assert cohort.summary()["split"]["train"]["classes"] == {"mass": 1, "nodule": 1}


def test_a_folder_without_a_patient_column_is_refused_unless_declared(tmp_path, table, key):
    _png(tmp_path / "images/a.png", np.zeros((4, 4), np.uint8))
    names = table([("a.png", "a")], header=("file", "label"))
    fields = {"kind": "images", "path": tmp_path / "images", "labels": names}
    with pytest.raises(ConsiliumError, match="nothing names the patient"):
        Source.from_fields(fields)
    source = Source.from_fields({**fields, "one_image_per_patient": True})
    cohort = load(source, {"channels": 1, "size": [4, 4]}, ("a", "b"), {}, key, None)
    assert cohort.patient_rule == "One image is one patient, as the operator declared."


def test_the_tables_own_split_is_kept_unless_it_tears_a_patient(tmp_path, table, key):
    for name in "abc":
        _png(tmp_path / f"images/{name}.png", np.full((4, 4), ord(name), np.uint8))
    columns = Columns(patient="patient", split="split")

    def sides(*rows):
        names = table(rows, header=("file", "patient", "label", "split"))
        source = Source(kind="images", path=tmp_path / "images", labels=names, columns=columns)
        return load(source, {"channels": 1, "size": [4, 4]}, ("a", "b"), {}, key, None).membership

    assert sides(("a.png", "p", "a", "train"), ("b.png", "q", "b", "test"), ("c.png", "r", "b", "val")) == (
        Membership.TRAIN,
        Membership.TEST,
        Membership.VALIDATION,
    )
    with pytest.raises(ConsiliumError, match="on two sides"):
        sides(("a.png", "p", "a", "train"), ("b.png", "p", "b", "test"))


def test_a_file_that_a_patient_has_twice_counts_once(tmp_path, table, key):
    """And one that two patients share is kept for both: that is for the report, not for the reader (RULES N5)."""
    for name in "abc":
        _png(tmp_path / f"images/{name}.png", np.full((4, 4), 7, np.uint8))
    rows = [("a.png", "p", "a"), ("b.png", "p", "a"), ("c.png", "q", "a")]
    source = Source(kind="images", path=tmp_path / "images", labels=table(rows), columns=Columns(patient="patient"))
    cohort = load(source, {"channels": 1, "size": [4, 4]}, ("a", "b"), {}, key, None)
    assert [(item.path, item.reason) for item in cohort.quarantine] == [("b.png", Reason.DUPLICATE)]
    assert len(cohort) == 2


# ---- npz -----------------------------------------------------------------------------------------------------


def test_npz_masks_volumes_labels_and_spacing(tmp_path, key):
    rng = np.random.default_rng(0)
    volumes, masks = rng.integers(0, 255, (3, 4, 6, 8)).astype(np.uint8), rng.integers(0, 3, (3, 4, 6, 8))
    labels = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1]])
    patients = np.array(["p", "q", "q"])
    np.savez(tmp_path / "s.npz", images=volumes, masks=masks, labels=labels, patients=patients)
    source = Source(kind="npz", path=tmp_path / "s.npz")
    volume = {"channels": 1, "size": [4, 6, 8]}
    whole = load(source, volume, CLASSES, {}, key, None, prepare=_same, target="mask")
    assert np.array_equal(whole.targets, masks)
    cut = load(source, {"channels": 1, "size": [6, 8]}, CLASSES, {}, key, None, prepare=_same, target="mask")
    assert np.array_equal(cut.targets, masks.reshape(12, 6, 8))
    assert len(set(cut.patients)) == 2
    several = load(source, volume, CLASSES, {}, key, None, prepare=_same, target="labels")
    assert np.array_equal(several.targets, labels)
    np.savez(tmp_path / "s.npz", images=volumes, masks=masks, patients=patients, spacing=[3, 2, 1])
    assert load(source, volume, CLASSES, {}, key, None, target="mask").spacing.tolist() == [[3, 2, 1]] * 3
    np.savez(tmp_path / "s.npz", images=volumes, patients=patients)
    with pytest.raises(ConsiliumError, match="no array “masks”"):
        load(source, volume, CLASSES, {}, key, None, target="mask")


# ---- real sets -----------------------------------------------------------------------------------------------


def test_real_label_maps_fit_their_volumes(real_set, key):
    """All 260 hippocampus volumes with their label maps, in millimetres."""
    folder = real_set("hippocampus_msd04")
    source = Source(kind="nifti", path=folder, masks=folder / "labels", one_image_per_patient=True)
    spec = {"channels": 1, "size": [16, 24, 16]}
    cohort = load(source, spec, ("background", "anterior", "posterior"), {}, key, None, target="mask")
    assert cohort.images.shape[0] == 260
    assert set(np.unique(cohort.targets)) == {0, 1, 2}
    assert {item.path: item.reason for item in cohort.quarantine} == {"SOURCE.md": Reason.NOT_IMAGE}
    assert 0.5 < cohort.spacing.min() < cohort.spacing.max() < 5


def test_real_cells_have_a_nucleus_inside_a_cell(real_set, table, key):
    folder = real_set("wbc_segmentation")
    rows = [
        (f"site2_cellavision/{number:03d}.png", f"{number}", f"site2_cellavision/{number:03d}_mask.png")
        for number in range(1, 101)
    ]
    source = Source(
        kind="images", path=folder, labels=table(rows, header=("file", "patient", "mask")),
        columns=Columns(patient="patient", mask="mask"), classes={"128": "cytoplasm", "255": "nucleus"},
    )  # fmt: skip
    classes = ("background", "cytoplasm", "nucleus")
    cohort = load(source, {"channels": 3, "size": [64, 64]}, classes, {}, key, None, target="mask")
    assert all(2 in mask for mask in cohort.targets)
    # Four of the published masks hold stray values; they are named, not guessed at.
    stray = [item.path for item in cohort.quarantine if item.reason is Reason.MASK]
    assert stray == [f"site2_cellavision/{number}.png" for number in ("034", "035", "047", "050")]
    assert len(cohort) == 96
