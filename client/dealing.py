"""How does one image set become those of several hospitals, for a simulation or the demo?

Takes an npz file as `client.imaging.npz` reads it (MedMNIST's arrays or plain ones), or a folder with one npz
(`images`) and an `index.csv` whose rows follow the images. Which hospital a patient goes to follows from a hash of the
patient, and where hospitals are to differ from what the first image shows: nobody is at two hospitals, and adding
images moves nobody. Where nobody is named each image counts as one patient, and `Dealt.note` says so. An official
train, validation and test membership stays with each image, and so do masks. A folder that holds one folder for each
hospital, with a `source.toml` in each, is taken as it is.
"""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.imaging import Source
from client.imaging.npz import read_array, shapes, words_of
from privacy.errors import ConsiliumError

PARTS = ("train_", "val_", "test_")
ARRAYS = ("images", "labels", "masks", "patients")
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
    """A set at several hospitals: its name, its classes in the order of their numbers (() unknown), who has what.

    `note` is a sentence for whoever deals, where the set does not say of each image who its patient is.
    """

    name: str
    classes: tuple[str, ...]
    shares: tuple[Share, ...]
    note: str = ""


@dataclass(frozen=True)
class _Part:
    """Images of one side of a set, or all of them.

    Attributes:
        prefix: how the names of its arrays begin: one of `PARTS`, or nothing.
        arrays: by the rest of their names, with one entry for each image.
        patients: who each image is of; "" nobody.
        labels: each image's label as text, several with `;` between them; "" none.
    """

    prefix: str
    arrays: dict[str, NDArray[Any]]
    patients: list[str]
    labels: list[str]


@dataclass(frozen=True)
class _Set:
    """A set before it is dealt out; `named` says whether it names its patients, `spacing` is as in its npz file."""

    name: str
    parts: Sequence[_Part]
    named: bool
    spacing: NDArray[Any] | None


