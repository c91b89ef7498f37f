"""Damaged files by the thousand: small good files of every kind, changed at random, and read as an agent reads them.

`one(seed)` and `one_of_gdcm(seed)` are functions of their seed, so that a finding can be made again, and can be sent to
another process, so that a decoder that dies is a finding too. GDCM does die: the second is for other processes only.
"""

from __future__ import annotations

import functools
import io
import os
import random
import tempfile
import time
from pathlib import Path

import gdcm
import nibabel
import numpy as np
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from PIL import Image as Pillow
from pydicom import Dataset, dcmread
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sr.codedict import codes
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
)

from client.imaging import Columns, Source
from client.imaging.dicom import read_images
from client.imaging.header import Header, header_facts
from client.imaging.nifti import examine_nifti, read_label_map, read_nifti
from client.imaging.npz import NpzFile
from client.imaging.pictures import examine_picture, read_picture, read_picture_mask
from client.imaging.records import Target, Unusable, Wanted
from client.imaging.seg import marked, segment_labels
from privacy.errors import ConsiliumError

SLOWEST = 20.0
"""Seconds that no single file may take."""
CLASSES = ("a", "b")
SIDE = 64
MARKED = "1.2.3"
"""The instance of the one image, which the segmentation is about."""


def _dicom(frames: int, syntax: str | None, **tags: object) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, MARKED
    meta.TransferSyntaxUID = ImplicitVRLittleEndian if syntax == "implicit" else ExplicitVRLittleEndian
    made = FileDataset(io.BytesIO(), {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID = MRImageStorage, MARKED
    made.StudyInstanceUID, made.SeriesInstanceUID = "1.2.4", "1.2.5"
    made.PatientID, made.Modality, made.Rows, made.Columns = "P1", "MR", SIDE, SIDE
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated = made.BitsStored = 16
    made.HighBit, made.PixelRepresentation = 15, 0
    made.RescaleSlope, made.RescaleIntercept, made.WindowCenter, made.WindowWidth = "1", "0", "100", "200"
    made.PixelSpacing, made.ImageOrientationPatient, made.ImagePositionPatient = [1, 1], [1, 0, 0, 0, 1, 0], [0, 0, 0]
    for name, value in tags.items():
        setattr(made, name, value)
    if frames > 1:
        made.NumberOfFrames = frames
        groups = []
        for at in range(frames):
            group, position = Dataset(), Dataset()
            position.ImagePositionPatient = [0, 0, at]
            group.PlanePositionSequence = [position]
            groups.append(group)
        made.PerFrameFunctionalGroupsSequence = groups
    pixels = (np.arange(frames * SIDE * SIDE, dtype=np.uint16) * 37) % 4096
    made.PixelData = pixels.tobytes()
    made["PixelData"].VR = "OW"
    if syntax in {JPEGLSLossless, RLELossless, JPEG2000Lossless}:
        made.compress(syntax, generate_instance_uid=False)
    if syntax in {JPEGBaseline8Bit, JPEGExtended12Bit}:
        stream = io.BytesIO()
        Pillow.fromarray((pixels[: SIDE * SIDE] // 16).astype(np.uint8).reshape(SIDE, SIDE)).save(stream, "JPEG")
        made.file_meta.TransferSyntaxUID, made.BitsAllocated, made.BitsStored, made.HighBit = syntax, 8, 8, 7
        made.PixelData = encapsulate([stream.getvalue()])
        made["PixelData"].VR = "OB"
    out = io.BytesIO()
    made.save_as(out, enforce_file_format=True)
    return out.getvalue()


def _lossless(raw: bytes, process: int) -> bytes:
    """A file again as JPEG lossless, which only GDCM writes and reads here."""
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.dcm", Path(folder) / "after.dcm"
        before.write_bytes(raw)
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(before))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(process))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(after))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return after.read_bytes()


def _segmentation() -> bytes:
    """A DICOM SEG that marks a square of the single-frame image as class b."""
    about = {"PatientName": "A^B", "PatientBirthDate": "", "PatientSex": "", "AccessionNumber": "", "StudyID": "",
             "StudyDate": "", "StudyTime": "", "ReferringPhysicianName": "", "PositionReferenceIndicator": "",
             "FrameOfReferenceUID": "1.2.6", "SliceThickness": "1"}  # fmt: skip
    segment = SegmentDescription(
        segment_number=1, segment_label=CLASSES[1], segmented_property_category=codes.SCT.Organ,
        segmented_property_type=codes.SCT.Liver, algorithm_type=SegmentAlgorithmTypeValues.MANUAL,
    )  # fmt: skip
    mask = np.zeros((1, SIDE, SIDE), np.uint8)
    mask[:, 8:20, 8:20] = 1
    made = Segmentation(
        source_images=[dcmread(io.BytesIO(_dicom(1, None, **about)))], pixel_array=mask,
        segmentation_type=SegmentationTypeValues.BINARY, segment_descriptions=[segment], series_instance_uid="1.2.7",
        series_number=9, sop_instance_uid="1.2.8", instance_number=1, manufacturer="Maker",
        manufacturer_model_name="Model", software_versions="1", device_serial_number="1",
    )  # fmt: skip
    out = io.BytesIO()
    made.save_as(out)
    return out.getvalue()


def _saved(save) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "f.nii.gz"
        save(file)
        return file.read_bytes()


@functools.cache
def corpus() -> tuple[tuple[str, bytes], ...]:
    """(ending, bytes) of good files that can be read in this process."""
    picture, png, jpeg = np.arange(900, dtype=np.uint8).reshape(30, 30), io.BytesIO(), io.BytesIO()
    Pillow.fromarray(picture).save(png, "PNG")
    Pillow.fromarray(np.stack([picture] * 3, -1)).save(jpeg, "JPEG")
    volume = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    zipped = _saved(lambda file: nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), file))
    npz = io.BytesIO()
    np.savez(npz, images=np.zeros((4, 6, 6), np.uint8), labels=np.zeros(4), patients=np.array(["p", "q", "r", "s"]))
    plain = nibabel.Nifti1Image(volume, np.eye(4)).to_bytes()
    return (
        (".dcm", _dicom(1, None)),
        (".dcm", _dicom(1, "implicit")),
        (".dcm", _dicom(1, JPEGLSLossless)),
        (".dcm", _dicom(1, RLELossless)),
        (".dcm", _dicom(3, None)),
        (".dcm", _dicom(3, JPEGLSLossless)),
        (".dcm", _dicom(1, JPEG2000Lossless)),
        (".dcm", _dicom(1, JPEGBaseline8Bit)),
        (".dcm", _segmentation()),
        (".nii", plain),
        (".nii.gz", zipped),
        (".png", png.getvalue()),
        (".jpg", jpeg.getvalue()),
        (".npz", npz.getvalue()),
    )


