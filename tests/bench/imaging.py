"""How fast are a hospital's files indexed and decoded, and how soon does a warm agent take its first step?

Beside a plain loop over pydicom and beside MONAI's readers, on the same files in the same run: real DICOM of several
scanners (each file several times, under fresh identifiers), the same as JPEG 2000, JPEG photographs, and NIfTI volumes.
What we do in that time and the loops do not: hash every file, check it against limits, rescale and window it, and take
its fingerprints. Where the real sets are absent, drawn files of the same sizes stand in, and the table says so.
"""

from __future__ import annotations

import csv
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import nibabel
import numpy as np
import typer
from PIL import Image as Pillow
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, MRImageStorage, generate_uid

from client.imaging import Columns, Source, load, pool
from client.imaging.loading import READERS, given_up, pictures, wanted_of
from privacy.terminal import run as run_command
from tests.bench.table import Line, show

DATA = Path(os.environ.get("CONSILIUM_DATA", "../shared/data"))
REPEATS = 3
KEY = bytes(range(32))
COPIES = 6
PHOTOGRAPHS = 1500
CLASSES = ("a", "b")

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Bed:
    """One folder of files with its declaration, the study's input, and how others read a file of it."""

    name: str
    source: Source
    spec: dict[str, Any]
    header: Callable[[Path], object]
    whole: Callable[[Path], object]
    reader: str

    @property
    def files(self) -> list[Path]:
        """The images, in order."""
        return sorted(file for file in self.source.path.iterdir() if file.is_file())


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Where the real sets are.")] = DATA,
    repeats: Annotated[int, typer.Option(help="How often each thing is measured; the median counts.")] = REPEATS,
) -> None:
    """Measure, print the table, and write build/bench/imaging.json."""
    warnings.simplefilter("ignore")
    work = Path(tempfile.mkdtemp(prefix="bench-imaging-"))
    try:
        real = (data / "scanner_dicom").is_dir()
        lines = []
        for bed in _beds(data, work):
            lines += _measured(bed, repeats)
        lines += _first_step(work, repeats)
        notes = [
            "real files" if real else "REAL DATA ABSENT: drawn files stand in",
            f"files a second, medians of {repeats}; load {' '.join(f'{value:.1f}' for value in os.getloadavg())}, "
            f"{os.cpu_count()} cores; starting the processes is part of “two processes”",
        ]
        show("imaging", "Indexing, decoding, and the first step", lines, notes)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _measured(bed: Bed, repeats: int) -> list[Line]:
    files, count = bed.files, len(bed.files)
    index: dict[str, list[float]] = {}
    decode: dict[str, list[float]] = {}
    from monai.transforms import LoadImage

    monai = LoadImage(reader=bed.reader, image_only=True)
    for turn in range(repeats):  # one after the other in every turn, so that a busy minute meets all of them
        store = bed.source.path.parent / f"{bed.source.path.name}-{turn}.sqlite"
        _time(index, "ours", lambda: _survey(bed, store, 0))  # noqa: B023
        _time(index, "ours, unchanged", lambda: _survey(bed, store, 0))  # noqa: B023
        _time(index, "ours, two processes", lambda: _survey(bed, None, 2))
        _time(index, "a plain loop", lambda: _each(bed.header, files))
        _time(decode, "ours", lambda: _decoded(bed, 0))
        _time(decode, "ours, two processes", lambda: _decoded(bed, 2))
        _time(decode, "a plain loop", lambda: _each(bed.whole, files))
        _time(decode, "MONAI", lambda: _each(monai, files))
    return [_line(f"{bed.name}: index {count}", index, count), _line(f"{bed.name}: decode {count}", decode, count)]


def _survey(bed: Bed, store: Path | None, processes: int) -> Any:
    reader = READERS[bed.source.kind](bed.source)
    reader.survey(lambda: None, store, processes)
    return reader


def _decoded(bed: Bed, processes: int) -> None:
    """Everything after the index: judging, decoding, fingerprints; the index itself is not counted here."""
    reader = _survey(bed, bed.source.path.parent / f"{bed.source.path.name}-0.sqlite", 0)
    wanted = wanted_of(bed.spec, CLASSES)
    records = reader.index(wanted).records
    work = partial(pictures, reader.opener, wanted)
    found = sum(isinstance(result, list) for result in pool.each(work, records, given_up, processes, 4))
    if found != len(bed.files):
        raise RuntimeError(f"{bed.name}: {found} of {len(bed.files)} files were read")


def _each(read: Callable[[Path], object], files: Iterable[Path]) -> None:
    for file in files:
        read(file)


def _time(into: dict[str, list[float]], name: str, run: Callable[[], object]) -> None:
    start = time.perf_counter()
    run()
    into.setdefault(name, []).append(time.perf_counter() - start)


def _line(what: str, seconds: dict[str, list[float]], count: int) -> Line:
    rates = {name: count / statistics.median(values) for name, values in seconds.items()}
    return Line(what, "files/s", rates.pop("ours"), {name.removeprefix("ours, "): rate for name, rate in rates.items()})


# ---- the files -----------------------------------------------------------------------------------------------


