"""Small DICOM files and tables made on the spot."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

KEY = bytes(range(32))


@pytest.fixture
def key() -> bytes:
    return KEY


@pytest.fixture
def dataset() -> Callable[..., FileDataset]:
    """(pixels, **tags) -> a valid single-frame CR image."""

    def make(pixels: np.ndarray | None = None, **tags: Any) -> FileDataset:
        pixels = np.arange(12 * 16, dtype=np.uint16).reshape(12, 16) if pixels is None else pixels
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
        meta.MediaStorageSOPInstanceUID = tags.pop("SOPInstanceUID", generate_uid())
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        made = FileDataset(io.BytesIO(), {}, file_meta=meta, preamble=b"\0" * 128)
        made.SOPClassUID, made.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        made.StudyInstanceUID = made.SeriesInstanceUID = generate_uid()
        made.PatientID, made.Modality = "P1", "CR"
        made.Manufacturer, made.ManufacturerModelName = "Maker", "Model"
        made.Rows, made.Columns = pixels.shape
        made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
        made.BitsAllocated = made.BitsStored = 8 * pixels.dtype.itemsize
        made.HighBit = made.BitsStored - 1
        made.PixelRepresentation = int(pixels.dtype.kind == "i")
        made.PixelData = pixels.tobytes()
        made["PixelData"].VR = "OW"
        for name, value in tags.items():
            setattr(made, name, value)
        return made

    return make


@pytest.fixture
def save(tmp_path: Path) -> Callable[[FileDataset, str], Path]:
    """(dataset, path below tmp_path) -> the file written."""

    def write(made: FileDataset, name: str = "a.dcm") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        made.save_as(file, enforce_file_format=True)
        return file

    return write


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """(rows, header) -> a CSV file beside the images."""

    def write(
        rows: Sequence[Sequence[str]], header: Sequence[str] = ("file", "patient", "label"), delimiter: str = ","
    ) -> Path:
        file = tmp_path / "labels.csv"
        with file.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, delimiter=delimiter).writerows([header, *rows])
        return file

    return write


@pytest.fixture
def real_set() -> Callable[[str], Path]:
    """(name) -> a real set's file or folder below CONSILIUM_DATA, or a loud skip that names what is missing."""

    def find(name: str) -> Path:
        path = Path(os.environ.get("CONSILIUM_DATA", Path(__file__).parents[4] / "shared" / "data")) / name
        if not path.exists():
            pytest.skip(f"REAL DATA ABSENT: {path} (set CONSILIUM_DATA); generated stand-ins are tested instead")
        return path

    return find


@pytest.fixture
def series(dataset: Callable[..., FileDataset], save: Callable[[FileDataset, str], Path]) -> Callable[..., list[Path]]:
    """(folder, slices, **tags) -> axial CT slices 2 mm apart, slice k filled with 100 k, saved in shuffled order."""

    def make(folder: str, slices: Sequence[int] = range(6), **tags: Any) -> list[Path]:
        about = {
            "SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid(), "Modality": "CT",
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [0.5, 0.75],
            "RescaleSlope": "1", "RescaleIntercept": "-1000", "FrameOfReferenceUID": generate_uid(), **tags,
        }  # fmt: skip
        files = []
        for place, at in enumerate(slices):
            pixels = np.full((8, 10), 100 * at, np.uint16)
            pixels[0, 0] = 1
            where = [-5.0, -4.0, 2.0 * at]
            made = dataset(pixels, **{"ImagePositionPatient": where, "InstanceNumber": str(at), **about})
            files.append(save(made, f"{folder}/{(7 * place) % len(slices):03d}-{place}.dcm"))
        return files

    return make
