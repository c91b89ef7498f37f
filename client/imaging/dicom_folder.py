"""Which images does a folder of DICOM files hold, whose are they, and which are left out?

Each file is judged by its header, and then the files are looked at together: the same image twice, one patient under
two names, and, where the study takes volumes, the slices of each series (`together`).
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from client.imaging import index
from client.imaging.codestream import ISOLATED
from client.imaging.dicom import read_images, read_volume
from client.imaging.folder import Folder, slices, with_mask
from client.imaging.header import NOT_PICTURES, Header, header_facts, shown_modality
from client.imaging.labels import Row, Rows, one_class, several_of, target_of
from client.imaging.masks import classes_of
from client.imaging.nifti import ENDINGS, read_label_map
from client.imaging.pictures import read_picture_mask
from client.imaging.records import Listing, Picture, Quarantined, Reason, Record, Target, Tick, Unusable, Wanted
from client.imaging.seg import marked, segment_labels
from client.imaging.source import Source
from client.imaging.together import Item, assembled, by_series, judged_together, single
from privacy.errors import ConsiliumError


@dataclass(frozen=True)
class DicomOpener:
    """`Opener` of DICOM files."""

    root: Path
    own_words: Mapping[str, str]

    def read(self, record: Record, wanted: Wanted) -> list[Picture]:
        """The frames of a file, or a volume or its slices; raises `Unusable`."""
        segs = [self.root / name for name in record.masks if not name.lower().endswith((*ENDINGS, ".png"))]
        if record.files and record.grid is not None:
            picture = read_volume([self.root / name for name in record.files], record.grid, replace(wanted, dims=3))
            if segs:
                picture = with_mask(picture, marked(segs, record.instances, 1, wanted.classes, self.own_words))
            elif record.masks:
                values = read_label_map(self.root / record.masks[0], record.grid)
                picture = with_mask(picture, classes_of(values, wanted.classes, self.own_words))
            return [picture] if wanted.dims == 3 else slices(picture)
        mask = marked(segs, record.instances, record.frames, wanted.classes, self.own_words) if segs else None
        pictures = read_images(self.root / record.path, wanted, mask)
        if record.masks and not segs:
            values = read_picture_mask(self.root / record.masks[0])
            pictures = [with_mask(item, classes_of(values, wanted.classes, self.own_words)) for item in pictures]
        return pictures


class DicomFolder(Folder):
    """`Reader` of a folder of DICOM files."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.opener = DicomOpener(self._root, dict(source.classes))

    def survey(self, tick: Tick, store: Path | None = None, processes: int | None = None) -> None:
        """Reads the headers that the index file `store` does not know yet."""
        examine, kind = partial(header_facts, self._source.label_tag), f"dicom {self._source.label_tag}"
        self._entries = index.examined(self._root, self._paths, examine, store, kind, tick, processes)

    def words(self) -> set[str]:
        """The values of the label's tag, or the labels of all segments."""
        headers = [(entry.path, Header.of(entry.facts)) for entry in self._entries if entry.facts is not None]
        if self._source.label_tag:
            return {header.answer for _, header in headers if header.answer}
        found: set[str] = set()
        for path, header in headers:
            if header.modality == "SEG":
                with contextlib.suppress(Unusable):  # told where its image is read
                    found |= segment_labels(self._root / path)
        return found

    def index(self, wanted: Wanted) -> Listing:
        """Judges every file that `survey` found.

        Raises:
            ConsiliumError: no file names a patient, or nothing names the label, so that the source cannot be used as
                it is declared.
        """
        rows = self._rows(wanted)
        items, out = self._items(rows)
        pictures, segs = self._sorted_out(items, wanted, out)
        volumes = wanted.dims == 3 or (wanted.target is Target.MASK and bool(self._source.columns.mask))
        judged = self._judged(pictures, rows, wanted, segs, volumes=volumes, out=out)
        shown = {item.path for item in pictures}
        if shown and all(item.reason is Reason.NO_PATIENT for item in out if item.path in shown) and not judged:
            raise ConsiliumError(
                "No image says who its patient is",
                str(self._source.path),
                "Name the label table's patient column (--patient-column), "
                "or declare --one-image-per-patient if no patient has two images.",
            )
        clean, bad_together = judged_together(judged, placeholders=self._source.placeholder_headers)
        out += [self._contested(item) for item in bad_together]
        records = assembled(clean, wanted, out) if volumes else [single(item) for item in clean]
        out += self._not_found(rows)
        missing = Counter(word for item in pictures for word in item.header.missing)
        isolate = any(item.header.syntax in ISOLATED for item in clean)
        return Listing(records, sorted(out, key=lambda item: item.path), missing, isolate)

    def _rows(self, wanted: Wanted) -> Rows | None:
        wants_words = wanted.target is not Target.MASK
        if self._labels is None:
            if wants_words and not self._source.label_tag:
                raise ConsiliumError(
                    "The source has no labels",
                    str(self._source.path),
                    "Name a label table (CSV), or the DICOM attribute that holds the label (--label-tag).",
                )
            return None
        label = wants_words and not self._source.label_tag
        return self._table(self._labels, label=label, by_file=self._source.match == "file")

    def _items(self, rows: Rows | None) -> tuple[list[Item], list[Quarantined]]:
        items, out, masks = [], [], self._mask_files(rows)
        for entry in self._entries:
            if entry.path in masks:
                continue
            if rows is not None and self._source.match == "file":
                rows.of(entry.path)  # a row whose file is bad was still found
            if entry.facts is not None:
                items.append(Item(entry.path, Header.of(entry.facts)))
            else:
                out.append(Quarantined(entry.path, entry.reason or Reason.DAMAGED, entry.detail))
        return items, out

    def _sorted_out(
        self, items: Sequence[Item], wanted: Wanted, out: list[Quarantined]
    ) -> tuple[list[Item], dict[str, list[str]]]:
        """The pictures of the declared modalities, and the segmentations by the instances they are about."""
        segs: dict[str, list[str]] = defaultdict(list)
        pictures = []
        instances = {item.header.instance for item in items}
        for item in items:
            modality = item.header.modality
            if modality == "SEG" and wanted.target is Target.MASK and instances.intersection(item.header.about):
                for instance in item.header.about:
                    segs[instance].append(item.path)
            elif modality == "SEG" and wanted.target is Target.MASK:
                out.append(Quarantined(item.path, Reason.MODALITY, "SEG of images that are not here"))
            elif modality in NOT_PICTURES or (self._source.modalities and modality not in self._source.modalities):
                out.append(Quarantined(item.path, Reason.MODALITY, shown_modality(modality)))
            else:
                pictures.append(item)
        return pictures, segs

    def _judged(
        self,
        items: Sequence[Item],
        rows: Rows | None,
        wanted: Wanted,
        segs: Mapping[str, list[str]],
        *,
        volumes: bool,
        out: list[Quarantined],
    ) -> list[Item]:
        said = {item.path: self._said(item, rows) for item in items}
        marks = {item.path: list(segs.get(item.header.instance, ())) for item in items}
        if volumes:  # a row or a segmentation about one slice is about its whole series
            said, marks = by_series(items, said), by_series(items, marks)
        judged = []
        for item in items:
            try:
                patient = self._patient(item, said[item.path], volumes=volumes, table=rows is not None)
                masks = self._masks(said[item.path], marks[item.path]) if wanted.target is Target.MASK else ()
                target = self._target(item, said[item.path], wanted)
                judged.append(replace(item, patient=patient, target=target, masks=masks))
            except Unusable as bad:
                out.append(Quarantined(item.path, bad.reason, bad.detail))
        return judged

    def _said(self, item: Item, rows: Rows | None) -> list[Row]:
        if rows is None:
            return []
        header = item.header
        return rows.of({"file": item.path, "instance": header.instance}.get(self._source.match, header.series))

    def _patient(self, item: Item, rows: Sequence[Row], *, volumes: bool, table: bool) -> str:
        if table and not rows and not self._source.label_tag:
            raise Unusable(Reason.NO_LABEL)
        if len({row.patient for row in rows}) > 1:
            raise Unusable(Reason.PATIENTS, "two rows, two patients")
        if self._source.one_image_per_patient:
            return (item.header.series if volumes else "") or item.path
        in_table = rows[0].patient if rows else ""
        patient = in_table if self._source.columns.patient else item.header.patient
        if not patient:
            raise Unusable(Reason.NO_PATIENT)
        return patient

    def _contested(self, item: Quarantined) -> Quarantined:
        if item.reason is Reason.PATIENTS and self._source.one_image_per_patient:
            return replace(item, detail="several images of one patient, against --one-image-per-patient")
        return item

    def _masks(self, rows: Sequence[Row], segs: Sequence[str]) -> tuple[str, ...]:
        named = self._named_mask(rows)
        if named:
            return named
        if not segs:
            raise Unusable(Reason.NO_MASK)
        return tuple(sorted(set(segs)))

    def _target(self, item: Item, rows: Sequence[Row], wanted: Wanted) -> int | tuple[int, ...] | None:
        if not self._source.label_tag or wanted.target is Target.MASK:
            return target_of(rows, self._source.columns, wanted, self._source.classes)
        if wanted.target is Target.LABELS:
            return several_of(item.header.answer, wanted.classes, self._source.classes)
        return one_class(item.header.answer, wanted.classes, self._source.classes)
