"""Slices to volumes by position, frames of one file, and the same volumes cut into slices again."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues, SegmentDescription
from highdicom.seg import Segmentation as Seg
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.sr.codedict import codes
from pydicom.uid import EnhancedMRImageStorage, generate_uid

from client.imaging import Columns, Source, load
from client.imaging.geometry import Plane, stacks
from client.imaging.records import Reason, Unusable

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
VOLUME = {"channels": 1, "size": [6, 8, 10], "transforms": [{"name": "window", "parameters": {"low": 0, "high": 1}}]}
SLICE = {**VOLUME, "size": [8, 10]}


def _same(image):
    return image


def _load(tmp_path, spec, table, key, classes=("a", "b"), target="class", **fields):
    columns = fields.pop("columns", Columns(patient="patient"))
    source = Source(kind="dicom", path=tmp_path / "images", labels=table, columns=columns, **fields)
    return load(source, spec, classes, {}, key, None, prepare=_same, target=target)


def _reasons(cohort):
    return {item.path: item.reason for item in cohort.quarantine}


# ---- geometry ------------------------------------------------------------------------------------------------


def _plane(z, orientation=AXIAL):
    return Plane((0.0, 0.0, float(z)), orientation, (0.5, 0.75))


@given(count=st.integers(2, 30), step=st.floats(0.3, 12), seed=st.randoms(use_true_random=False))
def test_slices_are_ordered_by_position_whatever_their_order(count, step, seed):
    order = list(range(count))
    seed.shuffle(order)
    (stack,) = stacks([_plane(step * at) for at in order])
    assert [order[at] for at in stack.order] == list(range(count))
    assert stack.grid.spacing == (pytest.approx(step), 0.5, 0.75)


def test_places_taken_several_times_are_as_many_volumes():
    found = stacks([_plane(at) for _ in range(3) for at in range(4)])
    assert [stack.order for stack in found] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]


@pytest.mark.parametrize(
    ("planes", "reason"),
    [
        ([_plane(0)], Reason.NO_VOLUME),
        ([_plane(0), None], Reason.NO_VOLUME),
        ([_plane(0), _plane(0)], Reason.NO_VOLUME),
        ([_plane(0), _plane(1, (0.0, 1.0, 0.0, 0.0, 0.0, -1.0))], Reason.NO_VOLUME),
        ([_plane(at, (1.0, 0, 0, 1.0, 0, 0)) for at in range(3)], Reason.NO_VOLUME),
        ([_plane(at) for at in (0, 1, 2, 4, 5)], Reason.SLICES),
        ([_plane(at) for at in (0, 1, 1, 2)], Reason.SLICES),
    ],
)
def test_what_makes_no_volume_says_why(planes, reason):
    with pytest.raises(Unusable) as caught:
        stacks(planes)
    assert caught.value.reason is reason


def test_a_turned_series_runs_along_its_own_normal():
    sagittal = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
    (stack,) = stacks([Plane((x, 0.0, 0.0), sagittal, (1.0, 1.0)) for x in (3.0, 1.0, 2.0)])
    assert stack.order == (0, 2, 1)  # its normal points to the right, against x
    assert stack.grid.spacing[0] == pytest.approx(1.0)


# ---- series of files -----------------------------------------------------------------------------------------


def test_a_series_becomes_a_volume_in_the_scanners_units(tmp_path, series, table, key):
    series("images/one", PatientID="P1")
    names = table([("one/000-0.dcm", "p1", "b")])
    cohort = _load(tmp_path, VOLUME, names, key)
    assert cohort.images.shape == (1, 1, 6, 8, 10)
    assert cohort.images[0, 0, :, 4, 4].tolist() == [-1000, -900, -800, -700, -600, -500]
    assert cohort.spacing.tolist() == [[2.0, 0.5, 0.75]]
    assert cohort.targets.tolist() == [1]
    assert not cohort.quarantine


def test_spacing_follows_the_resizing(tmp_path, series, table, key):
    series("images/one", PatientID="P1")
    source = Source(kind="dicom", path=tmp_path / "images", labels=table([("000-0.dcm", "p1", "b")]))
    cohort = load(source, {"channels": 1, "size": [3, 16, 5]}, ("a", "b"), {}, key, None)
    assert cohort.spacing.tolist() == [[4.0, 0.25, 1.5]]


def test_without_units_one_window_serves_the_whole_volume(tmp_path, series, table, key):
    series("images/one", PatientID="P1")
    cohort = _load(tmp_path, {**VOLUME, "transforms": []}, table([("000-0.dcm", "p1", "a")]), key)
    np.testing.assert_allclose(cohort.images[0, 0, :, 4, 4], np.arange(6) / 5, atol=1e-6)


def test_two_dimensions_take_each_slice_of_the_patient(tmp_path, series, table, key):
    uid = generate_uid()
    series("images/one", PatientID="P1", SeriesInstanceUID=uid)
    cohort = _load(tmp_path, SLICE, table([(uid, "p1", "b")]), key, match="series")
    assert cohort.images.shape == (6, 1, 8, 10)
    assert len(set(cohort.patients)) == 1
    assert cohort.spacing[0].tolist() == [0.5, 0.75]


def test_several_times_in_one_place_are_several_volumes(tmp_path, series, table, key):
    shared = {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid(), "PatientID": "P1"}
    for turn in "12":
        series(f"images/{turn}", AcquisitionNumber=turn, **shared)
    cohort = _load(tmp_path, VOLUME, table([(shared["SeriesInstanceUID"], "p1", "b")]), key, match="series")
    assert cohort.images.shape[0] == 2
    assert len(set(cohort.patients)) == 1


def test_missing_slices_mixed_patients_and_single_slices_are_named_and_the_rest_goes_on(tmp_path, series, table, key):
    """One series each: whole, with a hole, of two patients, of one slice, with a slice of another size."""
    series("images/whole", PatientID="P1")
    series("images/hole", [0, 1, 2, 4, 5], PatientID="P2")
    mixed = {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid()}
    series("images/mixed-a", [0, 1, 2], PatientID="P3", **mixed)
    series("images/mixed-b", [3, 4, 5], PatientID="P4", **mixed)
    series("images/scout", [0], PatientID="P5")
    files = {name: sorted((tmp_path / "images" / name).iterdir()) for name in ("whole", "hole", "mixed-a", "scout")}
    rows = [(f"{name}/{found[0].name}", name, "a") for name, found in files.items()]
    cohort = _load(tmp_path, VOLUME, table(rows), key)
    assert len(cohort) == 1
    found = {path.split("/")[0]: reason for path, reason in _reasons(cohort).items()}
    assert found == {
        "hole": Reason.SLICES,
        "mixed-a": Reason.PATIENTS,
        "mixed-b": Reason.PATIENTS,
        "scout": Reason.NO_VOLUME,
    }


def test_a_duplicate_uid_in_a_series_is_kept_once(tmp_path, series, table, key):
    files = series("images/one", PatientID="P1")
    (tmp_path / "images" / "copy.dcm").write_bytes(files[2].read_bytes())
    cohort = _load(tmp_path, VOLUME, table([(files[0].relative_to(tmp_path / "images").as_posix(), "p1", "a")]), key)
    assert cohort.images.shape[0] == 1
    assert list(_reasons(cohort).values()) == [Reason.DUPLICATE]


def test_the_same_uid_with_two_patients_is_nobodys(tmp_path, series, table, key):
    shared = {"SOPInstanceUID": generate_uid()}
    series("images/a", [0], PatientID="P1", **shared)
    series("images/b", [0], PatientID="P2", **shared)
    series("images/c", [0], PatientID="P3")
    rows = [("a/000-0.dcm", "p1", "a"), ("b/000-0.dcm", "p2", "a"), ("c/000-0.dcm", "p3", "a")]
    cohort = _load(tmp_path, SLICE, table(rows), key)
    assert set(_reasons(cohort).values()) == {Reason.PATIENTS}
    assert len(cohort) == 1


def test_labels_can_come_from_a_tag(tmp_path, series, key):
    series("images/a", PatientID="P1", BodyPartExamined="CHEST")
    series("images/b", PatientID="P2", BodyPartExamined="HEAD")
    series("images/c", PatientID="P3", BodyPartExamined="FOOT")
    source = Source(kind="dicom", path=tmp_path / "images", label_tag="BodyPartExamined")
    cohort = load(source, VOLUME, ("chest", "head"), {}, key, None, prepare=_same)
    assert cohort.targets.tolist() == [0, 1]
    assert set(_reasons(cohort).values()) == {Reason.UNKNOWN_LABEL}


# ---- frames of one file --------------------------------------------------------------------------------------


def _enhanced(dataset, positions, **tags):
    """An enhanced MR image whose frames lie at `positions`, each with its own slope and window."""
    frames = np.stack([np.full((8, 10), 10 * (at + 1), np.uint16) for at in range(len(positions))])
    made = dataset(frames.reshape(-1, 10), Rows=8, NumberOfFrames=str(len(positions)), Modality="MR", **tags)
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID = EnhancedMRImageStorage
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = list(AXIAL)
    measures.PixelSpacing, measures.SliceThickness = [0.5, 0.75], "3"
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    made.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for at, z in enumerate(positions):
        frame, position, values, window = Dataset(), Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, z]
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = str(at + 1), "5", "US"
        window.WindowCenter, window.WindowWidth = "100", "200"
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [position], [values]
        frame.FrameVOILUTSequence = [window]
        groups.append(frame)
    made.PerFrameFunctionalGroupsSequence = groups
    return made


def test_an_enhanced_image_is_ordered_and_rescaled_frame_by_frame(tmp_path, dataset, save, table, key):
    save(_enhanced(dataset, [6, 0, 3]), "images/e.dcm")
    names = table([("e.dcm", "p1", "a")])
    spec = {**VOLUME, "size": [3, 8, 10]}
    cohort = _load(tmp_path, spec, names, key)
    # frame k holds 10 (k + 1) and is rescaled by (k + 1): 15, 45, 95 at 6, 0, 3 mm
    assert cohort.images[0, 0, :, 0, 0].tolist() == [45.0, 95.0, 15.0]
    assert cohort.spacing.tolist() == [[3.0, 0.5, 0.75]]
    assert _load(tmp_path, SLICE, names, key).images[:, 0, 0, 0].tolist() == [15.0, 45.0, 95.0]
    shown = _load(tmp_path, {**SLICE, "transforms": []}, names, key).images[:, 0, 0, 0]
    np.testing.assert_allclose(shown, [(v - 99.5) / 199 + 0.5 for v in (15, 45, 95)], atol=1e-6)


def test_an_enhanced_image_with_a_hole_is_no_volume(tmp_path, dataset, save, table, key):
    save(_enhanced(dataset, [0, 3, 9, 12]), "images/e.dcm")
    save(_enhanced(dataset, [0, 3, 6], PatientID="P2"), "images/f.dcm")
    cohort = _load(tmp_path, {**VOLUME, "size": [3, 8, 10]}, table([("e.dcm", "p", "a"), ("f.dcm", "q", "a")]), key)
    assert _reasons(cohort) == {"e.dcm": Reason.SLICES}


def test_palette_colour_is_looked_up(tmp_path, dataset, save, table, key):
    made = dataset(np.array([[0, 1], [2, 3]], np.uint8), PhotometricInterpretation="PALETTE COLOR")
    for channel, values in (("Red", (0, 255, 0, 0)), ("Green", (0, 0, 255, 0)), ("Blue", (0, 0, 0, 255))):
        setattr(made, f"{channel}PaletteColorLookupTableDescriptor", [4, 0, 16])
        entries = np.array(values, "<u2") * np.uint16(257)
        setattr(made, f"{channel}PaletteColorLookupTableData", entries.tobytes())
    save(made, "images/p.dcm")
    cohort = _load(tmp_path, {"channels": 3, "size": [2, 2]}, table([("p.dcm", "p", "a")]), key)
    assert cohort.images[0, :, 0, 1].tolist() == [1, 0, 0]
    assert cohort.images[0, :, 1, 1].tolist() == [0, 0, 1]


# ---- masks ---------------------------------------------------------------------------------------------------


def _segmentation(files, marks, labels):
    """A DICOM SEG over single-frame files; `marks` is uint8 [files, rows, columns] of segment numbers."""
    segments = [
        SegmentDescription(
            segment_number=number, segment_label=label, segmented_property_category=codes.SCT.Organ,
            segmented_property_type=codes.SCT.Liver, algorithm_type=SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, label in enumerate(labels, 1)
    ]  # fmt: skip
    return Seg(
        source_images=[dcmread(file) for file in files], pixel_array=marks,
        segmentation_type=SegmentationTypeValues.BINARY, segment_descriptions=segments,
        series_instance_uid=generate_uid(), series_number=9, sop_instance_uid=generate_uid(), instance_number=1,
        manufacturer="Maker", manufacturer_model_name="Model", software_versions="1", device_serial_number="1",
    )  # fmt: skip


@pytest.fixture
def marked(tmp_path, series):
    """A CT series of six slices and a SEG: liver on slice 2, tumour on slice 3, a rib on slice 4."""
    files = series("images/ct", PatientID="P1", PatientName="A^B", PatientBirthDate="", PatientSex="",
                   AccessionNumber="", StudyID="", StudyDate="", StudyTime="", ReferringPhysicianName="",
                   PositionReferenceIndicator="",
                   SOPClassUID="1.2.840.10008.5.1.4.1.1.2", SliceThickness="2")  # fmt: skip
    marks = np.zeros((6, 8, 10), np.uint8)
    marks[2, 2:4, 3:5], marks[3, 5, 5], marks[4, 0, 0] = 1, 2, 3
    _segmentation(files, marks, ("Liver", "Tumour", "Rib")).save_as(tmp_path / "images" / "seg.dcm")
    return marks


@pytest.mark.parametrize("spec", [VOLUME, SLICE])
def test_masks_come_from_dicom_seg_by_label(tmp_path, marked, key, spec):
    source = Source(kind="dicom", path=tmp_path / "images")
    cohort = load(source, spec, ("background", "liver", "tumour"), {}, key, None, prepare=_same, target="mask")
    assert not cohort.quarantine
    expected = np.where(marked == 3, 0, marked)
    order = np.argsort(cohort.images[:, 0, 4, 4]) if spec is SLICE else [0]
    found = cohort.targets[order] if spec is SLICE else cohort.targets[0]
    assert cohort.targets.dtype == np.uint8
    assert np.array_equal(found, expected)


def test_a_segmentation_of_something_else_is_an_error_of_the_mask(tmp_path, marked, series, key):
    series("images/other", PatientID="P2")
    source = Source(kind="dicom", path=tmp_path / "images", classes={"Liver": "spleen"})
    cohort = load(source, VOLUME, ("background", "spleen"), {}, key, None, prepare=_same, target="mask")
    assert set(_reasons(cohort).values()) == {Reason.NO_MASK}
    assert len(cohort) == 1
    assert set(np.unique(cohort.targets)) == {0, 1}
    with pytest.raises(Exception, match="the mask cannot be read"):
        load(source, VOLUME, ("background", "kidney"), {}, key, None, prepare=_same, target="mask")


@pytest.mark.parametrize("spec", [VOLUME, SLICE])
def test_masks_come_from_nifti_turned_onto_the_dicom_grid(tmp_path, series, table, key, spec):
    """The label map is stored in another orientation (right, front, head) than the series (left, back, head)."""
    series("images/ct", PatientID="P1")
    marks = np.zeros((6, 8, 10), np.uint8)
    marks[1, 2, 3], marks[4, 7, 9] = 1, 2
    affine = np.diag([0.75, 0.5, 2.0, 1.0])
    affine[:3, 3] = [5.0 - 9 * 0.75, 4.0 - 7 * 0.5, 0.0]
    nibabel.save(nibabel.Nifti1Image(marks[:, ::-1, ::-1].transpose(2, 1, 0), affine), tmp_path / "images/m.nii.gz")
    names = table([("ct/000-0.dcm", "p1", "m.nii.gz")], header=("file", "patient", "mask"))
    columns = Columns(patient="patient", mask="mask")
    cohort = _load(tmp_path, spec, names, key, ("background", "one", "two"), "mask", columns=columns)
    found = cohort.targets[0] if spec is VOLUME else cohort.targets[np.argsort(cohort.images[:, 0, 4, 4])]
    assert not cohort.quarantine
    assert np.array_equal(found, marks)


def test_a_label_map_that_lies_elsewhere_is_refused(tmp_path, series, table, key):
    series("images/ct", PatientID="P1")
    nibabel.save(nibabel.Nifti1Image(np.zeros((10, 8, 6), np.uint8), np.eye(4)), tmp_path / "images/m.nii.gz")
    names = table([("ct/000-0.dcm", "p1", "m.nii.gz")], header=("file", "patient", "mask"))
    with pytest.raises(Exception, match="1 × the mask cannot be read"):
        _load(tmp_path, VOLUME, names, key, target="mask", columns=Columns(patient="patient", mask="mask"))
