"""Damaged files by the thousand: small good files of every kind, changed at random, and read as an agent reads them.

`one(seed)` is a function of its seed, so that a finding can be made again, and can be sent to another process, so that
a decoder that dies is a finding too.
"""

from __future__ import annotations

import functools
import io
import os
import random
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image as Pillow
from pydicom import Dataset
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
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
from client.imaging.seg import marked
from privacy.errors import ConsiliumError

SLOWEST = 20.0
"""Seconds that no single file may take."""
CLASSES = ("a", "b")
SIDE = 64


def _dicom(frames: int, syntax: str | None, **tags: object) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, "1.2.3"
    meta.TransferSyntaxUID = ImplicitVRLittleEndian if syntax == "implicit" else ExplicitVRLittleEndian
    made = FileDataset(io.BytesIO(), {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID = MRImageStorage, "1.2.3"
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
    if syntax == JPEGBaseline8Bit:
        stream = io.BytesIO()
        Pillow.fromarray((pixels[: SIDE * SIDE] // 16).astype(np.uint8).reshape(SIDE, SIDE)).save(stream, "JPEG")
        made.file_meta.TransferSyntaxUID, made.BitsAllocated, made.BitsStored, made.HighBit = syntax, 8, 8, 7
        made.PixelData = encapsulate([stream.getvalue()])
        made["PixelData"].VR = "OB"
    out = io.BytesIO()
    made.save_as(out, enforce_file_format=True)
    return out.getvalue()


def _saved(save) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "f.nii.gz"
        save(file)
        return file.read_bytes()


@functools.cache
def corpus() -> tuple[tuple[str, bytes], ...]:
    """(ending, bytes) of good files."""
    picture, png, jpeg = np.arange(900, dtype=np.uint8).reshape(30, 30), io.BytesIO(), io.BytesIO()
    Pillow.fromarray(picture).save(png, "PNG")
    Pillow.fromarray(np.stack([picture] * 3, -1)).save(jpeg, "JPEG")
    volume = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    zipped = _saved(lambda file: nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), file))
    npz = io.BytesIO()
    np.savez(npz, images=np.zeros((4, 6, 6), np.uint8), labels=np.zeros(4), patients=np.array(["p", "q", "r", "s"]))
    plain = nibabel.Nifti1Image(volume, np.eye(4)).to_bytes()
    lut = {"RescaleSlope": None, "WindowCenter": None}
    return (
        (".dcm", _dicom(1, None)),
        (".dcm", _dicom(1, "implicit")),
        (".dcm", _dicom(1, JPEGLSLossless)),
        (".dcm", _dicom(1, RLELossless)),
        (".dcm", _dicom(3, None)),
        (".dcm", _dicom(3, JPEGLSLossless)),
        (".dcm", _dicom(1, JPEG2000Lossless)),
        (".dcm", _dicom(1, JPEGBaseline8Bit)),
        (".dcm", _dicom(1, None, Modality="SEG", **lut)),
        (".nii", plain),
        (".nii.gz", zipped),
        (".png", png.getvalue()),
        (".jpg", jpeg.getvalue()),
        (".npz", npz.getvalue()),
    )


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
    handle, name = tempfile.mkstemp(suffix=ending)
    file, start = Path(name), time.monotonic()
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(damaged(raw, dice))
        _read(file, ending, dice)
        outcome = "read"
    except Unusable as bad:
        outcome = f"{bad.reason.value}" if bad.reason and isinstance(bad.detail, str) else "ESCAPED without words"
    except ConsiliumError:
        outcome = "refused"
    except Exception as error:
        outcome = f"ESCAPED {type(error).__name__} from {ending}, seed {seed}"
    finally:
        file.unlink()
    return f"SLOW {ending}, seed {seed}" if time.monotonic() - start > SLOWEST else outcome


def _read(file: Path, ending: str, dice: random.Random) -> None:
    units, channels = dice.random() < 0.5, dice.choice((1, 3))
    flat, deep = Wanted(channels, 2, CLASSES, units=units), Wanted(channels, 3, CLASSES, units=units)
    if ending == ".dcm":
        header = Header.of(header_facts("BodyPartExamined", file))
        if header.modality == "SEG":
            marked([file], [header.instance], 1, CLASSES, {})
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
