"""How does a declared source become a cohort? Survey, index, read, prepare, keep: once, and then from the cache."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from client.imaging import cache, pool
from client.imaging.cohort import Cohort, Origin, Split, members, pseudonym
from client.imaging.dicom_folder import DicomFolder
from client.imaging.folder import ImageFolder
from client.imaging.masks import resampled
from client.imaging.near import Prints, prints
from client.imaging.npz import NpzFile
from client.imaging.records import (
    WORDS,
    Image,
    Listing,
    Membership,
    Opener,
    Picture,
    Quarantined,
    Reader,
    Reason,
    Record,
    Target,
    Unusable,
    Wanted,
)
from client.imaging.source import Source
from models.transforms import preparation
from privacy.errors import ConsiliumError

Prepare = Callable[[Image], Image]
Progress = Callable[[int, int], None]

_VERSION = "3"
"""Part of every cache entry's name: raised when reading or preparing changes what comes out."""
_CHUNK = 4

READERS: dict[str, Callable[[Source], Reader]] = {
    "dicom": DicomFolder, "nifti": ImageFolder, "images": ImageFolder, "npz": NpzFile
}  # fmt: skip
"""What reads each kind of source."""


class NothingUsable(ConsiliumError):
    """Every image of a source is left out: `cohort` holds none, and says why of each."""

    def __init__(self, source: Source, cohort: Cohort) -> None:
        reasons = Counter(item.reason for item in cohort.quarantine).most_common(3)
        why = "; ".join(f"{count} × {WORDS[reason]}" for reason, count in reasons) or "the source is empty"
        remedy = f"Put right what stands in the way: {why}. `consilium-site data check` names each file."
        super().__init__("The source holds no usable image", str(source.path), remedy)
        self.cohort = cohort


def load(
    source: Source,
    input_spec: Mapping[str, Any],
    classes: Sequence[str],
    split_spec: Mapping[str, Any],
    key: bytes,
    cache_dir: Path | None,
    progress: Progress | None = None,
    prepare: Prepare | None = None,
    target: str = "class",
    processes: int | None = None,
) -> Cohort:
    """The site's cohort for one study.

    Args:
        source: the operator's declaration.
        input_spec: the study's input section: `channels`, `size` and transforms (part of the cache's name). Three
            sides take volumes; two sides take images, and of volumes their slices. Where the first transform is
            `window`, images come in the scanner's units, otherwise as a display shows them.
        classes: the study's class names, in order.
        split_spec: the study's split section: `validation` and `test` fractions.
        key: the site's secret for pseudonyms and split, at least 16 bytes.
        cache_dir: a private folder of the agent for the index and prepared images; None keeps them in memory.
        progress: called with (done, total) steps while images are indexed and read.
        prepare: float32 [channels, *any] -> float32 [channels, *size], deterministic, the study's transforms
            where it is None. It sees one image at a time, so no image can depend on another.
        target: what is learned: "class", "labels" or "mask"; masks are resized to the input's size by their nearest
            pixels.
        processes: that read files beside this one; None chooses by the number of files (`pool.processes_for`).

    Raises:
        NothingUsable: every image is left out.
        ConsiliumError: the source is not there, or does not say who the patient is.
    """
    split = Split.of(split_spec)
    prepare = prepare or preparation({"input": input_spec})
    wanted = wanted_of(input_spec, classes, target)
    reader = READERS[source.kind](source)
    steps = _Steps(2 * reader.size(), progress)
    reader.survey(steps, index_file(cache_dir, source, key), processes)
    entry = _entry_name(source, reader, input_spec, wanted, key)
    found = cache.fetch(cache_dir, entry) if cache_dir else None
    if found is None:
        size = tuple(int(side) for side in input_spec["size"])
        found = _Preparing(reader, wanted, size, key, prepare, steps).into(cache_dir, entry, processes)
    arrays, facts = found
    for array in arrays.values():
        array.flags.writeable = False
    own = [side and Membership(side) for side in facts["own"]]
    cohort = Cohort(
        images=arrays["images"],
        targets=arrays["targets"],
        patients=tuple(facts["patients"]),
        membership=members(key, facts["patients"], own, split),
        classes=tuple(classes),
        quarantine=tuple(Quarantined(path, Reason(why), detail) for path, why, detail in facts["quarantine"]),
        scanners=Counter(scanner for _, scanner, _, _ in facts["origins"] if scanner),
        patient_rule=source.patient_rule,
        spacing=arrays["spacing"],
        origins=tuple(Origin(path, scanner, Prints(*both)) for path, scanner, *both in facts["origins"]),
        missing=Counter(facts["missing"]),
    )
    if not cohort.patients:
        raise NothingUsable(source, cohort)
    return cohort


