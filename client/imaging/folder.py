"""Which images does a folder of NIfTI, PNG or JPEG files hold, whose are they, and which are left out?

Such files do not say who the patient is: the label table does, or the operator's declaration that one image is one
patient. Decisions look at one patient alone (RULES N5): a file that a patient has twice counts once, and a file that
two patients share is kept for both and reported.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from client.imaging import index
from client.imaging.files import inside, leaves, walk
from client.imaging.index import Entry
from client.imaging.labels import Row, Rows, check_sides, own_side, read_table, target_of
from client.imaging.masks import classes_of
from client.imaging.nifti import ENDINGS, examine_nifti, read_label_map, read_nifti
from client.imaging.pictures import examine_picture, read_picture, read_picture_mask
from client.imaging.records import (
    Listing,
    Mask,
    Picture,
    Quarantined,
    Reason,
    Record,
    Target,
    Tick,
    Unusable,
    Wanted,
)
from client.imaging.source import Source
from privacy.errors import ConsiliumError

_EXAMINE: Mapping[str, Callable[[Path], Mapping[str, object]]] = {"nifti": examine_nifti, "images": examine_picture}


@dataclass(frozen=True)
class FileOpener:
    """`Opener` of NIfTI, PNG and JPEG files."""

    root: Path
    kind: str
    own_words: Mapping[str, str]

    def read(self, record: Record, wanted: Wanted) -> list[Picture]:
        """The image, or the slices of a volume where the study is 2-D; raises `Unusable`."""
        file = self.root / record.path
        if self.kind == "images":
            if wanted.dims == 3:
                raise Unusable(Reason.NO_VOLUME, "one picture")
            picture = read_picture(file, wanted)
        else:
            picture = read_nifti(file, wanted)
        if wanted.target is Target.MASK:
            picture = with_mask(picture, self._mask(record, wanted))
        return slices(picture) if self.kind == "nifti" and wanted.dims == 2 else [picture]

    def _mask(self, record: Record, wanted: Wanted) -> Mask:
        file = self.root / record.masks[0]
        values = read_label_map(file) if file.name.lower().endswith(ENDINGS) else read_picture_mask(file)
        if self.kind == "images" and values.ndim == 3 and len(values) == 1:
            values = values[0]
        return classes_of(values, wanted.classes, self.own_words)


def with_mask(picture: Picture, mask: Mask) -> Picture:
    """The picture with a mask of its size; `Unusable` where the sizes differ."""
    if mask.shape != picture.image.shape[1:]:
        raise Unusable(Reason.MASK, f"size {mask.shape} on an image of {picture.image.shape[1:]}")
    return Picture(picture.image, mask, picture.spacing)


def slices(volume: Picture) -> list[Picture]:
    """A volume's slices, each a picture of its own."""
    spacing = None if volume.spacing is None else volume.spacing[1:]
    return [
        Picture(volume.image[:, at], None if volume.mask is None else volume.mask[at], spacing)
        for at in range(volume.image.shape[1])
    ]


