"""How does one image set become those of several hospitals, for a simulation or the demo?

Takes a MedMNIST npz file, or a folder with one npz (`images`) and an `index.csv` whose rows follow the images. Which
hospital a patient goes to follows from a hash of the patient, and where hospitals are to differ from what the first
image shows: nobody is at two hospitals, and adding images moves nobody. An official train, validation and test
membership stays with each image. A folder that holds one folder for each hospital, with a `source.toml` in each, is
taken as it is.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.imaging import Source
from client.imaging.npz import shapes
from privacy.errors import ConsiliumError

PARTS = ("train", "val", "test")
PATIENT_COLUMNS = ("patient", "patient_id", "group", "lesion_id", "subject")
LABEL_COLUMN = "label"
DECLARATION = "source.toml"

KNOWN_CLASSES = {
    "pneumoniamnist": ("normal", "pneumonia"),
    "breastmnist": ("malignant", "normal or benign"),
    "chest_xray_pneumonia": ("normal", "pneumonia"),
}
"""Class names of sets that number their classes; the key is how the file's or the folder's name begins."""


@dataclass(frozen=True)
class Share:
    """What one hospital was dealt: its name, its folder, its declaration, and counts (0 where nobody counted)."""

    name: str
    folder: Path
    source: Source
    images: int = 0
    patients: int = 0


@dataclass(frozen=True)
class Dealt:
    """A set at several hospitals: its name, its classes in the order of their numbers (() unknown), who has what."""

    name: str
    classes: tuple[str, ...]
    shares: tuple[Share, ...]


def deal(data: Path, folder: Path, names: Sequence[str], seed: int = 7, mix: int = 1) -> Dealt:
    """Deals the set at `data` out to folders below `folder`, each with `images.npz` and `source.toml`.

    Args:
        data: a MedMNIST-style npz, or a folder with one npz of plain images and an index.csv that names a label and
            a patient for each, or a folder with a folder and a `source.toml` for each hospital.
        folder: made if it is not there; files of the same names are overwritten.
        names: the hospitals. Where `data` has a folder for each they must be as many; they take the folders' names
            where these are the same, else the folders in their order.
        seed: another seed deals patients out differently.
        mix: how unlike the hospitals are in what they see; 1 not at all (see `hospital_of`).

    Raises:
        ConsiliumError: `data` is none of these, or does not say who the patients are.
    """
    folder = folder.resolve()
    own = own_folders(data)
    if own:
        return _as_it_is(data, own, names)
    if data.is_dir() and (data / "index.csv").is_file():
        return _deal_indexed(data, folder, names, seed, mix)
    if data.is_file() and "train_images" in shapes(data):
        return _deal_medmnist(data, folder, names, seed, mix)
    raise ConsiliumError(
        "This is no image set that can be dealt out to hospitals",
        str(data),
        "Name an npz file with train_images, train_labels, test_images, …, a folder with one npz and an index.csv, "
        "or a folder with one folder and a source.toml for each hospital.",
    )


def own_folders(data: Path) -> tuple[str, ...]:
    """Names of the folders below `data` that hold a hospital's declaration, sorted."""
    if not data.is_dir():
        return ()
    return tuple(sorted(path.parent.name for path in data.glob(f"*/{DECLARATION}")))


def hospital_of(patient: str, finding: int, seed: int, hospitals: int, mix: int = 1) -> int:
    """The number of the hospital that a patient goes to: a function of this patient and the seed alone.

    With `mix` above 1 hospitals differ in whom they see: of each finding (its number) one hospital sees `mix` times as
    many patients as each of the others, as a clinic does that others send their patients to.
    """
    digest = hashlib.sha256(f"{seed}\0{patient}".encode()).digest()
    tickets = [h for h in range(hospitals) for _ in range(mix if h == finding % hospitals else 1)]
    return tickets[int.from_bytes(digest[:8], "big") % len(tickets)]


def _as_it_is(data: Path, own: Sequence[str], names: Sequence[str]) -> Dealt:
    if len(own) != len(names):
        raise ConsiliumError(
            "There is another number of hospitals in the folder",
            f"{data} holds {len(own)}, {len(names)} are wanted",
            f"Write --sites {len(own)}, or leave it out.",
        )
    folders = names if set(names) == set(own) else own
    shares = []
    for name, found in zip(names, folders, strict=True):
        shares.append(Share(name, data / found, Source.from_file(data / found / DECLARATION)))
    return Dealt(data.resolve().name, (), tuple(shares))


