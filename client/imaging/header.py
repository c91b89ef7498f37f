"""What does the header of one DICOM file say? Read up to the pixels and checked against limits.

A file of a few bytes cannot ask for gigabytes: the declared size is checked before anything is decoded, and whether
all bytes of the pixels are there is checked by their lengths alone. Every way in which a file can be bad ends as
`Unusable`.

Source: DICOM PS3.3 C.7.6.3 (image pixel), PS3.5 A.4 and A.5 (compressed and deflated transfer syntaxes).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydicom import Dataset, FileDataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, MediaStorageDirectoryStorage

from client.imaging.display import number, numbers, text
from client.imaging.files import MAX_FILE_BYTES
from client.imaging.geometry import Plane
from client.imaging.records import Reason, Unusable

# pydicom logs the values that it doubts, and those can be a patient's; the decoders log every damaged stream.
for _logger in ("pydicom", "openjpeg", "pylibjpeg", "libjpeg", "highdicom"):
    logging.getLogger(_logger).setLevel(logging.CRITICAL)

_T = TypeVar("_T")

MAX_VALUES = 1 << 27
"""Most values (rows x columns x frames x samples) that one file may declare: 128 million, over four times the
largest mammogram."""
# Whole data sets or frames under zlib, which pydicom inflates without a limit; no scanner writes them.
_DEFLATED = frozenset({DeflatedExplicitVRLittleEndian, "1.2.840.10008.1.2.8.1", "1.2.840.10008.1.2.4.95"})

NOT_PICTURES = frozenset((
    "SEG", "PR", "KO", "SR", "DOC", "REG", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "FID", "RWV", "ECG", "HD", "AU",
    "PLAN", "STAIN", "ANN", "M3D",
))  # fmt: skip
"""Objects of a DICOM folder that are about images and are none themselves (PS3.3 C.7.3.1.1.1)."""
_PIXEL_TAGS = (b"\xe0\x7f\x08\x00", b"\xe0\x7f\x09\x00", b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")
_UNDEFINED = 0xFFFFFFFF
EXPECTED = (
    "PatientID", "PatientSex", "PatientAge", "StudyDate", "Modality", "BodyPartExamined", "Manufacturer",
    "ManufacturerModelName", "PixelSpacing", "SliceThickness", "ImagePositionPatient", "WindowCenter",
    "RescaleSlope", "FrameOfReferenceUID",
)  # fmt: skip
"""Tags whose absence the report counts."""
_READ = [
    *EXPECTED, "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns", "NumberOfFrames",
    "SamplesPerPixel", "PhotometricInterpretation", "ImageOrientationPatient", "ImagerPixelSpacing",
    "InstanceNumber", "AcquisitionNumber", "TemporalPositionIdentifier", "EchoTime", "ReferencedSeriesSequence",
]  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What the index needs of one file. `patient` is the PatientID and stays in the agent.

    Attributes:
        position, orientation, spacing: of a single slice, empty where the file does not say (`geometry.Plane`).
        turn: what tells apart slices in one place: acquisition, time, echo and instance number.
        answer: the value of the tag that the source takes labels from.
        about: the instances that a segmentation is about.
        missing: which of `EXPECTED` are absent or empty.
        syntax: the UID of the transfer syntax.
    """

    patient: str
    instance: str
    series: str
    imaging_study: str
    modality: str
    scanner: str
    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str
    position: tuple[float, ...] = ()
    orientation: tuple[float, ...] = ()
    spacing: tuple[float, ...] = ()
    turn: tuple[float, ...] = ()
    answer: str = ""
    about: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    syntax: str = ""

    @property
    def plane(self) -> Plane | None:
        """Where the slice lies; None where the file does not say."""
        if (len(self.position), len(self.orientation), len(self.spacing)) != (3, 6, 2):
            return None
        return Plane(self.position, self.orientation, self.spacing)

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Header:
        """From what `facts` gave, also after JSON."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()
        }
        return cls(**values)


def read_header(path: Path, label_tag: str = "") -> Header:
    """Reads one file up to its pixels and checks that an image of allowed size follows.

    Raises:
        Unusable: not DICOM, damaged, truncated, no image, or one larger than `MAX_VALUES`.
    """
    return guarded(lambda: _read_header(path, label_tag), Reason.DAMAGED)


def header_facts(label_tag: str, path: Path) -> dict[str, Any]:
    """`read_header` for the index."""
    return read_header(path, label_tag).facts()


def guarded(read: Callable[[], _T], otherwise: Reason) -> _T:
    """Whatever goes wrong in `read`, and libraries raise anything at all on bad bytes, comes out as `Unusable`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read()
    except Unusable:
        raise
    except InvalidDicomError:
        raise Unusable(Reason.NOT_DICOM) from None
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise Unusable(Reason.NOT_REGULAR, type(error).__name__) from None
    except (EOFError, struct.error):
        raise Unusable(Reason.TRUNCATED) from None
    except Exception as error:  # noqa: BLE001 - decoders raise anything at all on bad bytes; one file is one file
        raise Unusable(otherwise, type(error).__name__) from None


def guarded_mask(read: Callable[[], _T]) -> _T:
    """The same for the file of a mask: whatever is wrong with it, the image has no usable mask."""
    try:
        return guarded(read, Reason.MASK)
    except Unusable as bad:
        detail = bad.detail if bad.reason is Reason.MASK else f"{bad.reason.value} {bad.detail}".strip()
        raise Unusable(Reason.MASK, detail) from None


