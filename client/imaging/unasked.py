"""What is asked of images that no study has asked about yet? Enough to read each of them once and to count.

Grey and colour are both taken, volumes stay volumes where files hold them, and the classes are those that the source
itself names: the words of its table or of its labels, the columns of its labels, the segments of its segmentations, or
plain numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.imaging.labels import class_of, read_table
from client.imaging.npz import NpzFile
from client.imaging.records import Reader
from client.imaging.source import Source

MOST_CLASSES = 256
_IMAGE, _VOLUME = {"channels": 3, "size": [64, 64]}, {"channels": 1, "size": [16, 64, 64]}


@dataclass(frozen=True)
class Question:
    """Stands in for a study: its input section, its classes, and what would be learned."""

    input: Mapping[str, Any]
    classes: tuple[str, ...]
    target: str


def question(source: Source, reader: Reader) -> Question:
    """What can be asked of a source whose `reader` has surveyed it.

    Raises:
        ConsiliumError: the label table cannot be read.
    """
    numbers = tuple(str(number) for number in range(MOST_CLASSES))
    if isinstance(reader, NpzFile):
        return _of_arrays(source, reader, numbers)
    shape = _VOLUME if source.kind == "nifti" else _IMAGE
    if source.columns.labels:
        return Question(shape, source.columns.labels, "labels")
    if source.columns.mask or source.masks is not None:
        return Question(shape, numbers, "mask")
    if source.labels is None:
        words = {source.classes.get(word, word) for word in reader.words()}
        if source.label_tag:
            return _of_words(shape, words, numbers)
        return Question(shape, ("background", *sorted(words)) if source.kind == "dicom" and words else numbers, "mask")
    return _of_words(shape, _of_table(source, source.labels, image=True), numbers)


def _of_arrays(source: Source, reader: NpzFile, numbers: tuple[str, ...]) -> Question:
    """Labels before masks, where an npz file or its table has both."""
    arrays = reader.arrays
    images, labels, masks = arrays["images"], arrays.get("labels", ()), "masks" in arrays
    shape: Mapping[str, Any] = _IMAGE
    if len(images) == 5 or (len(images) == 4 and images[-1] not in {1, _IMAGE["channels"]}):
        shape = {**_VOLUME, "channels": images[4] if len(images) == 5 else 1}
    if source.labels is not None:
        if source.columns.labels:
            return Question(shape, source.columns.labels, "labels")
        words = _of_table(source, source.labels, image=False, label=not masks)
    else:
        if len(labels) == 2 and labels[1] > 1:
            return Question(shape, numbers[: labels[1]], "labels")
        words = {source.classes.get(word, word) for word in reader.words() if word}
    return Question(shape, numbers, "mask") if masks and not words else _of_words(shape, words, numbers)


def _of_table(source: Source, table: Path, *, image: bool, label: bool = True) -> set[str]:
    rows = read_table(table, source.columns, image=image, label=label)
    return {source.classes.get(row.label, row.label) for row in rows if row.label}


def _of_words(shape: Mapping[str, Any], words: set[str], numbers: tuple[str, ...]) -> Question:
    if all(class_of(word, numbers, {}) is not None for word in words):
        return Question(shape, numbers, "class")
    if any(";" in word for word in words):
        parts = {part.strip() for word in words for part in word.split(";") if part.strip()}
        return Question(shape, tuple(sorted(parts)), "labels")
    return Question(shape, tuple(sorted(words)), "class")