class Folder:
    """What the readers of a folder share: its files, what is known of their headers, its label table and masks."""

    parallel = True

    def __init__(self, source: Source) -> None:
        source.check()
        self._source = source
        self._root = source.path.resolve()
        self._labels = source.labels.resolve() if source.labels else None
        self._entries: list[Entry] = []
        if self._labels is not None:  # a wrong column is told before thousands of files are read
            read_table(self._labels, source.columns, image=True, label=False)
        self._paths = [path for path in sorted(walk(self._root)) if (self._root / path) != self._labels]

    def size(self) -> int:
        """How many files the folder holds, the label table aside."""
        return len(self._paths)

    def fingerprint(self) -> str:
        """Hex SHA-256 over the names and bytes of all files and of the label table."""
        return index.digest(self._entries, self._labels)

    def _table(self, labels: Path, *, label: bool, by_file: bool) -> Rows:
        rows = Rows(read_table(labels, self._source.columns, image=True, label=label), by_file=by_file)
        rows.files(self._paths)
        return rows

    def _not_found(self, rows: Rows | None) -> list[Quarantined]:
        """What the table names and nobody asked for."""
        out = []
        for key in rows.unused() if rows else ():
            away = self._source.match == "file" and leaves(self._root, key)
            out.append(Quarantined(key or "(empty)", Reason.SYMLINK if away else Reason.NO_FILE))
        return out

    def _mask_files(self, rows: Rows | None) -> set[str]:
        """The files that are somebody's mask, so that none is taken for an image."""
        found = set()
        for row in rows.every() if rows else ():
            with contextlib.suppress(Unusable):  # told where its image is judged
                found |= {inside(self._root, row.mask)} if row.mask else set()
        return found

    def _named_mask(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """The mask that the table names for an image, or (); raises `Unusable`."""
        named = {row.mask for row in rows if row.mask}
        if len(named) > 1:
            raise Unusable(Reason.LABELS, "two masks")
        try:
            return tuple(inside(self._root, name) for name in named)
        except Unusable as bad:
            raise Unusable(Reason.NO_MASK if bad.reason is Reason.NO_FILE else bad.reason, "the mask") from None


class ImageFolder(Folder):
    """`Reader` of a folder of NIfTI, PNG or JPEG files."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._masks = source.masks.resolve() if source.masks else None
        self.opener = FileOpener(self._root, source.kind, dict(source.classes))

    def survey(self, tick: Tick, store: Path | None = None, processes: int | None = None) -> None:
        """Reads the headers that the index file `store` does not know yet."""
        kind = self._source.kind
        self._entries = index.examined(self._root, self._paths, _EXAMINE[kind], store, kind, tick, processes)

    def words(self) -> set[str]:
        """None: such files have no words of their own."""
        return set()

    def index(self, wanted: Wanted) -> Listing:
        """Judges every file that `survey` found.

        Raises:
            ConsiliumError: the table cannot be read, or the source's own split tears patients.
        """
        rows = self._rows(wanted)
        records: list[Record] = []
        out: list[Quarantined] = []
        by_hash: dict[str, str] = {}
        masks = self._mask_files(rows)
        for entry in self._entries:
            if entry.path in masks:
                continue
            try:
                records.append(self._judge(entry, rows, wanted))
                by_hash[entry.path] = entry.sha256
            except Unusable as bad:
                out.append(Quarantined(entry.path, bad.reason, bad.detail))
        records, copies = _without_copies(records, by_hash)
        out += copies
        out += self._not_found(rows)
        check_sides(records, str(self._source.path))
        return Listing(records, sorted(out, key=lambda item: item.path))

    def _rows(self, wanted: Wanted) -> Rows | None:
        if self._labels is None:
            if wanted.target is not Target.MASK:
                raise ConsiliumError(
                    "The source has no labels",
                    str(self._source.path),
                    "Name a label table (CSV): this study learns classes, and the source brings only masks.",
                )
            return None
        return self._table(self._labels, label=wanted.target is not Target.MASK, by_file=True)

    def _mask_files(self, rows: Rows | None) -> set[str]:
        found = super()._mask_files(rows)
        if self._masks is not None:
            below = self._masks.relative_to(self._root).as_posix()
            found |= {path for path in self._paths if path.startswith(f"{below}/")}
        return found

    def _judge(self, entry: Entry, rows: Rows | None, wanted: Wanted) -> Record:
        said = rows.of(entry.path) if rows else []
        if entry.facts is None:
            raise Unusable(entry.reason or Reason.DAMAGED, entry.detail)
        if rows is not None and not said:
            raise Unusable(Reason.NO_LABEL)
        if len({row.patient for row in said}) > 1:
            raise Unusable(Reason.PATIENTS, "two rows, two patients")
        patient = entry.path if self._source.one_image_per_patient else said[0].patient
        if not patient:
            raise Unusable(Reason.NO_PATIENT)
        volume = self._source.kind == "nifti" and wanted.dims == 2
        return Record(
            path=entry.path,
            patient=patient,
            target=target_of(said, self._source.columns, wanted, self._source.classes),
            membership=own_side(said[0], self._source) if said else None,
            count=int(entry.facts["shape"][0]) if volume else 1,
            masks=self._masks_of(entry.path, said) if wanted.target is Target.MASK else (),
        )

    def _masks_of(self, path: str, rows: Sequence[Row]) -> tuple[str, ...]:
        named = self._named_mask(rows)
        if named:
            return named
        if self._masks is not None:
            stem = PurePosixPath(path).name.split(".")[0]
            same = [
                self._masks / PurePosixPath(path).name,
                *(self._masks / f"{stem}{end}" for end in (".png", *ENDINGS)),
            ]
            for file in same:
                if file.is_file() and file.resolve().is_relative_to(self._root):
                    return (file.relative_to(self._root).as_posix(),)
        raise Unusable(Reason.NO_MASK)


def _without_copies(records: Sequence[Record], by_hash: Mapping[str, str]) -> tuple[list[Record], list[Quarantined]]:
    """One of each file that a patient has several times; none where its targets differ."""
    same: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        same[record.patient, by_hash[record.path]].append(record)
    kept, out = [], []
    for group in same.values():
        if len({record.target for record in group}) > 1:
            out += [Quarantined(record.path, Reason.LABELS, "the same image twice") for record in group]
        else:
            kept.append(group[0])
            out += [Quarantined(record.path, Reason.DUPLICATE) for record in group[1:]]
    return kept, out