def deal(data: Path, folder: Path, names: Sequence[str], seed: int = 7, mix: int = 1) -> Dealt:
    """Deals the set at `data` out to folders below `folder`, each with `images.npz` and `source.toml`.

    Args:
        data: an npz, or a folder with one npz of plain images and an index.csv that names a patient for each, and a
            label unless the npz has masks, or a folder with a folder and a `source.toml` for each hospital.
        folder: made if it is not there; files of the same names are overwritten.
        names: the hospitals. Where `data` has a folder for each they must be as many; they take the folders' names
            where these are the same, else the folders in their order.
        seed: another seed deals patients out differently.
        mix: how unlike the hospitals are in what they see; 1 not at all (see `hospital_of`).

    Raises:
        ConsiliumError: `data` is none of these, its arrays do not fit each other, or its own split tears a patient.
    """
    folder = folder.resolve()
    own = own_folders(data)
    if own:
        return _as_it_is(data, own, names)
    if data.is_dir() and (data / "index.csv").is_file():
        return _hand_out(_indexed(data), folder, names, seed, mix)
    if data.is_file() and {"images", *(f"{part}images" for part in PARTS)} & set(shapes(data)):
        return _hand_out(_plain(data), folder, names, seed, mix)
    raise ConsiliumError(
        "This is no image set that can be dealt out to hospitals",
        str(data),
        "Name an npz file with images, labels and patients, or train_images, train_labels, test_images, …, a folder "
        "with one npz and an index.csv, or a folder with one folder and a source.toml for each hospital.",
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


def _plain(file: Path) -> _Set:
    """A set in one npz file."""
    found = shapes(file)
    prefixes = [part for part in PARTS if f"{part}images" in found] or [""]
    present = {word for word in ARRAYS if any(f"{prefix}{word}" in found for prefix in prefixes)}
    if not present & {"labels", "masks"}:
        present.add("labels")  # which is then told to be missing
    parts = []
    for prefix in prefixes:
        arrays = {word: _fitting(file, prefix, word, found) for word in ARRAYS if word in present}
        count = len(arrays["images"])
        patients = [f"{prefix}{row:06d}" for row in range(count)]
        if "patients" in arrays:
            patients = words_of(arrays["patients"], f"{prefix}patients", file)
        labels = _texts(arrays["labels"], f"{prefix}labels", file) if "labels" in arrays else [""] * count
        parts.append(_Part(prefix, arrays, patients, labels))
    return _Set(file.stem, parts, "patients" in present, _spacing(file))


def _indexed(data: Path) -> _Set:
    """A set in a folder with one npz file and an index."""
    files = sorted(data.glob("*.npz"))
    with (data / "index.csv").open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    columns = list(rows[0]) if rows else []
    who = next((name for name in PATIENT_COLUMNS if name in columns), None)
    found = shapes(files[0]) if len(files) == 1 else {}
    if not found or who is None or (LABEL_COLUMN not in columns and "masks" not in found):
        raise ConsiliumError(
            "The folder does not say what its images are",
            str(data),
            f"Give one npz file and an index.csv with a column “{LABEL_COLUMN}” (unless the npz has masks) and one of "
            f"{', '.join(f'“{name}”' for name in PATIENT_COLUMNS)}.",
        )
    if found.get("images", (-1,))[0] != len(rows):
        raise ConsiliumError(
            "The index does not fit the images", str(data), "Give one row for each entry of the array “images”."
        )
    arrays = {"images": read_array(files[0], "images")}
    labels, patients = ([(row.get(name) or "").strip() for row in rows] for name in (LABEL_COLUMN, who))
    if LABEL_COLUMN in columns:
        arrays["labels"] = np.array(labels)
    if "masks" in found:
        arrays["masks"] = _fitting(files[0], "", "masks", found)
    arrays["patients"] = np.array(patients)
    return _Set(data.resolve().name, [_Part("", arrays, patients, labels)], True, _spacing(files[0]))


def _fitting(file: Path, prefix: str, word: str, found: Mapping[str, tuple[int, ...]]) -> NDArray[Any]:
    """An array with an entry for each image of its part."""
    name, images = f"{prefix}{word}", found[f"{prefix}images"]
    if name not in found or not images or found[name][:1] != images[:1]:
        raise ConsiliumError(
            f"The array “{name}” is missing, or does not fit the images", str(file), "Give one entry for each image."
        )
    return read_array(file, name)


def _spacing(file: Path) -> NDArray[Any] | None:
    return read_array(file, "spacing") if "spacing" in shapes(file) else None


def _texts(labels: NDArray[Any], name: str, file: Path) -> list[str]:
    if labels.ndim == 2 and labels.shape[1] > 1:
        return [";".join(str(value) for value in row) for row in labels.tolist()]
    return words_of(labels, name, file)


def _hand_out(whole: _Set, folder: Path, names: Sequence[str], seed: int, mix: int) -> Dealt:
    """Everything that there is of a patient goes to one hospital, chosen by the patient and the first image's label."""
    labels = [label for part in whole.parts for label in part.labels]
    numbers = {label: number for number, label in enumerate(_ordered(labels))}
    home: dict[str, int] = {}
    sides: dict[str, set[str]] = defaultdict(set)
    for part in whole.parts:
        for patient, label in zip(part.patients, part.labels, strict=True):
            sides[patient].add(part.prefix)
            if patient and patient not in home:
                home[patient] = hospital_of(patient, numbers[label], seed, len(names), mix)
    torn = sum(len(found) > 1 for patient, found in sides.items() if patient)
    if torn:
        raise ConsiliumError(
            f"The set's own split puts {torn} of {len(home)} patients on two sides",
            whole.name,
            "Save it as images, labels and patients without sides: the study then splits by patient.",
        )
    shares = []
    for number, name in enumerate(names):
        chosen: dict[str, NDArray[Any]] = {}
        patients: set[str] = set()
        for part in whole.parts:
            mine = [row for row, patient in enumerate(part.patients) if home.get(patient) == number]
            chosen |= {f"{part.prefix}{word}": array[mine] for word, array in part.arrays.items()}
            patients |= {part.patients[row] for row in mine}
        if whole.spacing is not None:
            chosen["spacing"] = whole.spacing
        source = Source(kind="npz", path=Path("images.npz"), one_image_per_patient=not whole.named)
        shares.append(_write(folder / name, name, chosen, source, len(patients)))
    return Dealt(whole.name, _classes(whole.name, labels), tuple(shares), _note(whole))


def _note(whole: _Set) -> str:
    if not whole.named:
        return f"{whole.name} names no patients: each image counts as one patient."
    nobody = sum(part.patients.count("") for part in whole.parts)
    return f"{nobody} images of {whole.name} name no patient and are left out." if nobody else ""


def _write(folder: Path, name: str, arrays: dict[str, NDArray[Any]], source: Source, patients: int) -> Share:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "images.npz").open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
    (folder / "source.toml").write_text(source.to_toml(), encoding="utf-8")
    images = sum(len(array) for key, array in arrays.items() if key.endswith("images"))
    return Share(name, folder, source.anchored(folder), images, patients)


def _classes(name: str, labels: Sequence[str]) -> tuple[str, ...]:
    """Names where we know them, else the labels themselves, in the order of their numbers; () for several each."""
    words = [] if any(";" in label for label in labels) else _ordered(label for label in labels if label)
    for known, classes in KNOWN_CLASSES.items():
        if name.startswith(known) and words == [str(number) for number in range(len(classes))]:
            return classes
    return tuple(words)


def _ordered(labels: Iterable[str]) -> list[str]:
    return sorted(set(labels), key=lambda word: (not word.isdecimal(), word.zfill(9)))