def _beds(data: Path, work: Path) -> Iterable[Bed]:
    plain, packed = _dicom(data, work / "dicom", compressed=False), _dicom(data, work / "j2k", compressed=True)
    grey = {"channels": 1, "size": [64, 64]}
    for name, folder in (("DICOM", plain), ("DICOM, JPEG 2000", packed)):
        source = _source("dicom", folder)
        yield Bed(
            name, source, grey, partial(dcmread, stop_before_pixels=True), lambda file: dcmread(file).pixel_array,
            "PydicomReader",
        )  # fmt: skip
    photographs = _source("images", _photographs(data, work / "jpeg"))
    yield Bed(
        "JPEG", photographs, {"channels": 3, "size": [64, 64]}, lambda file: Pillow.open(file).close(),
        lambda file: np.asarray(Pillow.open(file).convert("RGB")), "PILReader",
    )  # fmt: skip
    volumes = _source("nifti", _volumes(data, work / "nifti"))
    yield Bed(
        "NIfTI", volumes, {"channels": 1, "size": [32, 32, 32]}, lambda file: nibabel.load(file).shape,
        lambda file: np.asanyarray(nibabel.load(file).dataobj), "NibabelReader",
    )  # fmt: skip


def _source(kind: Any, folder: Path) -> Source:
    """Every file a patient of its own, with a table beside the folder."""
    labels = folder.with_suffix(".csv")
    with labels.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(("file", "patient", "label"))
        for at, file in enumerate(sorted(folder.iterdir())):
            rows.writerow((file.name, at, CLASSES[at % 2]))
    placeholders = kind == "dicom"
    return Source(
        kind=kind, path=folder, labels=labels, columns=Columns(patient="patient"), placeholder_headers=placeholders
    )


def _dicom(data: Path, folder: Path, *, compressed: bool) -> Path:
    folder.mkdir(parents=True)
    sets = [data / name for name in ("scanner_dicom", "brain_multimodal_dicom") if (data / name).is_dir()]
    files = sorted(file for part in sets for file in part.rglob("*.dcm"))
    if not files:
        files = [_drawn_dicom(folder.parent / f"drawn-{at}.dcm", at) for at in range(40)]
    for copy in range(1 if compressed else COPIES):
        for at, file in enumerate(files):
            made = dcmread(file)
            made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            if compressed:
                made.compress(JPEG2000Lossless, generate_instance_uid=False)
            made.save_as(folder / f"{copy}-{at:04d}.dcm")
    return folder


def _drawn_dicom(file: Path, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 4096, (256, 256)).astype(np.uint16)
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID = MRImageStorage
    made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    made.StudyInstanceUID, made.SeriesInstanceUID, made.Modality, made.PatientID = "1.2.3", "1.2.4", "MR", "P"
    made.Rows, made.Columns, made.SamplesPerPixel, made.PhotometricInterpretation = 256, 256, 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
    made.PixelData = pixels.tobytes()
    made.save_as(file, enforce_file_format=True)
    return file


def _photographs(data: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    real = sorted((data / "ham10000" / "images").glob("*.jpg"))[:PHOTOGRAPHS]
    for file in real:
        shutil.copy(file, folder)
    for at in range(0 if real else PHOTOGRAPHS):
        values = np.random.default_rng(at).integers(0, 255, (15, 20, 3)).astype(np.uint8)
        Pillow.fromarray(values).resize((200, 150)).save(folder / f"{at:05d}.jpg", quality=90)
    return folder


def _volumes(data: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    real = sorted((data / "hippocampus_msd04" / "images").glob("*.nii.gz"))
    for file in real:
        shutil.copy(file, folder)
    for at in range(0 if real else 100):
        values = np.random.default_rng(at).integers(0, 999, (35, 51, 36)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / f"{at:04d}.nii.gz")
    return folder


# ---- the first step ------------------------------------------------------------------------------------------


def _first_step(work: Path, repeats: int) -> list[Line]:
    """From the declaration to the end of the first training step, libraries loaded: cold, and from the cache."""
    import torch

    from models import networks, tasks, transforms
    from privacy.study import Study

    text = (
        'sites = ["st-anna", "st-bona"]\n[study]\nname = "bench"\ntitle = "Bench"\npurpose = "Bench"\n'
        '[task]\nclasses = ["a", "b"]\n[network]\nname = "resnet-small"\n[input]\nchannels = 3\nsize = [64, 64]\n'
    )
    spec = Study.from_toml(text).spec()
    task = tasks.get(spec)
    source = _source("images", work / "jpeg")
    cold, warm = [], []
    transforms.preparation(spec)(np.zeros((3, 8, 8), np.float32))

    def step(cache: Path) -> float:
        start = time.perf_counter()
        cohort = load(source, spec["input"], CLASSES, spec["split"], KEY, cache, prepare=transforms.preparation(spec))
        network = networks.build(spec)
        chosen = cohort.indices("train")[: spec["optimiser"]["batch_size"]]
        loss = task.loss(network(torch.from_numpy(cohort.images[chosen])), torch.from_numpy(cohort.targets[chosen]))
        torch.autograd.backward(loss)
        return time.perf_counter() - start

    for turn in range(repeats):
        cold.append(step(work / f"cache-{turn}"))
        warm.append(step(work / f"cache-{turn}"))
    what = f"the first step on {len(list((work / 'jpeg').iterdir()))} JPEG images"
    return [Line(what, "s", statistics.median(warm), {"nothing cached": statistics.median(cold)})]


if __name__ == "__main__":
    raise SystemExit(run_command(app, "python -m tests.bench.imaging"))
