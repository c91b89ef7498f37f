"""What is asked of images that no study has asked about yet? Enough to read each of them once and to count.

Grey and colour are both taken, volumes stay volumes where files hold them, and the classes are those that the source
itself names: the words of its table, the columns of its labels, the segments of its segmentations, or plain numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from client.imaging.labels import read_table
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
    shape = _VOLUME if source.kind == "nifti" else _IMAGE
    numbers = tuple(str(number) for number in range(MOST_CLASSES))
    if source.columns.labels:
        return Question(shape, source.columns.labels, "labels")
    if source.columns.mask or source.masks is not None:
        return Question(shape, numbers, "mask")
    if source.labels is None and source.kind != "npz":
        words = {source.classes.get(word, word) for word in reader.words()}
        if source.label_tag:
            return _of_words(shape, words, numbers)
        return Question(shape, ("background", *sorted(words)) if source.kind == "dicom" and words else numbers, "mask")
    if source.labels is None:
        return Question(shape, numbers, "class")
    rows = read_table(source.labels, source.columns, image=source.kind != "npz")
    words = {source.classes.get(row.label, row.label) for row in rows if row.label}
    return _of_words(shape, words, numbers)


def _of_words(shape: Mapping[str, Any], words: set[str], numbers: tuple[str, ...]) -> Question:
    if all(word in numbers for word in words):
        return Question(shape, numbers, "class")
    if any(";" in word for word in words):
        parts = {part.strip() for word in words for part in word.split(";") if part.strip()}
        return Question(shape, tuple(sorted(parts)), "labels")
    return Question(shape, tuple(sorted(words)), "class")
