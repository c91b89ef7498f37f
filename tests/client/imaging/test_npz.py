"""npz files: two layouts, three ways to say who the patient is, and sizes checked before reading."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.lib import format as npy

from client.imaging import Columns, Membership, Source, load
from client.imaging.npz import NpzFile, shapes
from client.imaging.records import Reason, Wanted
from privacy.errors import ConsiliumError

CLASSES = ("normal", "pneumonia")
WANTED = Wanted(1, 2, CLASSES)
GREY = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)


def _save(tmp_path: Path, **arrays: np.ndarray) -> Path:
    np.savez(tmp_path / "set.npz", **arrays)
    return tmp_path / "set.npz"


def _list(source: Source):
    return NpzFile(source).index(WANTED)


def _official(tmp_path: Path, **more: np.ndarray) -> Path:
    arrays = {}
    for part, rows in (("train", slice(0, 3)), ("val", slice(3, 4)), ("test", slice(4, 6))):
        arrays[f"{part}_images"] = GREY[rows]
        arrays[f"{part}_labels"] = np.array([[0], [1], [0], [1], [0], [1]], np.uint8)[rows]
    return _save(tmp_path, **arrays, **more)


def test_the_files_own_split_is_honoured(tmp_path):
    source = Source(kind="npz", path=_official(tmp_path), one_image_per_patient=True)
    records = _list(source).records
    assert [r.membership for r in records] == [Membership.TRAIN] * 3 + [Membership.VALIDATION] + [Membership.TEST] * 2
    assert [r.target for r in records] == [0, 1, 0, 1, 0, 1]
    assert len({r.patient for r in records}) == 6


def test_the_files_own_split_can_be_set_aside(tmp_path):
    source = Source(kind="npz", path=_official(tmp_path), one_image_per_patient=True, own_split=False)
    assert {r.membership for r in _list(source).records} == {None}


def test_a_split_that_tears_a_patient_apart_is_refused(tmp_path):
    patients = {
        f"{p}_patients": np.array(v) for p, v in (("train", ["a", "b", "c"]), ("val", ["d"]), ("test", ["a", "e"]))
    }
    source = Source(kind="npz", path=_official(tmp_path, **patients))
    with pytest.raises(ConsiliumError, match="1 of 5 patients on two sides"):
        _list(source)
    assert len(_list(source.model_copy(update={"own_split": False})).records) == 6


def test_no_patients_no_declaration_no_cohort(tmp_path):
    with pytest.raises(ConsiliumError, match="--one-image-per-patient"):
        _list(Source(kind="npz", path=_official(tmp_path)))


def test_plain_arrays_with_patients(tmp_path):
    file = _save(tmp_path, images=GREY, labels=np.array([0, 1, 0, 1, 0, 7]), patients=np.array([*"aabbc", ""]))
    listing = _list(Source(kind="npz", path=file))
    assert [r.patient for r in listing.records] == list("aabbc")
    assert [(q.path, q.reason) for q in listing.quarantine] == [("images[5]", Reason.NO_PATIENT)]


def test_an_index_table_beside_the_images(tmp_path, table):
    file = _save(tmp_path, images=GREY)
    index = table(
        [(f"p{i // 2}", str(i % 2), "test" if i < 2 else "train") for i in range(6)], ("group", "label", "part")
    )
    columns = Columns(patient="group", split="part")
    records = _list(Source(kind="npz", path=file, labels=index, columns=columns)).records
    assert [r.patient for r in records] == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert [r.membership for r in records] == [Membership.TEST] * 2 + [Membership.TRAIN] * 4
    with pytest.raises(ConsiliumError, match="patient column"):
        _list(Source(kind="npz", path=file, labels=index))
    table([("p", "0", "train")] * 5, ("group", "label", "part"))
    with pytest.raises(ConsiliumError, match="5 rows for 6 images"):
        _list(Source(kind="npz", path=file, labels=index, columns=columns))
    table([("p", "0", "holdout")] * 6, ("group", "label", "part"))
    with pytest.raises(ConsiliumError, match="split column"):
        _list(Source(kind="npz", path=file, labels=index, columns=columns))


def test_values_colour_and_channels(tmp_path):
    colour = np.zeros((2, 4, 5, 3), np.uint8)
    colour[1, ..., 2] = 255
    reader = NpzFile(
        Source(kind="npz", path=_save(tmp_path, images=colour, labels=np.array([0, 1])), one_image_per_patient=True)
    )
    picture = reader.read(reader.index(WANTED).records[1], Wanted(3, 2, CLASSES))[0].image
    assert picture.shape == (3, 4, 5)
    assert picture.dtype == np.float32
    assert picture[2].min() == 1
    assert picture[:2].max() == 0


WINDOW = {"name": "window", "parameters": {"low": "-160", "high": "240"}}
SCAN = np.linspace(-1000, 1000, 96).reshape(6, 4, 4)


@pytest.mark.parametrize("kind", ["int16", "int64", "float32"])
def test_a_window_gets_the_scanners_units_whatever_the_type(tmp_path, kind):
    file = _save(tmp_path, images=SCAN.astype(kind), labels=np.arange(6) % 2)
    source = Source(kind="npz", path=file, one_image_per_patient=True)
    cohort = load(
        source, {"channels": 1, "size": [4, 4], "transforms": [WINDOW]}, CLASSES, {}, b"k" * 32, None, processes=0
    )
    expected = np.clip((SCAN.astype(kind).astype(np.float32) + 160) / 400, 0, 1)
    assert np.allclose(cohort.images[:, 0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [("uint8", 0, 240 / 255), ("uint16", 0, 240 / 65535), ("int16", 0, 1), ("int64", 0, 1), ("float32", 0, 240)],
)
def test_without_a_window_integers_are_brightness_and_reals_as_they_are(tmp_path, kind, least, most):
    images = np.array([[[0, 120], [240, 60]]]).astype(kind)
    source = Source(
        kind="npz", path=_save(tmp_path, images=images, labels=np.zeros(1, int)), one_image_per_patient=True
    )
    reader = NpzFile(source)
    image = reader.read(reader.index(WANTED).records[0], WANTED)[0].image
    assert image[0].tolist() == pytest.approx(np.array([[0, most / 2], [most, most / 4]]))
    assert image.min() == least


def test_spacing_has_a_number_for_each_axis_of_the_stored_image(tmp_path):
    rng = np.random.default_rng(0)
    volumes = rng.integers(0, 255, (3, 4, 6, 8)).astype(np.uint8)
    labels = np.array([0, 1, 0])
    source = Source(kind="npz", path=_save(tmp_path, images=volumes, labels=labels, spacing=[3, 2, 1]))
    source = source.model_copy(update={"one_image_per_patient": True})
    flat = load(source, {"channels": 1, "size": [6, 8]}, CLASSES, {}, b"k" * 32, None)
    assert flat.spacing.tolist() == [[2, 1]] * 12
    _save(tmp_path, images=volumes, labels=labels, spacing=[2, 1])
    with pytest.raises(ConsiliumError, match="Give 3 numbers"):
        load(source, {"channels": 1, "size": [6, 8]}, CLASSES, {}, b"k" * 32, None)


@pytest.mark.parametrize("patients", [[1.0, np.nan, 2, np.nan, 3, 3], ["a", "nan", "b", "NaN", "c", "c"]])
def test_a_gap_among_the_patients_is_nobody(tmp_path, patients):
    file = _save(tmp_path, images=GREY, labels=np.arange(6) % 2, patients=np.array(patients))
    listing = _list(Source(kind="npz", path=file))
    assert len({record.patient for record in listing.records}) == 3
    assert [(q.path, q.reason) for q in listing.quarantine] == [(f"images[{at}]", Reason.NO_PATIENT) for at in (1, 3)]


def test_a_part_without_an_image_is_no_error(tmp_path):
    empty = {"val_images": GREY[:0], "val_labels": np.zeros((0, 1), np.uint8)}
    file = _save(tmp_path, train_images=GREY, train_labels=np.arange(6)[:, None] % 2, **empty)
    assert len(_list(Source(kind="npz", path=file, one_image_per_patient=True)).records) == 6


def test_images_that_are_not_finite_are_left_out(tmp_path):
    reals = GREY.astype(np.float32)
    reals[2, 0, 0] = np.nan
    source = Source(
        kind="npz", path=_save(tmp_path, images=reals, labels=np.array([0, 1] * 3)), one_image_per_patient=True
    )
    cohort = load(source, {"channels": 1, "size": [4, 4]}, CLASSES, {}, b"k" * 32, None, prepare=lambda image: image)
    assert len(cohort) == 5
    assert [(q.path, q.reason) for q in cohort.quarantine] == [("images[2]", Reason.NON_FINITE)]


def _raw(tmp_path: Path, shape: tuple[int, ...], data: bytes) -> Path:
    import io

    header = io.BytesIO()
    npy.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "set.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", header.getvalue() + data)
    return tmp_path / "set.npz"


@pytest.mark.parametrize(("shape", "data"), [((10**6, 4096, 4096), b""), ((2, 2), b"\0" * 8), ((1, 1), b"\0" * 800)])
def test_a_size_that_is_too_large_or_a_lie_is_refused_unread(tmp_path, shape, data):
    with pytest.raises(ConsiliumError, match="not as large as it says"):
        shapes(_raw(tmp_path, shape, data))


def test_objects_are_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    np.savez(tmp_path / "set.npz", images=np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(ConsiliumError, match="never unpickled"):
        shapes(tmp_path / "set.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY" + b"\0" * 200])
def test_what_is_no_npz_is_said_to_be_none(tmp_path, data):
    (tmp_path / "set.npz").write_bytes(data)
    with pytest.raises(ConsiliumError, match="cannot be read"):
        shapes(tmp_path / "set.npz")


def test_a_damaged_array_is_noticed(tmp_path):
    file = _official(tmp_path)
    raw = bytearray(file.read_bytes())
    place = bytes(raw).find(GREY[:3].tobytes())
    raw[place] ^= 0xFF
    file.write_bytes(raw)
    with pytest.raises(ConsiliumError, match="cannot be read"):
        _list(Source(kind="npz", path=file, one_image_per_patient=True))


WRONG = {
    "no known name": ({"pictures": GREY}, "known name"),
    "labels missing": ({"images": GREY}, "no array “labels”"),
    "labels too few": ({"images": GREY, "labels": np.zeros(3)}, "does not fit the images"),
    "several labels each": ({"images": GREY, "labels": np.zeros((6, 2))}, "does not fit the images"),
    "not images": ({"images": np.zeros((6, 2)), "labels": np.zeros(6)}, "not a list of 2-D images"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arrays_that_do_not_fit_are_named(tmp_path, name):
    arrays, said = WRONG[name]
    with pytest.raises(ConsiliumError, match=said):
        _list(Source(kind="npz", path=_save(tmp_path, **arrays), one_image_per_patient=True))


def test_real_sets_by_their_own_split_and_by_patient_group(real_set):
    spec = {"channels": 1, "size": [28, 28]}
    medmnist = Source(
        kind="npz", path=real_set("medmnist/pneumoniamnist_reconstructed.npz"), one_image_per_patient=True
    )
    cohort = load(medmnist, spec, CLASSES, {"validation": 0.1, "test": 0.2}, b"k" * 32, None)
    assert [len(cohort.indices(side)) for side in Membership] == [4708, 524, 624]
    assert cohort.summary()["split"]["test"]["classes"] == {"normal": 234, "pneumonia": 390}
    folder = real_set("chest_xray_pneumonia")
    source = Source(
        kind="npz", path=folder / "images_48.npz", labels=folder / "index.csv", columns=Columns(patient="group")
    )
    listing = _list(source)
    assert (len(listing.records), len({r.patient for r in listing.records})) == (5856, 3189)
