"""What does a reader of images hand over, and in which words does it decline one?

Every kind of source (DICOM, NIfTI, PNG and JPEG, npz) is a `Reader`: it lists `Record`s, one for each image or
volume that can be read, and `Quarantined` entries, one for each that is left out. An `Opener`, small enough to be
sent to another process, then turns a record into `Picture`s. One bad file never stops the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from client.imaging.geometry import Grid

Image = NDArray[np.float32]
Mask = NDArray[np.uint8]
Tick = Callable[[], None]


class Target(StrEnum):
    """What a study learns of an image: one class, any number of labels, or a class for every pixel."""

    CLASS = "class"
    LABELS = "labels"
    MASK = "mask"


@dataclass(frozen=True)
class Wanted:
    """What a study asks of every image.

    Attributes:
        channels: 1 for grey, 3 for colour, more for several measurements in one array.
        dims: 2 for images (a volume then gives its slices), 3 for volumes.
        classes: the study's class names; for masks the first is the background.
        target: what is learned.
        units: hand over the scanner's own units (Hounsfield and the like) and not the brightness on a display.
    """

    channels: int
    dims: int
    classes: tuple[str, ...]
    target: Target = Target.CLASS
    units: bool = False


class Membership(StrEnum):
    """The side of the split that a patient stands on."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


class Reason(StrEnum):
    """Every reason for which an image is left out of the cohort."""

    NOT_REGULAR = "not-a-regular-file"
    SYMLINK = "symlink-leaves-folder"
    FILE_SIZE = "file-too-large"
    NOT_DICOM = "not-dicom"
    NOT_IMAGE = "not-an-image"
    DAMAGED = "damaged"
    TRUNCATED = "truncated"
    NO_PIXELS = "no-pixel-data"
    BOMB = "decompression-bomb"
    CODEC = "unreadable-codec"
    MODALITY = "wrong-modality"
    CRASH = "decoder-crashed"
    NO_VOLUME = "no-volume"
    SLICES = "missing-slices"
    CHANNELS = "wrong-channels"
    NON_FINITE = "non-finite"
    DUPLICATE = "duplicate"
    PATIENTS = "conflicting-patients"
    NO_PATIENT = "no-patient"
    NO_LABEL = "no-label"
    UNKNOWN_LABEL = "unknown-label"
    LABELS = "conflicting-labels"
    NO_MASK = "no-mask"
    MASK = "unusable-mask"
    NO_FILE = "no-such-file"
    PREPARATION = "cannot-be-prepared"


WORDS: dict[Reason, str] = {
    Reason.NOT_REGULAR: "not a regular file, or not readable by this user",
    Reason.SYMLINK: "a link or a table entry that leads out of the folder",
    Reason.FILE_SIZE: "the file is larger than the limit",
    Reason.NOT_DICOM: "not a DICOM file",
    Reason.NOT_IMAGE: "not an image of the kind that the source declares",
    Reason.DAMAGED: "the header cannot be read",
    Reason.TRUNCATED: "the file ends too early",
    Reason.NO_PIXELS: "DICOM without an image",
    Reason.BOMB: "the declared image is larger than the limit, or larger inside than outside",
    Reason.CODEC: "the pixels cannot be decoded",
    Reason.MODALITY: "no image, or of another modality than the source declares",
    Reason.CRASH: "the decoder died on it",
    Reason.NO_VOLUME: "a single image, or slices without positions, where the study takes volumes",
    Reason.SLICES: "slices are missing between the first and the last",
    Reason.CHANNELS: "colour where the study takes grey images, or the other way round",
    Reason.NON_FINITE: "values that are not finite after rescaling",
    Reason.DUPLICATE: "the same image again, under another name",
    Reason.PATIENTS: "it is not clear who its patient is",
    Reason.NO_PATIENT: "no patient is named",
    Reason.NO_LABEL: "not in the label table",
    Reason.UNKNOWN_LABEL: "the label is none of the classes",
    Reason.LABELS: "two different labels for one image",
    Reason.NO_MASK: "no mask belongs to it",
    Reason.MASK: "the mask cannot be read, or does not fit the image or the study's classes",
    Reason.NO_FILE: "in the label table, but there is no such image",
    Reason.PREPARATION: "the study's transforms cannot be applied",
}


@dataclass(frozen=True)
class Quarantined:
    """One image that was left out. `path` is local to the site; `detail` holds technical words only."""

    path: str
    reason: Reason
    detail: str = ""

    @property
    def text(self) -> str:
        """The reason in words, free of patient data."""
        return f"{WORDS[self.reason]} ({self.detail})" if self.detail else WORDS[self.reason]


class Unusable(Exception):
    """Raised while one image is read; it becomes that image's `Quarantined` entry."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(WORDS[reason])
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Record:
    """One image or volume that can be read.

    Attributes:
        path: its name inside the source; also the file, where `files` is empty.
        patient: the real patient.
        target: an index into the classes, or a 0/1 for each, or None where the mask is the target.
        scanner: manufacturer and model.
        membership: the side, where the source brings its own split.
        count: how many pictures it gives: more than one for the slices of a volume.
        files: the files of a volume in the order of their positions; `grid` is where it lies.
        instances: DICOM's UIDs of the files, or of the one file.
        frames: how many frames the one file has.
        masks: the file or files that hold its mask.
    """

    path: str
    patient: str
    target: int | tuple[int, ...] | None = None
    scanner: str = ""
    membership: Membership | None = None
    count: int = 1
    files: tuple[str, ...] = ()
    grid: Grid | None = None
    instances: tuple[str, ...] = ()
    frames: int = 1
    masks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """One image as it was decoded.

    Attributes:
        image: float32 [channels, *size], finite; size is (height, width) or (depth, height, width).
        mask: uint8 [*size], indices into the study's classes.
        spacing: millimetres between neighbours along each axis of size; None where the file does not say.
    """

    image: Image
    mask: Mask | None = None
    spacing: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Listing:
    """All that a source holds: what can be read and what is left out, each in a stable order.

    `missing` counts, for the report, in how many files each of the usual tags is absent. `isolate`: some files need a
    decoder that may take its process down, so they are read in another one.
    """

    records: Sequence[Record]
    quarantine: Sequence[Quarantined]
    missing: Counter[str] = field(default_factory=Counter)
    isolate: bool = False


class Opener(Protocol):
    """The reading half of a source: a few values, so that it can be sent to another process."""

    def read(self, record: Record, wanted: Wanted) -> list[Picture]:
        """The record's pictures, `record.count` of them; raises `Unusable`."""
        ...


class Reader(Protocol):
    """One kind of source. A new kind is one file with these members."""

    @property
    def opener(self) -> Opener:
        """What reads the records that `index` lists."""
        ...

    @property
    def parallel(self) -> bool:
        """Whether reading is worth other processes."""
        ...

    def size(self) -> int:
        """How many images or files there are, for the progress view."""
        ...

    def survey(self, tick: Tick, store: Path | None = None, processes: int | None = None) -> None:
        """Look at every file's header, and call `tick` for each. The file `store` holds what is known of unchanged
        files from before, and keeps it; `processes` is as in `pool.processes_for`."""
        ...

    def words(self) -> set[str]:
        """The words that the files themselves use for what they show; called after `survey`."""
        ...

    def index(self, wanted: Wanted) -> Listing:
        """Every image that `survey` found, with patient and target, and all that is left out."""
        ...

    def fingerprint(self) -> str:
        """Hex SHA-256 that changes when the source's content does; called after `survey`."""
        ...