def wanted_of(input_spec: Mapping[str, Any], classes: Sequence[str], target: str = "class") -> Wanted:
    """What a study's input section, classes and task ask of every image."""
    steps = input_spec.get("transforms", ())
    return Wanted(
        channels=int(input_spec["channels"]),
        dims=len(input_spec["size"]),
        classes=tuple(classes),
        target=Target(target),
        units=bool(steps) and steps[0]["name"] == "window",
    )


def index_file(cache_dir: Path | None, source: Source, key: bytes) -> Path | None:
    """Where the index of a source's files is kept: one for each folder, whatever the study."""
    if cache_dir is None:
        return None
    name = hmac.new(key, f"consilium/v1/index\0{source.kind}\0{source.path}".encode(), hashlib.sha256).hexdigest()
    return cache_dir / f"index-{name[:32]}.sqlite"


def pictures(opener: Opener, wanted: Wanted, record: Record) -> list[tuple[Picture, Prints]] | Quarantined:
    """A record read, with fingerprints of its pixels, or why it cannot be: the work of one process on one record."""
    try:
        found = opener.read(record, wanted)
        if len(found) != record.count:
            raise Unusable(Reason.NO_VOLUME, f"{len(found)} images where {record.count} were expected")
        return [(picture, prints(picture.image)) for picture in found]
    except Unusable as bad:
        return Quarantined(record.path, bad.reason, bad.detail)
    except MemoryError:
        return Quarantined(record.path, Reason.BOMB, "not enough memory")