def _deal_medmnist(file: Path, folder: Path, names: Sequence[str], seed: int, mix: int) -> Dealt:
    """MedMNIST files name no patient; their authors give one image per patient, and the declaration says so."""
    found = shapes(file)
    parts = [part for part in PARTS if f"{part}_images" in found]
    with np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[f"{part}_{name.split('/')[1]}"] for part, name in _arrays(parts)}
    classes = _classes(file.stem, [str(label) for part in parts for label in arrays[f"{part}/labels"].ravel()])
    shares = []
    for number, name in enumerate(names):
        chosen: dict[str, NDArray[Any]] = {}
        for part in parts:
            mine = [
                row
                for row, label in enumerate(arrays[f"{part}/labels"].ravel().tolist())
                if hospital_of(f"{part}_{row:06d}", int(label), seed, len(names), mix) == number
            ]
            for word in ("images", "labels"):
                chosen[f"{part}_{word}"] = arrays[f"{part}/{word}"][mine]
        images = sum(len(chosen[f"{part}_images"]) for part in parts)
        source = Source(kind="npz", path=Path("images.npz"), one_image_per_patient=True)
        shares.append(_write(folder / name, name, chosen, source, images))
    return Dealt(file.stem, classes, tuple(shares))


def _arrays(parts: Sequence[str]) -> list[tuple[str, str]]:
    return [(part, f"{part}/{word}") for part in parts for word in ("images", "labels")]


def _deal_indexed(data: Path, folder: Path, names: Sequence[str], seed: int, mix: int) -> Dealt:
    files = sorted(data.glob("*.npz"))
    with (data / "index.csv").open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    columns = list(rows[0]) if rows else []
    who = next((name for name in PATIENT_COLUMNS if name in columns), None)
    if len(files) != 1 or LABEL_COLUMN not in columns or who is None:
        raise ConsiliumError(
            "The folder does not say what its images are",
            str(data),
            f"Give one npz file and an index.csv with a column “{LABEL_COLUMN}” and one of "
            f"{', '.join(f'“{name}”' for name in PATIENT_COLUMNS)}.",
        )
    if shapes(files[0]).get("images", (-1,))[0] != len(rows):
        raise ConsiliumError(
            "The index does not fit the images", str(data), "Give one row for each entry of the array “images”."
        )
    with np.load(files[0], allow_pickle=False) as archive:
        images = archive["images"]
    labels = np.array([row[LABEL_COLUMN].strip() for row in rows])
    patients = np.array([row[who].strip() for row in rows])
    numbers = {label: number for number, label in enumerate(_ordered(labels.tolist()))}
    first = {str(p): numbers[str(label)] for p, label in zip(patients[::-1], labels[::-1], strict=True)}
    at = np.array([hospital_of(str(patient), first[str(patient)], seed, len(names), mix) for patient in patients])
    shares = []
    for number, name in enumerate(names):
        mine = (at == number) & (patients != "")
        chosen = {"images": images[mine], "labels": labels[mine], "patients": patients[mine]}
        source = Source(kind="npz", path=Path("images.npz"))
        count = len(set(patients[mine].tolist()))
        shares.append(_write(folder / name, name, chosen, source, count))
    return Dealt(data.resolve().name, _classes(data.resolve().name, labels.tolist()), tuple(shares))


def _write(folder: Path, name: str, arrays: dict[str, NDArray[Any]], source: Source, patients: int) -> Share:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "images.npz").open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
    (folder / "source.toml").write_text(source.to_toml(), encoding="utf-8")
    images = sum(len(array) for key, array in arrays.items() if key.endswith("images"))
    return Share(name, folder, source.anchored(folder), images, patients)


def _classes(name: str, labels: Sequence[str]) -> tuple[str, ...]:
    """Names where we know them, else the labels themselves, in the order of their numbers."""
    words = _ordered(labels)
    for known, classes in KNOWN_CLASSES.items():
        if name.startswith(known) and words == [str(number) for number in range(len(classes))]:
            return classes
    return tuple(words)


def _ordered(labels: Sequence[str]) -> list[str]:
    return sorted(set(labels), key=lambda word: (not word.isdecimal(), word.zfill(9)))
