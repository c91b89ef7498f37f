"""Which images does an npz file hold, whose are they, and on which side of the split does the file put them?

Two layouts: MedMNIST's (train_images, train_labels, val_*, test_*; the file's own split is honoured) and plain
arrays (images, labels). Masks stand beside them (train_masks, masks: a class for each pixel), several labels as an
array [n, classes] of 0 and 1, and the mm between pixels as "spacing" (one number for each axis of an image). Images
are [n, height, width] or [n, height, width, channels], volumes [n, slices, height, width] or the same with channels.
Who the patient is comes from patients arrays (train_patients, patients), from the column of an index table whose rows
follow the images, or from the operator's declaration that one image is one patient. "nan" in a column is a gap.

Sizes are read from the headers and checked before an array is, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from client.imaging.display import in_range
from client.imaging.folder import slices
from client.imaging.labels import Row, check_sides, own_side, read_table, target_of
from client.imaging.masks import classes_of
from client.imaging.records import (
    Listing,
    Mask,
    Membership,
    Picture,
    Quarantined,
    Reason,
    Record,
    Target,
    Tick,
    Unusable,
    Wanted,
)
from client.imaging.source import Columns, Source
from client.imaging.values import finite, in_channels
from privacy.errors import ConsiliumError

MAX_ARRAY_BYTES = 8 << 30
_MAX_HEADER = 1 << 16
_PARTS = {"train": Membership.TRAIN, "val": Membership.VALIDATION, "test": Membership.TEST}


@dataclass(frozen=True)
class _Part:
    """One array of images with what is said about each: its label, its patient, its side."""

    name: str
    images: NDArray[Any]
    masks: NDArray[Any] | None
    rows: Sequence[Row]
    sides: Sequence[Membership | None]
    columns: Columns
    spacing: tuple[float, ...] | None


class NpzFile:
    """`Reader` of one npz file, with an index table where the source names one; its own `Opener`."""

    parallel = False  # the arrays are in memory already

    def __init__(self, source: Source) -> None:
        source.check()
        self._source = source
        self._path = source.path.resolve()
        self._shapes = shapes(self._path)
        self._parts: dict[str, _Part] | None = None
        self.opener = self
        names = [f"{part}_images" for part in _PARTS if f"{part}_images" in self._shapes]
        self._names = names or (["images"] if "images" in self._shapes else [])
        if not self._names:
            raise ConsiliumError(
                "The npz file holds no images under a known name",
                str(self._path),
                "Name the arrays train_images, train_labels, test_images, … or images and labels.",
            )

    def size(self) -> int:
        """How many images the file holds, by its headers."""
        return sum(self._shapes[name][0] for name in self._names if self._shapes[name])

    def survey(self, tick: Tick, store: Path | None = None, processes: int | None = None) -> None:
        """Nothing to do: headers were read, and arrays are read when they are asked for."""
        for _ in range(self.size()):
            tick()

    def fingerprint(self) -> str:
        """Hex SHA-256 over the file's size and time, each array's checksum, and the index table's bytes."""
        info = self._path.stat()
        digest = hashlib.sha256(f"{info.st_size}\0{info.st_mtime_ns}\0".encode())
        with zipfile.ZipFile(self._path) as archive:
            for member in sorted(archive.infolist(), key=lambda item: item.filename):
                digest.update(f"{member.filename}\0{member.CRC}\0".encode())
        if self._source.labels is not None:
            digest.update(self._source.labels.read_bytes())
        return digest.hexdigest()

    def words(self) -> set[str]:
        """The words, or numbers, of the arrays of labels that give each image one."""
        names = [f"{name.removesuffix('images')}labels" for name in self._names]
        single = [name for name in names if math.prod(self._shapes.get(name, (0, 0))[1:]) == 1]
        return {word for name in single for word in words_of(read_array(self._path, name), name, self._path)}

    @property
    def arrays(self) -> dict[str, tuple[int, ...]]:
        """What the first part of the file holds: the shapes of its arrays as images, labels, masks, patients."""
        prefix = self._names[0].removesuffix("images")
        return {name.removeprefix(prefix): shape for name, shape in self._shapes.items() if name.startswith(prefix)}

    def index(self, wanted: Wanted) -> Listing:
        """Every image with its label, patient and side.

        Raises:
            ConsiliumError: labels, masks or patients are missing or do not fit the images, or the file's own split
                puts one patient on two sides.
        """
        records: list[Record] = []
        out: list[Quarantined] = []
        for part in self._read_parts(wanted).values():
            count = part.images.shape[1] if wanted.dims == 2 and self._volumes(part.images, wanted) else 1
            for number, row in enumerate(part.rows):
                where = f"{part.name}[{number}]"
                try:
                    if not row.patient:
                        raise Unusable(Reason.NO_PATIENT)
                    target = target_of([row], part.columns, wanted, self._source.classes)
                except Unusable as bad:
                    out.append(Quarantined(where, bad.reason, bad.detail))
                    continue
                records.append(Record(where, row.patient, target, membership=part.sides[number], count=count))
        check_sides(records, str(self._path))
        return Listing(records, out)

    def read(self, record: Record, wanted: Wanted) -> list[Picture]:
        """One image, or the slices of a volume, float32 [channels, *size]: as stored where the study asks for units;
        else unsigned integers over their type's largest value (8-bit images are then in [0, 1]), signed ones over
        the image's own range, reals as they are. Raises `Unusable`."""
        name, row = record.path[:-1].split("[")
        part = self._read_parts(wanted)[name]
        stored = part.images[int(row)]
        volume = self._volumes(part.images, wanted)
        planes = stored[None] if stored.ndim == (3 if volume else 2) else np.moveaxis(stored, -1, 0)
        if planes.shape[0] not in (1, wanted.channels):
            raise Unusable(Reason.CHANNELS, f"{planes.shape[0]} channels")
        image = in_channels(finite(planes if wanted.units else _shown(planes)), wanted.channels)
        mask: Mask | None = None
        if part.masks is not None:
            mask = classes_of(part.masks[int(row)], wanted.classes, self._source.classes)
        picture = Picture(image, mask, part.spacing)
        return slices(picture) if volume and wanted.dims == 2 else [picture]

    @staticmethod
    def _volumes(images: NDArray[Any], wanted: Wanted) -> bool:
        """Is each entry a volume? The study's input decides where four axes could be either."""
        if images.ndim == 4:
            return wanted.dims == 3 or images.shape[-1] not in {1, 3, wanted.channels}
        return images.ndim == 5

    def _read_parts(self, wanted: Wanted) -> dict[str, _Part]:
        if self._parts is None:
            self._parts = {name: self._read_part(name, wanted) for name in self._names}
        return self._parts

    def _read_spacing(self, axes: int) -> tuple[float, ...] | None:
        if "spacing" not in self._shapes:
            return None
        found = np.atleast_1d(read_array(self._path, "spacing"))
        if found.shape != (axes,) or found.dtype.kind not in "uif" or not (found > 0).all():
            raise ConsiliumError(
                "The array “spacing” does not fit the images",
                str(self._path),
                f"Give {axes} numbers above 0: millimetres between neighbours along each axis of an image.",
            )
        return tuple(float(value) for value in found)

    def _read_part(self, name: str, wanted: Wanted) -> _Part:
        images = read_array(self._path, name)
        volume = self._volumes(images, wanted)
        fits = images.ndim in ((4, 5) if volume else (3, 4)) and images.dtype.kind in "uif"
        if not fits or (wanted.dims == 3 and not volume):
            raise ConsiliumError(
                f"The array “{name}” is not a list of {wanted.dims}-D images",
                str(self._path),
                f"It has shape {images.shape} and type {images.dtype}: "
                "give [n, height, width] or [n, height, width, 3], for volumes [n, slices, height, width].",
            )
        prefix = name.removesuffix("images")
        masks = self._read_masks(f"{prefix}masks", images, volume=volume) if wanted.target is Target.MASK else None
        spacing = self._read_spacing(3 if volume else 2)
        if self._source.labels is not None:
            rows, sides = self._from_table(name, len(images), wanted)
            return _Part(name, images, masks, rows, sides, self._source.columns, spacing)
        count = len(images)
        patients: Sequence[str]
        if self._source.one_image_per_patient:
            patients = [f"{prefix}{row:06d}" for row in range(count)]
        elif f"{prefix}patients" in self._shapes:
            patients = self._words(f"{prefix}patients", count)
        else:
            way = f"Add an array “{prefix}patients” or an index table with a patient column"
            raise _nobody_named(self._path, way)
        side = _PARTS.get(prefix.rstrip("_")) if self._source.own_split else None
        columns, labels = self._read_labels(f"{prefix}labels", count, wanted)
        rows = [
            Row("", label[0] if len(label) == 1 else "", patient, "", several=label if columns.labels else ())
            for label, patient in zip(labels, patients, strict=True)
        ]
        return _Part(name, images, masks, rows, [side] * count, columns, spacing)

    def _read_labels(self, name: str, count: int, wanted: Wanted) -> tuple[Columns, list[tuple[str, ...]]]:
        if wanted.target is Target.MASK:
            return Columns(), [("",)] * count
        wide = len(wanted.classes)
        if wanted.target is Target.LABELS and self._shapes.get(name) == (count, wide) and wide > 1:
            values = read_array(self._path, name).tolist()
            return Columns(labels=wanted.classes), [tuple(str(value) for value in row) for row in values]
        return Columns(), [(word,) for word in self._words(name, count)]

    def _read_masks(self, name: str, images: NDArray[Any], *, volume: bool) -> NDArray[Any]:
        if name not in self._shapes:
            raise ConsiliumError(
                f"The npz file has no array “{name}”", str(self._path), "Add it: a class for each pixel of the images."
            )
        masks = read_array(self._path, name)
        if masks.shape != images.shape[: 4 if volume else 3]:
            raise ConsiliumError(
                f"The array “{name}” does not fit the images",
                str(self._path),
                f"It has shape {masks.shape} for images of shape {images.shape}.",
            )
        return masks

    def _from_table(self, name: str, count: int, wanted: Wanted) -> tuple[list[Row], list[Membership | None]]:
        table, columns = self._source.labels, self._source.columns
        if table is None or name != "images":
            raise ConsiliumError(
                "An index table goes with one array named “images”",
                str(self._path),
                "Leave out the table, or put all images into one array in the table's order.",
            )
        if not columns.patient and not self._source.one_image_per_patient:
            raise _nobody_named(table, "Name the table's patient column (--patient-column)")
        rows = read_table(table, columns, image=False, label=wanted.target is not Target.MASK)
        if len(rows) != count:
            raise ConsiliumError(
                "The index table does not fit the images",
                str(table),
                f"It has {len(rows)} rows for {count} images: give one row per image, in their order.",
            )
        if self._source.one_image_per_patient:
            rows = [replace(row, patient=f"{number:06d}") for number, row in enumerate(rows)]
        return rows, [own_side(row, self._source) for row in rows]

    def _words(self, name: str, count: int) -> list[str]:
        """A column of labels or patients as text; a whole number reads as such."""
        if name not in self._shapes:
            raise ConsiliumError(
                f"The npz file has no array “{name}”", str(self._path), "Add it: one entry for each image."
            )
        found = words_of(read_array(self._path, name), name, self._path)
        if len(found) != count:
            raise _misfit(self._path, name, f"It has {len(found)} entries for {count} images")
        return found


