"""What do the DICOM files of one folder mean together? Copies, patients with a claim on one image, slices of a volume.

What is decided here looks beyond one patient only where two patients have a claim on one image; it happens before any
split, depends on identifiers alone, and stands outside what differential privacy covers (RULES N5).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from client.imaging.geometry import stacks
from client.imaging.header import Header
from client.imaging.records import Quarantined, Reason, Record, Unusable, Wanted

_Said = TypeVar("_Said")


@dataclass(frozen=True)
class Item:
    """One file whose header is good; `patient` and `target` are those of its rows once it has been judged."""

    path: str
    header: Header
    patient: str = ""
    target: int | tuple[int, ...] | None = None
    masks: tuple[str, ...] = ()


def by_series(items: Sequence[Item], by_file: Mapping[str, Sequence[_Said]]) -> dict[str, list[_Said]]:
    """What is said about any file of a series, said about each of its files."""
    whole: dict[str, dict[_Said, None]] = defaultdict(dict)
    for item in items:
        whole[item.header.series].update(dict.fromkeys(by_file[item.path]))
    return {item.path: list(whole[item.header.series]) for item in items}


def judged_together(items: Iterable[Item], *, placeholders: bool) -> tuple[list[Item], list[Quarantined]]:
    """Takes out copies of an image, and every image on which two patients have a claim."""
    kept: list[Item] = []
    out: list[Quarantined] = []
    claims: dict[tuple[str, str], set[str]] = defaultdict(set)
    mixed: dict[str, set[str]] = defaultdict(set)
    copies: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        copies[item.header.instance or f"file {item.path}"].append(item)
        for claim in () if placeholders else _claims(item):
            claims[claim].add(item.patient)
        if item.header.series and item.header.patient and not placeholders:
            mixed[item.header.series].add(item.header.patient)
    for same in copies.values():
        if len({item.patient for item in same}) > 1:
            out += [Quarantined(item.path, Reason.PATIENTS, "one image, two patients") for item in same]
        elif len({item.target for item in same}) > 1:
            out += [Quarantined(item.path, Reason.LABELS) for item in same]
        else:
            kept.append(same[0])
            out += [Quarantined(item.path, Reason.DUPLICATE) for item in same[1:]]
    contested = {claim for claim, patients in claims.items() if len(patients) > 1}
    clean: list[Item] = []
    for item in kept:
        disputed = [] if placeholders else [claim[0] for claim in _claims(item) if claim in contested]
        if len(mixed[item.header.series]) > 1:
            disputed.append("series")
        if disputed:
            out.append(Quarantined(item.path, Reason.PATIENTS, f"one {disputed[0]}, two patients"))
        else:
            clean.append(item)
    return sorted(clean, key=lambda item: item.path), out


def _claims(item: Item) -> list[tuple[str, str]]:
    header = item.header
    named = (
        ("PatientID", header.patient),
        ("series", header.series),
        ("imaging study", header.imaging_study),
    )
    return [(what, value) for what, value in named if value]


def single(item: Item, count: int | None = None) -> Record:
    """The record of one file."""
    header = item.header
    return Record(
        path=item.path, patient=item.patient, target=item.target, scanner=header.scanner,
        count=header.frames if count is None else count, instances=(header.instance,), frames=header.frames,
        masks=item.masks,
    )  # fmt: skip


def assembled(items: Sequence[Item], wanted: Wanted, out: list[Quarantined]) -> list[Record]:
    """A record for each volume that the single-frame files of a series make up, and for each file of several frames."""
    records: list[Record] = []
    series: dict[tuple[str, str, tuple[float, ...], int, int], list[Item]] = defaultdict(list)
    for item in items:
        header = item.header
        if header.frames > 1:
            records.append(single(item, 1 if wanted.dims == 3 else None))
        else:
            turn = tuple(round(value, 3) for value in header.orientation)
            series[item.patient, header.series, turn, header.rows, header.columns].append(item)
    for group in series.values():
        ordered = sorted(group, key=lambda item: (item.header.turn, item.path))
        try:
            records += _stacked(ordered, wanted)
        except Unusable as bad:
            detail = f"{bad.detail}; series of {len(group)} files" if bad.detail else f"series of {len(group)} files"
            out.append(Quarantined(group[0].path, bad.reason, detail))
    return sorted(records, key=lambda record: record.path)


def _stacked(items: Sequence[Item], wanted: Wanted) -> list[Record]:
    if len({(item.target, item.masks) for item in items}) > 1:
        raise Unusable(Reason.LABELS, "slices of one series")
    records = []
    for stack in stacks([item.header.plane for item in items]):
        chosen = [items[at] for at in stack.order]
        records.append(
            Record(
                path=chosen[0].path,
                patient=chosen[0].patient,
                target=chosen[0].target,
                scanner=chosen[0].header.scanner,
                count=1 if wanted.dims == 3 else len(chosen),
                files=tuple(item.path for item in chosen),
                grid=stack.grid,
                instances=tuple(item.header.instance for item in chosen),
                masks=chosen[0].masks,
            )
        )
    return records
