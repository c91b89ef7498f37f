"""What does the hospital's label table say? One CSV file, read strictly and matched to the study's classes.

One class per image is a word or a number in the label column. Several labels per image are either words with `;`
between them in the label column, or a column of yes and no for each class.
"""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from client.imaging.files import tidy
from client.imaging.records import Membership, Quarantined, Reason, Record, Target, Unusable, Wanted
from client.imaging.source import Columns, Source
from privacy.errors import ConsiliumError

MAX_TABLE_BYTES = 256 << 20
_ENDINGS = (".nii.gz", ".nii", ".dcm", ".dicom", ".ima", ".png", ".jpg", ".jpeg")
_LOOKED_AT = 1000
_SPLIT_WORDS = {
    "train": Membership.TRAIN,
    "training": Membership.TRAIN,
    "val": Membership.VALIDATION,
    "valid": Membership.VALIDATION,
    "validation": Membership.VALIDATION,
    "test": Membership.TEST,
}


_YES, _NO = (
    frozenset(("1", "1.0", "true", "yes", "y", "positive")),
    frozenset(("0", "0.0", "false", "no", "n", "negative")),
)
NOTHING = frozenset(("none", "no finding", "normal", "-"))
"""Words that say, where several labels may be given, that none applies (unless a class is called so)."""


@dataclass(frozen=True)
class Row:
    """One row of the table, stripped; what the table does not have is empty. `several` follows `Columns.labels`; `line`
    is where it ends in the file."""

    image: str
    label: str
    patient: str
    split: str
    mask: str = ""
    several: tuple[str, ...] = ()
    line: int = field(default=0, compare=False)