class _Steps:
    """Counts for the progress view: one step for each file surveyed, and the rest over what is read."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self._progress = total, 0, progress

    def __call__(self, steps: int = 1) -> None:
        self.done += steps
        if self._progress:
            self._progress(min(self.done, self.total), self.total)


class _Preparing:
    """All records of a source, read, prepared and written one after the other."""

    def __init__(
        self, reader: Reader, wanted: Wanted, size: tuple[int, ...], key: bytes, prepare: Prepare, steps: _Steps
    ) -> None:
        self._reader, self._wanted, self._size, self._key = reader, wanted, size, key
        self._prepare, self._steps = prepare, steps
        self._patients: list[str] = []
        self._own: list[Membership | None] = []
        self._origins: list[tuple[str, str, str, str]] = []
        self._quarantine: list[Quarantined] = []

    def into(self, folder: Path | None, entry: str, processes: int | None) -> tuple[cache.Arrays, dict[str, Any]]:
        """The arrays and facts of a new cache entry."""
        listing = self._reader.index(self._wanted)
        self._quarantine = list(listing.quarantine)
        work = cache.Work(folder, self._shapes(sum(record.count for record in listing.records)))
        try:
            self._fill(work.arrays, listing, processes)
        except BaseException:
            work.discard()
            raise
        facts = {
            "patients": self._patients,
            "own": self._own,
            "origins": self._origins,
            "quarantine": [[item.path, item.reason, item.detail] for item in self._quarantine],
            "missing": dict(listing.missing),
        }
        return work.finish(entry, len(self._patients), facts), facts

    def _shapes(self, count: int) -> cache.Shapes:
        targets: dict[Target, tuple[tuple[int, ...], str]] = {
            Target.CLASS: ((count,), "int64"),
            Target.LABELS: ((count, len(self._wanted.classes)), "float32"),
            Target.MASK: ((count, *self._size), "uint8"),
        }
        return {
            "images": ((count, self._wanted.channels, *self._size), "float32"),
            "targets": targets[self._wanted.target],
            "spacing": ((count, len(self._size)), "float32"),
        }

    def _fill(self, arrays: cache.Arrays, listing: Listing, processes: int | None) -> None:
        records = listing.records
        processes = pool.processes_for(len(records), processes) if self._reader.parallel else 0
        processes = max(processes, 1) if listing.isolate else processes
        work = partial(pictures, self._reader.opener, self._wanted)
        start, room = self._steps.done, self._steps.total - self._steps.done
        results: Iterable[list[tuple[Picture, Prints]] | Quarantined]
        results = pool.each(work, records, given_up, processes, _CHUNK)
        for number, (record, result) in enumerate(zip(records, results, strict=True), 1):
            try:
                if isinstance(result, Quarantined):
                    raise Unusable(result.reason, result.detail)
                ready = [(*self._ready(picture), found) for picture, found in result]
            except Unusable as bad:
                self._quarantine.append(Quarantined(record.path, bad.reason, bad.detail))
            else:
                for at, item in enumerate(ready):
                    self._add(arrays, record, at, *item)
            self._steps(start + room * number // len(records) - self._steps.done)

    def _ready(self, picture: Picture) -> tuple[Image, np.ndarray[Any, Any] | None, tuple[float, ...]]:
        mask = None
        if self._wanted.target is Target.MASK:
            if picture.mask is None:
                raise Unusable(Reason.NO_MASK)
            mask = resampled(picture.mask, self._size)
        image = prepared(picture.image, (self._wanted.channels, *self._size), self._prepare)
        if picture.spacing is None:
            return image, mask, (1.0,) * len(self._size)
        sides = zip(picture.spacing, picture.image.shape[1:], self._size, strict=True)
        return image, mask, tuple(mm * old / new for mm, old, new in sides)

    def _add(
        self,
        arrays: cache.Arrays,
        record: Record,
        at: int,
        image: Image,
        mask: np.ndarray[Any, Any] | None,
        spacing: tuple[float, ...],
        found: Prints,
    ) -> None:
        row = len(self._patients)
        arrays["images"][row] = image
        arrays["targets"][row] = record.target if mask is None else mask
        arrays["spacing"][row] = spacing
        self._patients.append(pseudonym(self._key, record.patient))
        self._own.append(record.membership)
        path = record.path if record.count == 1 else f"{record.path}[{at}]"
        self._origins.append((path, record.scanner, found.exact, found.near))


def prepared(picture: Image, shape: tuple[int, ...], prepare: Prepare) -> Image:
    """An image after the study's transforms; `Unusable` where they fail or give something else."""
    try:
        ready = np.asarray(prepare(picture), dtype=np.float32)
    except Exception as error:  # noqa: BLE001 - transforms fail in many ways on an odd image; the rest goes on
        raise Unusable(Reason.PREPARATION, type(error).__name__) from None
    if ready.shape != shape:
        raise Unusable(Reason.PREPARATION, f"shape {ready.shape}, not {shape}")
    if not np.isfinite(ready).all():
        raise Unusable(Reason.NON_FINITE)
    return ready


def given_up(record: Record) -> Quarantined:
    """What stands for a record on which its process died."""
    return Quarantined(record.path, Reason.CRASH)


def _entry_name(source: Source, reader: Reader, input_spec: Mapping[str, Any], wanted: Wanted, key: bytes) -> str:
    """Keyed, so that the name says nothing about the files; a new key makes new pseudonyms and a new entry."""
    shaped_by = [
        _VERSION,
        version("monai"),
        source.model_dump(mode="json"),
        reader.fingerprint(),
        dict(input_spec),
        list(wanted.classes),
        wanted.target,
    ]
    text = json.dumps(shaped_by, sort_keys=True, default=str).encode()
    return hmac.new(key, b"consilium/v1/cache\0" + text, hashlib.sha256).hexdigest()
