"""One DICOM file to one picture: values, polarity, codecs, and every way of being bad."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.pixels.processing import apply_windowing
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless, RLELossless

from client.imaging.codestream import stream_size
from client.imaging.dicom import read_images
from client.imaging.display import display, modality_values
from client.imaging.header import MAX_VALUES, read_header
from client.imaging.records import Reason, Unusable, Wanted


def read_image(file, channels):
    (picture,) = read_images(file, Wanted(channels, 2, ()))
    return picture.image


def _reason(call):
    with pytest.raises(Unusable) as caught:
        call()
    return caught.value.reason


def test_without_a_window_the_whole_range_is_shown(dataset, save):
    picture = read_image(save(dataset()), 1)
    assert picture.dtype == np.float32
    assert picture.shape == (1, 12, 16)
    np.testing.assert_allclose(picture.ravel(), np.arange(192) / 191, atol=1e-6)


def test_monochrome1_is_inverted(dataset, save):
    straight = read_image(save(dataset(), "a.dcm"), 1)
    inverted = read_image(save(dataset(PhotometricInterpretation="MONOCHROME1"), "b.dcm"), 1)
    np.testing.assert_allclose(inverted, 1 - straight, atol=1e-6)


def test_three_channels_repeat_a_grey_image(dataset, save):
    file = save(dataset())
    assert np.array_equal(read_image(file, 3), np.repeat(read_image(file, 1), 3, axis=0))


def test_rescale_gives_the_scanners_units(dataset):
    made = dataset(np.array([[0, 1000], [2000, 3000]], np.uint16), RescaleSlope="2", RescaleIntercept="-1024")
    values = modality_values(made.pixel_array, made)
    assert values.tolist() == [[-1024, 976], [2976, 4976]]


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("centre", "width"), [(100, 50), (40.5, 1), (90, 400), (0, 77)])
def test_window_agrees_with_pydicom(dataset, function, centre, width):
    """PS3.3 C.11.2.1.2 and C.11.2.1.3; pydicom maps to the stored range, we map to [0, 1]."""
    made = dataset(np.arange(256, dtype=np.uint8).reshape(16, 16))
    made.WindowCenter, made.WindowWidth, made.VOILUTFunction = str(centre), str(width), function
    ours = display(modality_values(made.pixel_array, made), made)
    theirs = apply_windowing(made.pixel_array, made) / 255
    np.testing.assert_allclose(ours, np.clip(theirs, 0, 1), atol=1e-6)


def test_padding_is_black_and_does_not_stretch_the_range(dataset, save):
    pixels = np.full((8, 8), 100, np.int16)
    pixels[2:6, 2:6] = np.arange(200, 216).reshape(4, 4)
    pixels[0] = -2000
    picture = read_image(save(dataset(pixels, PixelPaddingValue=-2000)), 1)[0]
    assert (picture[0] == 0).all()
    assert picture[1, 0] == 0
    assert picture.max() == 1
    assert picture[2, 2] > 0.8


@pytest.mark.parametrize("syntax", [JPEGLSLossless, RLELossless])
def test_lossless_compression_changes_nothing(dataset, save, syntax):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 4096, (20, 30)).astype(np.uint16)
    plain = read_image(save(dataset(pixels), "plain.dcm"), 1)
    made = dataset(pixels)
    made.compress(syntax, generate_instance_uid=False)
    assert np.array_equal(read_image(save(made, "small.dcm"), 1), plain)


def test_implicit_vr_is_read(dataset, tmp_path):
    made = dataset()
    made.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    made.save_as(tmp_path / "implicit.dcm", enforce_file_format=True)
    assert read_header(tmp_path / "implicit.dcm").rows == 12
    assert read_image(tmp_path / "implicit.dcm", 1).max() == 1


def test_scanner_and_patient_are_in_the_header(dataset, save):
    header = read_header(save(dataset(PatientID=" 0042 ")))
    assert (header.patient, header.scanner, header.rows, header.columns) == ("0042", "Maker Model", 12, 16)


BAD = {
    "text": (lambda whole: b"Dear colleague,\n" * 40, Reason.NOT_DICOM),
    "empty": (lambda whole: b"", Reason.NOT_DICOM),
    "only the preamble": (lambda whole: whole[:132], Reason.TRUNCATED),
    "cut in the header": (lambda whole: whole[:400], Reason.TRUNCATED),
    "cut in the pixels": (lambda whole: whole[:-40], Reason.TRUNCATED),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bytes_have_a_reason(dataset, save, name):
    change, reason = BAD[name]
    file = save(dataset())
    file.write_bytes(change(file.read_bytes()))
    assert _reason(lambda: read_header(file)) is reason


@pytest.mark.parametrize("syntax", [JPEGLSLossless, RLELossless])
def test_a_cut_compressed_file_is_truncated(dataset, save, syntax):
    made = dataset(np.random.default_rng(0).integers(0, 4096, (40, 40)).astype(np.uint16))
    made.compress(syntax)
    file = save(made)
    file.write_bytes(file.read_bytes()[:-100])
    assert _reason(lambda: read_header(file)) is Reason.TRUNCATED


def test_no_pixels(dataset, save):
    made = dataset()
    del made.PixelData
    assert _reason(lambda: read_header(save(made))) is Reason.NO_PIXELS


def test_a_huge_declared_image_is_refused_before_decoding(dataset, save):
    made = dataset(Rows=65535, Columns=65535)
    assert MAX_VALUES < 65535 * 65535
    assert _reason(lambda: read_header(save(made))) is Reason.BOMB


def test_a_stream_larger_inside_than_outside_is_refused(dataset, save):
    made = dataset(np.zeros((64, 64), np.uint16))
    made.compress(JPEGLSLossless)
    made.Rows = made.Columns = 8
    assert _reason(lambda: read_image(save(made), 1)) is Reason.BOMB


def test_deflated_data_sets_are_refused_unread(dataset, tmp_path):
    made = dataset()
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    made.save_as(tmp_path / "deflated.dcm", enforce_file_format=True)
    assert _reason(lambda: read_header(tmp_path / "deflated.dcm")) is Reason.CODEC


def test_garbage_in_a_compressed_stream_is_a_codec_matter(dataset, save):
    made = dataset(np.random.default_rng(0).integers(0, 4096, (40, 40)).astype(np.uint16))
    made.compress(JPEGLSLossless)
    data = bytearray(made.PixelData)
    data[80:-30] = b"\xff" * len(data[80:-30])
    made.PixelData = bytes(data)
    assert _reason(lambda: read_image(save(made), 1)) is Reason.CODEC


def test_values_that_are_not_finite_after_rescaling(dataset):
    made = dataset(RescaleSlope="1e308", RescaleIntercept="0")
    made.RescaleSlope = "1e308"
    with np.errstate(over="ignore"):
        assert _reason(lambda: modality_values(made.pixel_array, made)) is Reason.NON_FINITE


def test_colour_needs_three_channels(dataset, save):
    made = dataset(np.zeros((12, 48), np.uint8), Columns=16, SamplesPerPixel=3, PhotometricInterpretation="RGB")
    made.PlanarConfiguration = 0
    file = save(made)
    assert _reason(lambda: read_image(file, 1)) is Reason.CHANNELS
    assert read_image(file, 3).shape == (3, 12, 16)


def test_stream_sizes_of_jpeg_and_jpeg2000():
    jpeg = b"\xff\xd8\xff\xe0" + struct.pack(">H", 4) + b"xx" + b"\xff\xc3" + struct.pack(">HBHHB", 11, 12, 30, 40, 1)
    j2k = b"\xff\x4f\xff\x51" + struct.pack(">HHIIII", 41, 0, 50, 70, 10, 20) + b"\0" * 20
    assert stream_size(jpeg) == (30, 40)
    assert stream_size(j2k) == (50, 40)
    assert stream_size(b"RLE data") is None
    assert stream_size(b"\xff\xd8\xff") is None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_or_unusable_never_a_crash(dataset, tmp_path, data):
    """Flips bytes anywhere, cuts anywhere: the only exception that comes out is Unusable."""
    uids = dict.fromkeys(("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"), "1.2.3")
    made = dataset(np.arange(64, dtype=np.uint16).reshape(8, 8), **uids)
    if data.draw(st.booleans()):
        made.compress(data.draw(st.sampled_from([JPEGLSLossless, RLELossless])), generate_instance_uid=False)
    file = tmp_path / "fuzzed.dcm"
    made.save_as(file, enforce_file_format=True)
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(132, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        header = read_header(file)
        pictures = read_images(file, Wanted(1, 2, ()))
    except Unusable:
        return
    assert pictures[0].image.shape == (1, header.rows, header.columns)
    assert all(np.isfinite(picture.image).all() for picture in pictures)


def test_real_scanners_files_are_read_or_have_a_reason(real_set):
    """Every file of seven scanners and of pydicom's compressed samples."""
    read, reasons = 0, {}
    for file in sorted(p for name in ("scanner_dicom", "dicom_variety") for p in real_set(name).rglob("*")):
        if not file.is_file():
            continue
        try:
            header = read_header(file)
            pictures = read_images(file, Wanted(3 if header.samples == 3 else 1, 2, ()))
        except Unusable as bad:
            reasons[file.name] = bad.reason
            continue
        assert len(pictures) == header.frames
        for picture in pictures:
            assert picture.image.shape[1:] == (header.rows, header.columns), file
            assert np.isfinite(picture.image).all(), file
            assert 0 <= picture.image.min() <= picture.image.max() <= 1, file
        read += 1
    assert read >= 120
    assert reasons == {
        "SOURCE.md": Reason.NOT_DICOM,
        "LICENSE": Reason.NOT_DICOM,
    }


def test_real_stored_values_equal_an_independent_readers(real_set):
    """GDCM against pydicom's chosen decoder, value by value, on the compressed files."""
    gdcm = pytest.importorskip("gdcm")
    from gdcm import ImageReader

    for name in ("JPEG-LL.dcm", "MR2_J2KI.dcm", "RG1_J2KI.dcm"):
        file = real_set("dicom_variety") / name
        reader = ImageReader()
        reader.SetFileName(str(file))
        assert reader.Read()
        image = reader.GetImage()
        kind = {gdcm.PixelFormat.INT16: np.int16}.get(image.GetPixelFormat().GetScalarType(), np.uint16)
        theirs = np.frombuffer(image.GetBuffer().encode("utf-8", "surrogateescape"), kind)
        assert np.array_equal(theirs, dcmread(file).pixel_array.ravel()), name