def read_array(path: Path, name: str) -> NDArray[Any]:
    """One array of an npz file that `shapes` has looked at. Raises ConsiliumError where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            array: NDArray[Any] = archive[name]
            return array
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise _unreadable(path, f"{name}: {type(error).__name__}") from None


def words_of(values: NDArray[Any], name: str, path: Path) -> list[str]:
    """A column [n] or [n, 1] of numbers or words as text, stripped; "nan", which stands for a gap, is empty.

    Raises:
        ConsiliumError: the array `name` of `path` is no such column.
    """
    if math.prod(values.shape[1:]) != 1 or values.dtype.kind not in "uifbUS":
        raise _misfit(path, name, f"It has shape {values.shape} and type {values.dtype}")
    column = values.reshape(-1)
    if column.dtype.kind == "S":
        words = [bytes(value).decode("utf-8", "replace").strip() for value in column]
    else:
        words = [str(value).strip() for value in column.tolist()]
    return ["" if word.casefold() == "nan" else word for word in words]


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an npz file's arrays, from their headers alone.

    Raises:
        ConsiliumError: not an npz file, an array of objects (which would need unpickling), or one larger than
            `MAX_ARRAY_BYTES` or than what the archive holds for it.
    """
    found: dict[str, tuple[int, ...]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.filename.endswith(".npy"):
                    continue
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as stream:
                    version = npy.read_magic(stream)
                    reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                    shape, _, dtype = reader(stream, max_header_size=_MAX_HEADER)
                    header = stream.tell()
                size = math.prod(shape) * dtype.itemsize
                if dtype.hasobject:
                    raise ConsiliumError(
                        f"The array “{name}” holds Python objects",
                        str(path),
                        "Save numbers or plain text: objects are never unpickled here.",
                    )
                if size > MAX_ARRAY_BYTES or member.file_size != header + size:
                    raise ConsiliumError(
                        f"The array “{name}” is too large, or not as large as it says",
                        str(path),
                        f"Save it again, under {MAX_ARRAY_BYTES >> 30} GB.",
                    )
                found[name] = shape
    except (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
        raise _unreadable(path, type(error).__name__) from None
    return found


def _shown(planes: NDArray[Any]) -> NDArray[Any]:
    if planes.dtype.kind == "u":
        return planes.astype(np.float32) / np.float32(np.iinfo(planes.dtype).max)
    return in_range(planes.astype(np.float64)) if planes.dtype.kind == "i" else planes


def _misfit(path: Path, name: str, why: str) -> ConsiliumError:
    return ConsiliumError(
        f"The array “{name}” does not fit the images", str(path), f"{why}: give one number or word for each."
    )


def _unreadable(path: Path, why: str) -> ConsiliumError:
    return ConsiliumError("The npz file cannot be read", str(path), f"Copy or save it again ({why}).")


def _nobody_named(where: Path, way: str) -> ConsiliumError:
    return ConsiliumError(
        "The source does not say who the patients are",
        str(where),
        f"{way}, or declare --one-image-per-patient if no patient has two images.",
    )
