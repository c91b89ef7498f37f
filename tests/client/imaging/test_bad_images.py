"""Every bad image that a hospital's folder may hold, in one folder: counted, named, and the good ones go on."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, generate_uid

from client.imaging import Columns, Source, load
from client.imaging.dicom import read_images
from client.imaging.header import read_header
from client.imaging.records import Reason, Unusable, Wanted

SPEC = {"channels": 1, "size": [6, 8]}


def test_one_folder_with_everything_that_is_bad(tmp_path, dataset, save, series, table, key):
    rng = np.random.default_rng(0)

    def pixels():
        return rng.integers(0, 4096, (40, 40)).astype(np.uint16)

    expected: dict[str, Reason | None] = {}

    def add(name, made, reason, **change):
        file = save(made, f"images/{name}.dcm")
        if "cut" in change:
            file.write_bytes(file.read_bytes()[: change["cut"]])
        expected[f"{name}.dcm"] = reason

    number = iter(range(100))

    def image(**tags):
        return dataset(pixels(), PatientID=f"P{next(number)}", **tags)

    add("good", image(), None)
    no_pixels = image()
    del no_pixels.PixelData
    add("no-pixels", no_pixels, Reason.NO_PIXELS)
    add("cut-header", image(), Reason.TRUNCATED, cut=300)
    add("cut-pixels", image(), Reason.TRUNCATED, cut=-100)
    small = image()
    small.compress(JPEGLSLossless, generate_instance_uid=False)
    add("cut-stream", small, Reason.TRUNCATED, cut=-100)
    add("bomb-declared", image(Rows=65535, Columns=65535), Reason.BOMB)
    add("bomb-frames", image(NumberOfFrames="2000000000"), Reason.BOMB)
    inside = image()
    inside.compress(JPEGLSLossless, generate_instance_uid=False)
    inside.Rows = inside.Columns = 8
    add("bomb-inside", inside, Reason.BOMB)
    add("wrong-modality", image(Modality="MR"), Reason.MODALITY)
    huge = dataset(np.full((4, 4), 65535, np.uint16), PatientID="HUGE", RescaleSlope="9e307", RescaleIntercept="0")
    add("not-finite", huge, Reason.NON_FINITE)
    garbage = image()
    garbage.compress(JPEGLSLossless, generate_instance_uid=False)
    data = bytearray(garbage.PixelData)
    data[80:-30] = b"\xff" * len(data[80:-30])
    garbage.PixelData = bytes(data)
    add("codec-garbage", garbage, Reason.CODEC)
    unknown = image()
    unknown.compress(JPEGLSLossless, generate_instance_uid=False)
    unknown.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG-2, which nothing here decodes
    add("codec-unknown", unknown, Reason.CODEC)
    claimed = image()
    claimed.compress(JPEGLSLossless, generate_instance_uid=False)
    claimed.file_meta.TransferSyntaxUID = JPEG2000Lossless  # the stream is something else
    add("codec-claimed", claimed, None)
    shared = {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid()}
    add("mixed-1", image(**shared), Reason.PATIENTS)
    add("mixed-2", image(**shared), Reason.PATIENTS)
    twice = image()
    add("twice-1", twice, None)
    add("twice-2", twice, Reason.DUPLICATE)
    same = {"SOPInstanceUID": generate_uid()}
    add("uid-1", image(**same), Reason.PATIENTS)
    add("uid-2", image(**same), Reason.PATIENTS)
    add("no-label", image(), Reason.NO_LABEL)
    images = tmp_path / "images"
    (images / "text.dcm").write_text("Dear colleague,\n" * 40)
    (images / "empty.dcm").touch()
    (images / "DICM").write_bytes(b"\0" * 128 + b"DICM")
    os.mkfifo(images / "pipe")
    outside = save(image(), "elsewhere/secret.dcm")
    (images / "link.dcm").symlink_to(outside)
    (images / "folder").symlink_to(outside.parent)
    expected |= {
        "text.dcm": Reason.NOT_DICOM, "empty.dcm": Reason.NOT_DICOM, "DICM": Reason.TRUNCATED,
        "pipe": Reason.NOT_REGULAR, "link.dcm": Reason.SYMLINK, "folder": Reason.SYMLINK,
        "../elsewhere/secret.dcm": Reason.SYMLINK,
    }  # fmt: skip
    patients = {name: name for name in expected} | {"twice-2.dcm": "twice-1.dcm"}
    rows = [(name, patients[name], "a") for name in expected if name != "no-label.dcm"]
    source = Source(
        kind="dicom", path=images, labels=table(rows), columns=Columns(patient="patient"), modalities=("CR",)
    )
    cohort = load(source, SPEC, ("a", "b"), {}, key, None)
    found = {item.path: item.reason for item in cohort.quarantine}
    readable = found.pop("codec-claimed.dcm", None)
    expected.pop("codec-claimed.dcm")
    assert readable in {None, Reason.CODEC}  # a decoder may tell what it is given; either way it is no crash
    assert found == {name: reason for name, reason in expected.items() if reason is not None}
    paths = {origin.path for origin in cohort.origins} - {"codec-claimed.dcm"}
    assert paths == {name for name, reason in expected.items() if reason is None}
    counted = Counter(cohort.summary()["quarantine"])
    assert sum(counted.values()) == len(cohort.quarantine)
    assert all(item.text for item in cohort.quarantine)


REAL = {
    "SOURCE.md": Reason.NOT_DICOM,
    "LICENSE": Reason.NOT_DICOM,
}


def test_every_real_files_pixels_equal_an_independent_readers(real_set):
    """SimpleITK (ITK with its own parser of DICOM and its own build of the decoders) against ours, in the scanner's
    units, value by value. ITK turns MONOCHROME1 over and stretches the single bits of a segmentation."""
    itk = pytest.importorskip("SimpleITK")
    itk.ProcessObject_SetGlobalWarningDisplay(False)
    compared, reasons = 0, {}
    for file in sorted(p for name in ("scanner_dicom", "dicom_variety") for p in real_set(name).rglob("*")):
        if not file.is_file():
            continue
        try:
            header = read_header(file)
            wanted = Wanted(3 if header.samples == 3 else 1, 2, (), units=True)
            ours = np.stack([picture.image for picture in read_images(file, wanted)]).astype(np.float64)
        except Unusable as bad:
            reasons[file.name] = bad.reason
            continue
        theirs = itk.GetArrayFromImage(itk.ReadImage(str(file))).astype(np.float64)
        if header.samples == 3:
            theirs = np.moveaxis(theirs, -1, -3).reshape(ours.shape) / 255
        theirs = theirs.reshape(ours.shape)
        if header.photometric == "MONOCHROME1":
            theirs = theirs.min() + theirs.max() - theirs
            ours = ours - ours.min() + theirs.min()
        if header.modality == "SEG":
            theirs /= 255
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6, err_msg=file.name)
        compared += 1
    assert compared == 128
    assert reasons == REAL