def _read_header(path: Path, label_tag: str) -> Header:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise Unusable(Reason.FILE_SIZE, f"{size >> 20} MB")
    with path.open("rb") as stream:
        if stream.read(132)[128:] != b"DICM":  # the common case of rubbish, without an exception of pydicom's
            raise Unusable(Reason.NOT_DICOM)
    syntax = UID(str(read_file_meta_info(path).get("TransferSyntaxUID", "")))
    if syntax in _DEFLATED:
        raise Unusable(Reason.CODEC, "deflated transfer syntax")
    wanted: list[Any] = [*_READ, label_tag] if label_tag else _READ
    with path.open("rb") as stream:
        dataset = dcmread(stream, stop_before_pixels=True, specific_tags=wanted)
        position = stream.tell()
        has_pixels = stream.read(4) in _PIXEL_TAGS
        whole = not has_pixels or _is_whole(stream, size, *dataset.original_encoding)
    header = _header(dataset, label_tag)
    if not has_pixels:
        # A header without rows is an object that is no image, or the front of one whose end was lost.
        whole = header.rows > 0 or header.modality in NOT_PICTURES or _is_directory(dataset)
        raise Unusable(Reason.NO_PIXELS if whole and position <= size else Reason.TRUNCATED)
    if not whole:
        raise Unusable(Reason.TRUNCATED)
    if min(header.rows, header.columns, header.frames, header.samples) < 1:
        raise Unusable(Reason.DAMAGED, "rows, columns or samples are missing")
    if header.rows * header.columns * header.frames * header.samples > MAX_VALUES:
        raise Unusable(Reason.BOMB, f"{header.frames} x {header.rows} x {header.columns} x {header.samples}")
    return header


def _header(dataset: FileDataset, label_tag: str) -> Header:
    about = [
        text(instance, "ReferencedSOPInstanceUID")
        for series in dataset.get("ReferencedSeriesSequence", ())
        for instance in series.get("ReferencedInstanceSequence", ())
    ]
    turn = ("AcquisitionNumber", "TemporalPositionIdentifier", "EchoTime", "InstanceNumber")
    return Header(
        patient=text(dataset, "PatientID"),
        instance=text(dataset, "SOPInstanceUID"),
        series=text(dataset, "SeriesInstanceUID"),
        imaging_study=text(dataset, "StudyInstanceUID"),
        modality=text(dataset, "Modality"),
        scanner=f"{text(dataset, 'Manufacturer')} {text(dataset, 'ManufacturerModelName')}".strip(),
        rows=number(dataset, "Rows", 0),
        columns=number(dataset, "Columns", 0),
        frames=number(dataset, "NumberOfFrames", 1),
        samples=number(dataset, "SamplesPerPixel", 1),
        photometric=text(dataset, "PhotometricInterpretation"),
        position=_measured(dataset, "ImagePositionPatient", 3),
        orientation=_measured(dataset, "ImageOrientationPatient", 6),
        spacing=pixel_spacing(dataset),
        turn=tuple((_measured(dataset, word, 1) or (0.0,))[0] for word in turn),
        answer=text(dataset, label_tag) if label_tag else "",
        about=tuple(about),
        missing=tuple(word for word in EXPECTED if not text(dataset, word)),
        syntax=str(dataset.file_meta.get("TransferSyntaxUID", "")),
    )


def pixel_spacing(dataset: Dataset) -> tuple[float, ...]:
    """mm between rows and between columns, in the patient or else at the detector; () where neither is given."""
    return next(
        (
            found
            for word in ("PixelSpacing", "ImagerPixelSpacing")
            if len(found := _measured(dataset, word, 2)) == 2 and min(found) > 0
        ),
        (),
    )


def plane_of(dataset: Dataset) -> Plane | None:
    """Where a slice lies, by its own data set or `display.of_frame`."""
    position = _measured(dataset, "ImagePositionPatient", 3)
    orientation = _measured(dataset, "ImageOrientationPatient", 6)
    spacing = pixel_spacing(dataset)
    return Plane(position, orientation, spacing) if position and orientation and spacing else None


def _measured(dataset: Dataset, word: str, count: int) -> tuple[float, ...]:
    """`count` finite numbers, or none at all: a wrong measure is no reason to lose the image."""
    try:
        found = numbers(dataset, word)
    except (TypeError, ValueError):
        return ()
    good = len(found) == count and all(abs(value) < 1e9 for value in found)
    return found if good else ()


def _is_directory(dataset: FileDataset) -> bool:
    """Is it a DICOMDIR (PS3.10, 8.6), which lists images and holds none?"""
    return bool(dataset.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage)


def _is_whole(stream: BinaryIO, size: int, implicit: bool | None, little: bool | None) -> bool:
    """Are all bytes of the pixel element there? `stream` stands after its tag; nothing is read but lengths."""
    order = "<" if little else ">"
    if not implicit:
        stream.seek(4, os.SEEK_CUR)  # the VR and two reserved bytes
    (length,) = struct.unpack(order + "I", stream.read(4))
    if length != _UNDEFINED:
        return stream.tell() + int(length) <= size
    while True:  # encapsulated: items up to the delimiter (PS3.5 A.4)
        tag, length = struct.unpack("<4sI", stream.read(8))
        if tag != b"\xfe\xff\x00\xe0" or length == _UNDEFINED:
            return bool(tag == b"\xfe\xff\xdd\xe0")
        stream.seek(length, os.SEEK_CUR)


def shown_modality(value: str) -> str:
    """A modality fit for a report: DICOM code strings only, anything else might be a name typed there."""
    return value if re.fullmatch(r"[A-Z0-9 _]{1,16}", value) else "unnamed"
