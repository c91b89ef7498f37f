"""Three hospitals' DICOM folders for the demo: drawn chests, differing scanners, and the bad files every archive has.

Half of the patients of each hospital have a focal opacity. The hospitals differ as real ones do: size, contrast,
noise, polarity, bit depth, compression, pictures taken standing or in bed. Each folder also holds a few files that
nobody can use, so that the demo shows what happens to them. Everything follows from one seed, to the byte, and every
file says in its tags that it is synthetic.

    python -m deploy.demo.phantoms FOLDER
"""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, FileDataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from client.imaging import Columns, Source
from deploy.demo.chest import Chest, attenuation, draw_chest, draw_pose, marker

CLASSES = ("normal", "opacity")
PATIENTS = 150
_DENSITY = (0.28, 0.60)
_IMPLEMENTATION = "CONSILIUM_DEMO"


@dataclass(frozen=True)
class Scanner:
    """One X-ray machine: its name, its detector, how it encodes what it sees.

    Attributes:
        contrast: exponent of the tone curve; below 1 lifts dark lungs.
        exposure: attenuation that reads as white.
        noise: standard deviation of the quantum noise behind one unit of exposure.
    """

    manufacturer: str
    model: str
    size: int
    spacing: float
    bits: int
    inverted: bool
    contrast: float
    exposure: float
    noise: float
    computed: bool = False
    bedside: bool = False
    syntax: UID = ExplicitVRLittleEndian


@dataclass(frozen=True)
class Hospital:
    """A made hospital: its name, its folder of images, and its declaration as the site's operator would give it."""

    name: str
    folder: Path
    source: Source
    images: int
    patients: int
    broken: int


SCANNERS: dict[str, tuple[Scanner, ...]] = {
    "northgate": (
        Scanner("Phantom Optics", "Standing DR 12", 96, 3.65, 12, False, 0.85, 1.75, 0.018),
        Scanner("Phantom Optics", "Standing DR 9", 96, 3.65, 12, False, 0.95, 1.85, 0.024),
    ),
    "riverside": (Scanner("Roentgen & Sons", "Plate CR", 80, 4.40, 16, True, 1.05, 1.90, 0.028, computed=True),),
    "st-elmo": (
        Scanner("Mobilis", "Bedside X", 88, 4.00, 12, False, 0.78, 1.62, 0.034, bedside=True, syntax=JPEGLSLossless),
        Scanner("Mobilis", "Bedside M", 88, 4.00, 12, False, 0.82, 1.66, 0.028, bedside=True, syntax=RLELossless),
    ),
}


def generate(folder: Path, seed: int = 7, patients: int = PATIENTS) -> list[Hospital]:
    """Writes the three hospitals below `folder`, each with `images/`, `labels.csv` and `source.toml`.

    Args:
        folder: made if it is not there; files of the same names are overwritten.
        seed: the same seed gives the same bytes.
        patients: patients per hospital, at least 4.

    Returns:
        The hospitals in a fixed order; `Hospital.source` has absolute paths.
    """
    if patients < 4:
        raise ValueError("a hospital needs at least 4 patients")
    return [_hospital(folder.resolve() / name, name, number, seed, patients) for number, name in enumerate(SCANNERS)]


def _hospital(folder: Path, name: str, number: int, seed: int, patients: int) -> Hospital:
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, str, str]] = []
    for patient in range(patients):
        rng = np.random.default_rng([seed, number, patient])
        ill = patient % 2 == 1
        chest = draw_chest(rng, opacity=ill, density=_DENSITY)
        scanner = SCANNERS[name][int(rng.integers(len(SCANNERS[name])))]
        identity = f"PHANTOM-{number + 1}{patient:04d}"
        (images / identity).mkdir(exist_ok=True)
        for exposure in range(int(rng.integers(1, 3))):
            file = f"{identity}/{exposure + 1}.dcm"
            dataset = _dataset(chest, scanner, identity, name, f"{seed}/{file}", rng)
            dcmwrite(images / file, dataset, enforce_file_format=True)
            rows.append((file, identity, CLASSES[int(ill)]))
    broken, labelled = _broken(images, rows, np.random.default_rng([seed, number, patients, 1]))
    table = folder / "labels.csv"
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("file", "patient", "finding"))
        writer.writerows(rows + labelled)
    modality = "CR" if SCANNERS[name][0].computed else "DX"
    source = Source(
        kind="dicom",
        path=Path("images"),
        labels=Path("labels.csv"),
        columns=Columns(image="file", patient="patient", label="finding"),
        modalities=(modality,),
    )
    (folder / "source.toml").write_text(source.to_toml(), encoding="utf-8")
    return Hospital(name, folder, source.anchored(folder), len(rows), patients, broken)