@functools.cache
def corpus_of_gdcm() -> tuple[tuple[str, bytes], ...]:
    """(ending, bytes) of good files of every syntax in `codestream.ISOLATED`."""
    lossless = (gdcm.TransferSyntax.JPEGLosslessProcess14_1, gdcm.TransferSyntax.JPEGLosslessProcess14)
    files = [_lossless(_dicom(frames, None), process) for process in lossless for frames in (1, 3)]
    return tuple((".dcm", raw) for raw in [*files, _dicom(1, JPEGExtended12Bit)])


def damaged(raw: bytes, dice: random.Random) -> bytes:
    """Some bytes changed, cut out, put in or doubled; interesting numbers more often than others."""
    data = bytearray(raw)
    for _ in range(dice.randint(1, 4)):
        at, kind = dice.randrange(max(1, len(data))), dice.choices(range(6), (8, 4, 4, 2, 2, 1))[0]
        if kind == 0:
            data[at : at + 1] = bytes([dice.randrange(256)])
        elif kind == 1:
            data[at : at + 4] = dice.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
        elif kind == 2:
            data[at : at + 2] = dice.choice([b"\xff\xff", b"\0\0", b"\xff\x7f", b"\x01\0"])
        elif kind == 3:
            del data[at : at + dice.randint(1, 64)]
        elif kind == 4:
            data[at:at] = data[at : at + dice.randint(1, 128)]
        else:
            del data[at:]
    return bytes(data)


def one(seed: int) -> str:
    """What became of one damaged file: "read", a reason, or the name of an exception that should not have come out."""
    dice = random.Random(seed)
    ending, raw = dice.choice(corpus())
    return outcome(ending, damaged(raw, dice), dice, f"seed {seed}")


def one_of_gdcm(seed: int) -> str:
    """The same of a file that only GDCM reads."""
    dice = random.Random(seed)
    ending, raw = dice.choice(corpus_of_gdcm())
    return outcome(ending, damaged(raw, dice), dice, f"seed {seed} of GDCM's")


def outcome(ending: str, raw: bytes, dice: random.Random, which: str) -> str:
    """What becomes of these bytes in a file of this ending."""
    handle, name = tempfile.mkstemp(suffix=ending)
    file, start = Path(name), time.monotonic()
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(raw)
        _read(file, ending, dice)
        found = "read"
    except Unusable as bad:
        found = f"{bad.reason.value}" if bad.reason and isinstance(bad.detail, str) else "ESCAPED without words"
    except ConsiliumError:
        found = "refused"
    except Exception as error:
        found = f"ESCAPED {type(error).__name__} from {ending}, {which}"
    finally:
        file.unlink()
    return f"SLOW {ending}, {which}" if time.monotonic() - start > SLOWEST else found


def _read(file: Path, ending: str, dice: random.Random) -> None:
    units, channels = dice.random() < 0.5, dice.choice((1, 3))
    flat, deep = Wanted(channels, 2, CLASSES, units=units), Wanted(channels, 3, CLASSES, units=units)
    if ending == ".dcm":
        header = Header.of(header_facts("BodyPartExamined", file))
        if header.modality == "SEG":
            segment_labels(file)
            marked([file], [MARKED], 1, CLASSES, {})
            return
        found = read_images(file, dice.choice((flat, deep)))
        assert all(np.isfinite(picture.image).all() for picture in found)
    elif ending in {".nii", ".nii.gz"}:
        examine_nifti(file)
        assert np.isfinite(read_nifti(file, deep).image).all()
        read_label_map(file)
    elif ending == ".npz":
        reader = NpzFile(Source(kind="npz", path=file, columns=Columns()))
        wanted = Wanted(1, dice.choice((2, 3)), CLASSES, dice.choice((Target.CLASS, Target.LABELS)))
        for record in reader.index(wanted).records:
            reader.read(record, wanted)
    else:
        examine_picture(file)
        read_picture(file, flat)
        read_picture_mask(file)