def read_table(path: Path, columns: Columns, *, image: bool, label: bool = True) -> list[Row]:
    """Reads a CSV label table (UTF-8; comma, semicolon or tab), in file order.

    Raises:
        ConsiliumError: the file cannot be read, or a declared column is missing or there twice. `image` says whether
            the image column is needed (an npz file's rows follow its images instead), `label` whether the label
            column is (masks may take its place).
    """
    wanted = [
        ("--image-column", columns.image if image else None),
        ("--label-column", columns.label if label and not columns.labels else None),
        *(("--labels-column", name) for name in columns.labels),
        ("--mask-column", columns.mask),
        ("--patient-column", columns.patient),
        ("--split-column", columns.split),
    ]
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise ConsiliumError(
                "The label table is too large", str(path), f"Keep it under {MAX_TABLE_BYTES >> 20} MB."
            )
        with path.open(newline="", encoding="utf-8-sig") as stream:
            first = stream.readline()
            stream.seek(0)
            delimiter = max(",;\t", key=first.count)
            reader = csv.DictReader(stream, delimiter=delimiter, restval="", restkey="", strict=True)
            reader.fieldnames = present = [name.strip() for name in reader.fieldnames or ()]
            missing = {name: option for option, name in wanted if name and name not in present}
            if missing:
                raise ConsiliumError(
                    f"The label table has no column {_quoted(missing)}",
                    str(path),
                    f"Its columns are {_quoted(present)}: connect it again with {', '.join(missing.values())}.",
                )
            twice = {name for _, name in wanted if name and present.count(name) > 1}
            if twice:
                raise ConsiliumError(
                    f"The label table has several columns {_quoted(sorted(twice))}",
                    str(path),
                    "Give each column a name of its own.",
                )
            return [_row(row, columns, reader.line_num) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConsiliumError(
            "The label table cannot be read",
            str(path),
            f"Save it as CSV in UTF-8 with one header line ({type(error).__name__}).",
        ) from None


def check_table(source: Source) -> None:
    """Are the columns that a source declares in its table? Raises ConsiliumError where one surely is not."""
    if source.labels is None:
        return
    named = source.columns.label != Columns().label
    only = source.kind in {"nifti", "images"} and not source.columns.mask and source.masks is None
    read_table(source.labels, source.columns, image=source.kind != "npz", label=named or only)


def _row(row: Mapping[str, str], columns: Columns, line: int) -> Row:
    def cell(name: str | None) -> str:
        return (row.get(name) or "").strip() if name else ""

    several = tuple(cell(name) for name in columns.labels)
    return Row(
        cell(columns.image),
        cell(columns.label),
        cell(columns.patient),
        cell(columns.split),
        cell(columns.mask),
        several,
        line,
    )


class Rows:
    """The table's rows by the image they name.

    Args:
        by_file: the image column names files. A file's name without its folder is enough, and so is one without its
            ending or in other capitals, where one file and one name in the table alone can be meant.
    """

    def __init__(self, rows: Sequence[Row], *, by_file: bool) -> None:
        self._rows: dict[str, list[Row]] = defaultdict(list)
        self._by_file, self._used = by_file, set[str]()
        for row in rows:
            self._rows[tidy(row.image) if by_file else row.image].append(row)
        self._folded: dict[str, list[str]] = defaultdict(list)
        for key in self._rows:
            self._folded[key.casefold()].append(key)
        self._names: Counter[str] = Counter()
        self._forms: Counter[str] = Counter()

    def files(self, paths: Sequence[str]) -> None:
        """Which files there are, so that ambiguous names can be told from unique ones."""
        self._names = Counter(PurePosixPath(path).name for path in paths)
        self._forms = Counter(form for path in paths for form in set(_forms(path)))
        self._used.clear()

    def of(self, key: str) -> list[Row]:
        """The rows about a file (by its path) or a UID; they count as found, whatever becomes of the image."""
        key = self._called(key) if self._by_file else key
        self._used.add(key)
        return self._rows.get(key, [])

    def _called(self, path: str) -> str:
        """What the table calls a file; the path itself where it does not name it."""
        name = PurePosixPath(path).name
        if path in self._rows or (self._names[name] == 1 and name in self._rows):
            return path if path in self._rows else name
        for form in _forms(path):
            meant = self._folded.get(form, [])
            if len(meant) == 1 and self._forms[form] == 1:
                return meant[0]
        return path

    def every(self) -> Iterator[Row]:
        """All rows."""
        return (row for rows in self._rows.values() for row in rows)

    def unused(self) -> list[str]:
        """What the table names and nobody asked for, in the table's order."""
        return [key for key in self._rows if key not in self._used]


def _forms(path: str) -> list[str]:
    """How else a table may write a file: in any capitals, with or without its folder and its ending."""
    whole = [path.casefold(), PurePosixPath(path).name.casefold()]
    return whole + [_bare(form) for form in whole]


def _bare(path: str) -> str:
    """Without the ending; other dots stay, as in file names that are UIDs."""
    return path.removesuffix(next((ending for ending in _ENDINGS if path.endswith(ending)), ""))


def unlike(out: Sequence[Quarantined]) -> str:
    """Where table and files do not find each other: a name of each that look alike, in a sentence; else ""."""
    entries = [item.path for item in out if item.reason is Reason.NO_FILE and item.path != "(empty)"]
    names = [item.path for item in out[:_LOOKED_AT] if item.reason is Reason.NO_LABEL]
    if not entries or not names:
        return ""
    cores = {_core(name): name for name in reversed(names)}
    (near,) = get_close_matches(_core(entries[0]), cores, 1, cutoff=0)
    return f"The table names “{entries[0]}” where the folder has “{cores[near]}”: write the one like the other."


def _core(path: str) -> str:
    """A file's name without what tables write otherwise: folder, ending, capitals, zeros in front."""
    return re.sub(r"(?<!\d)0+(?=\d)", "", _bare(PurePosixPath(path).name.casefold()))


def target_of(
    rows: Sequence[Row], columns: Columns, wanted: Wanted, own_words: Mapping[str, str]
) -> int | tuple[int, ...] | None:
    """What the table says about one image: a class, a 0/1 for each class, or None where a mask is the target.

    Raises:
        Unusable: NO_LABEL, UNKNOWN_LABEL, or LABELS where two rows disagree.
    """
    if wanted.target is Target.MASK:
        return None
    if len({(row.label, row.several) for row in rows}) > 1:
        raise Unusable(Reason.LABELS)
    if not rows:
        raise Unusable(Reason.NO_LABEL)
    if wanted.target is Target.LABELS:
        return _several(rows[0], columns, wanted.classes, own_words)
    return one_class(rows[0].label, wanted.classes, own_words)


def one_class(label: str, classes: Sequence[str], own_words: Mapping[str, str]) -> int:
    """The class of a word; raises `Unusable` where there is none."""
    if not label:
        raise Unusable(Reason.NO_LABEL)
    found = class_of(label, classes, own_words)
    if found is None:
        raise Unusable(Reason.UNKNOWN_LABEL)
    return found


def several_of(label: str, classes: Sequence[str], own_words: Mapping[str, str]) -> tuple[int, ...]:
    """A 0/1 for each class from words with `;` between them; raises `Unusable`."""
    if not label:
        raise Unusable(Reason.NO_LABEL)
    said = set()
    for word in (part.strip() for part in label.split(";")):
        found = class_of(word, classes, own_words)
        if found is not None:
            said.add(found)
        elif word and word.casefold() not in NOTHING:
            raise Unusable(Reason.UNKNOWN_LABEL)
    return tuple(int(index in said) for index in range(len(classes)))


def check_sides(records: Sequence[Record], subject: str) -> None:
    """Does a source's own split keep each patient on one side? Raises ConsiliumError where it does not."""
    sides: dict[str, set[Membership | None]] = defaultdict(set)
    for record in records:
        sides[record.patient].add(record.membership)
    torn = sum(len(found) > 1 for found in sides.values())
    if torn:
        raise ConsiliumError(
            f"The source's own split puts {torn} of {len(sides)} patients on two sides",
            subject,
            "Connect it again with --no-own-split: the study then splits by patient.",
        )


def own_side(row: Row, source: Source) -> Membership | None:
    """The side that the table gives an image; None where it gives none, or the source is not to be followed.

    Raises:
        ConsiliumError: the split column has another word.
    """
    if not source.columns.split or not source.own_split:
        return None
    side = split_of(row.split)
    if side is None:
        raise ConsiliumError(
            f"The split column “{source.columns.split}” has other words than train, validation and test",
            f"{source.labels}, line {row.line}: “{row.split}”",
            "Correct it, or connect the data again with --no-own-split.",
        )
    return side


def _several(row: Row, columns: Columns, classes: Sequence[str], own_words: Mapping[str, str]) -> tuple[int, ...]:
    if not columns.labels:
        return several_of(row.label, classes, own_words)
    answers: dict[int, int] = {}
    for name, cell in zip(columns.labels, row.several, strict=True):
        index, word = class_of(name, classes, own_words), cell.casefold()
        if index is None:
            continue  # a column about something that this study does not ask
        if word not in _YES and word not in _NO:
            raise Unusable(Reason.UNKNOWN_LABEL, "neither yes nor no") if word else Unusable(Reason.NO_LABEL)
        answers[index] = int(word in _YES)
    if len(answers) != len(classes):
        raise Unusable(Reason.NO_LABEL, "a class without a column")
    return tuple(answers[index] for index in range(len(classes)))


def class_of(value: str, classes: Sequence[str], own_words: Mapping[str, str]) -> int | None:
    """The index of a label among the study's classes: by the hospital's own word, by name, or by number.

    Names are compared without regard to case; "1", "1.0" and 1 are the same number. None: no such class.
    """
    word = own_words.get(value, value).strip()
    names = [name.casefold() for name in classes]
    if word.casefold() in names:
        return names.index(word.casefold())
    try:
        number = float(word)
    except ValueError:
        return None
    return int(number) if number in range(len(classes)) else None


def split_of(value: str) -> Membership | None:
    """Reads the words of a split column; None: none of them."""
    return _SPLIT_WORDS.get(value.casefold())


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"“{name}”" for name in names)