def _dataset(
    chest: Chest, scanner: Scanner, identity: str, hospital: str, origin: str, rng: np.random.Generator
) -> FileDataset:
    stored = _expose(chest, scanner, rng)
    storage = ComputedRadiographyImageStorage if scanner.computed else DigitalXRayImageStorageForPresentation
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = storage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["image", origin])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationVersionName = _IMPLEMENTATION
    dataset = FileDataset(io.BytesIO(), {}, file_meta=meta, preamble=b"\0" * 128)
    _describe_patient(dataset, identity, hospital, origin)
    _describe_machine(dataset, scanner)
    top = (1 << scanner.bits) - 1
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if scanner.inverted else "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, scanner.bits, scanner.bits - 1
    dataset.PixelRepresentation = 0
    dataset.WindowCenter, dataset.WindowWidth = str((top + 1) // 2), str(top + 1)
    dataset.PixelData = stored.astype("<u2").tobytes()
    dataset["PixelData"].VR = "OW"
    if scanner.syntax != ExplicitVRLittleEndian:
        dataset.compress(scanner.syntax, generate_instance_uid=False)
    return dataset


def _expose(chest: Chest, scanner: Scanner, rng: np.random.Generator) -> NDArray[np.uint16]:
    """Attenuation through one machine to stored values: quantum noise, tone curve, marker, polarity, depth."""
    pose = draw_pose(rng, bedside=scanner.bedside)
    seen = attenuation(chest, pose, scanner.size, rng)
    behind = np.exp(-1.2 * seen)  # fewer quanta behind dense tissue, so more noise there
    seen = seen + scanner.noise * rng.standard_normal(seen.shape).astype(np.float32) / np.sqrt(behind)
    exposure = scanner.exposure * float(rng.normal(1, 0.05))
    bright = np.clip(seen / exposure, 0, 1) ** scanner.contrast
    bright = np.maximum(bright, marker(scanner.size))
    if scanner.inverted:
        bright = 1 - bright
    stored: NDArray[np.uint16] = np.rint(bright * ((1 << scanner.bits) - 1)).astype(np.uint16)
    return stored


def _describe_patient(dataset: Dataset, identity: str, hospital: str, origin: str) -> None:
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=["imaging study", hospital, origin])
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=["series", hospital, origin])
    dataset.PatientName = f"PHANTOM^{identity.removeprefix('PHANTOM-')}"
    dataset.PatientID = identity
    dataset.PatientBirthDate = dataset.PatientSex = ""
    dataset.StudyDate, dataset.StudyTime = "20000101", "120000"
    dataset.StudyID = dataset.AccessionNumber = dataset.ReferringPhysicianName = ""
    dataset.SeriesNumber = dataset.InstanceNumber = "1"
    dataset.InstitutionName = f"{hospital} (phantom)"
    dataset.ImageComments = "Synthetic phantom: drawn by a program, not a patient."
    dataset.PatientOrientation = ["L", "F"]
    dataset.BodyPartExamined = "CHEST"


def _describe_machine(dataset: Dataset, scanner: Scanner) -> None:
    dataset.Manufacturer = scanner.manufacturer
    dataset.ManufacturerModelName = scanner.model
    dataset.ImageType = ["DERIVED", "PRIMARY"]
    dataset.ViewPosition = "AP" if scanner.bedside else "PA"
    dataset.ImagerPixelSpacing = [scanner.spacing, scanner.spacing]
    if scanner.computed:
        dataset.Modality = "CR"
        return
    dataset.Modality = "DX"
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.ImageLaterality = "U"
    dataset.PixelIntensityRelationship = "LOG"
    dataset.PixelIntensityRelationshipSign = 1
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = "0", "1", "US"
    dataset.PresentationLUTShape = "IDENTITY"
    dataset.LossyImageCompression = "00"
    dataset.BurnedInAnnotation = "YES"  # the side marker
    dataset.DetectorType = "DIRECT"
    dataset.AcquisitionContextSequence = []
    dataset.AnatomicRegionSequence = [_code("51185008", "SCT", "Chest")]
    dataset.ViewCodeSequence = [
        _code("399348003", "SCT", "antero-posterior")
        if scanner.bedside
        else _code("272479007", "SCT", "postero-anterior")
    ]


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _broken(
    images: Path, rows: list[tuple[str, str, str]], rng: np.random.Generator
) -> tuple[int, list[tuple[str, str, str]]]:
    """What every archive has: five files nobody can use. Returns how many, and those that the table lists."""
    (images / "damaged").mkdir(exist_ok=True)
    picks = [images / rows[int(i)][0] for i in rng.choice(len(rows), 4, replace=False)]

    cut = picks[0].read_bytes()
    (images / "damaged" / "interrupted-transfer.dcm").write_bytes(cut[: len(cut) - len(cut) // 3])

    text = "This is a letter, saved under the wrong name. It is not an image.\n"
    (images / "damaged" / "letter.dcm").write_text(text, encoding="utf-8")

    for name, pick, keep_pixels in (("header-only.dcm", picks[1], False), ("no-label.dcm", picks[2], True)):
        dataset = _copy(pick, name)
        if not keep_pixels:
            del dataset.PixelData
        dcmwrite(images / "damaged" / name, dataset, enforce_file_format=True)

    (images / "damaged" / "sent-twice.dcm").write_bytes(picks[3].read_bytes())
    owner = {file: (patient, finding) for file, patient, finding in rows}
    listed = [
        (f"damaged/{name}", *owner[pick.relative_to(images).as_posix()])
        for name, pick in zip(("interrupted-transfer.dcm", "header-only.dcm"), picks[:2], strict=True)
    ]
    listed.append(("damaged/letter.dcm", "PHANTOM-00000", CLASSES[0]))
    listed.append(("damaged/sent-twice.dcm", *owner[picks[3].relative_to(images).as_posix()]))
    return 5, listed


def _copy(file: Path, name: str) -> FileDataset:
    from pydicom import dcmread

    dataset = dcmread(file)
    uid = generate_uid(entropy_srcs=["copy", name, dataset.SOPInstanceUID])
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
    return dataset


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m deploy.demo.phantoms FOLDER")
    for made in generate(Path(sys.argv[1])):
        print(f"{made.name}: {made.images} images of {made.patients} patients, {made.broken} bad files, {made.folder}")
