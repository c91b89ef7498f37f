"""Who is in a study at this site, and on which side of its split? Patients under pseudonyms, images prepared.

A patient's side is a keyed hash of the patient's pseudonym and of nothing else (RULES N5): who else is in the
folder, and in which order, changes nothing. A source that brings its own split keeps it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.imaging.near import Doubles, Prints, across
from client.imaging.records import Image, Membership, Quarantined, Target
from privacy.errors import ConsiliumError

_PSEUDONYM = b"consilium/v1/pseudonym\0"
_SPLIT = b"consilium/v1/split\0"
MIN_KEY_BYTES = 16


def pseudonym(key: bytes, patient: str) -> str:
    """The patient's name inside the platform: hex HMAC-SHA256 under the site's own key (RFC 2104).

    Without the key nobody can try out patient numbers; with it the same patient has the same pseudonym in
    every study. Raises ValueError for a key shorter than 16 bytes.
    """
    _check_key(key)
    return hmac.new(key, _PSEUDONYM + patient.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Split:
    """Fractions of patients for validation and test; the rest trains. Compared exactly, never as floats."""

    validation: Fraction
    test: Fraction

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Split:
        """From the study's split section: `validation` and `test`, numbers or decimal strings.

        Raises:
            ConsiliumError: a fraction is negative, or nobody is left to train on.
        """
        try:
            validation, test = (Fraction(str(spec.get(side, 0))) for side in ("validation", "test"))
        except (ValueError, ZeroDivisionError):
            validation = test = Fraction(-1)
        if min(validation, test) < 0 or validation + test >= 1:
            raise ConsiliumError(
                "The study's split leaves nobody to train on, or is not made of fractions",
                "split",
                "Give validation and test as fractions such as 0.1 and 0.2 that sum to less than 1.",
            )
        return cls(validation, test)

    def side(self, key: bytes, name: str) -> Membership:
        """The side of the patient with this pseudonym: a function of key and pseudonym alone."""
        _check_key(key)
        drawn = int.from_bytes(hmac.new(key, _SPLIT + name.encode(), hashlib.sha256).digest()[:8], "big")
        position = Fraction(drawn, 1 << 64)
        if position < self.test:
            return Membership.TEST
        if position < self.test + self.validation:
            return Membership.VALIDATION
        return Membership.TRAIN


@dataclass(frozen=True)
class Origin:
    """Where an image comes from, for the operator's report; it stays at the site."""

    path: str
    scanner: str
    prints: Prints


@dataclass(frozen=True, eq=False, repr=False)  # a repr in a log would name patients' files
class Cohort:
    """The images of one site for one study, prepared once.

    Attributes:
        images: float32 [n, channels, *size], size being (height, width) or (slices, height, width); read-only, and
            mapped from the cache where there is one.
        targets: int64 [n] for a class, an index into `classes`; float32 [n, classes] of 0 and 1 for labels; uint8
            [n, *size] for masks, indices into `classes` of which the first is the background.
        patients: n pseudonyms; images of one patient share one.
        membership: n sides; one patient is on one side only.
        classes: the study's class names.
        quarantine: what was left out and why; paths are local to the site.
        scanners: images per manufacturer and model.
        patient_rule: one sentence on what a patient is in this source.
        spacing: float32 [n, axes of size], mm between neighbours after resizing; pixels (1.0) where it is not known.
        origins: where each image comes from, or nothing.
        missing: files in which a usual tag is absent.
    """

    images: Image
    targets: NDArray[Any]
    patients: tuple[str, ...]
    membership: tuple[Membership, ...]
    classes: tuple[str, ...]
    quarantine: tuple[Quarantined, ...]
    scanners: Counter[str]
    patient_rule: str
    spacing: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    origins: tuple[Origin, ...] = ()
    missing: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if not self.spacing.size:
            object.__setattr__(self, "spacing", np.ones((len(self.images), self.images.ndim - 2), np.float32))
        lengths = (self.images, self.targets, self.patients, self.membership, self.spacing)
        sizes = {len(item) for item in lengths} | ({len(self.origins)} if self.origins else set())
        if len(sizes) != 1:
            raise ValueError(f"images, targets, patients and membership differ in length: {sorted(sizes)}")
        if len(set(zip(self.patients, self.membership, strict=True))) != len(set(self.patients)):
            raise ValueError("a patient is on two sides of the split")

    @property
    def target(self) -> Target:
        """What is learned, by the targets' type."""
        kinds = {"i": Target.CLASS, "f": Target.LABELS, "u": Target.MASK}
        return kinds[self.targets.dtype.kind]

    def __len__(self) -> int:
        return len(self.images)

    def indices(self, side: Membership | str) -> NDArray[np.int64]:
        """Positions of the images on one side, int64, ascending."""
        wanted = Membership(side)
        return np.array([i for i, found in enumerate(self.membership) if found is wanted], dtype=np.int64)

    def groups(self, side: Membership | str) -> dict[str, NDArray[np.int64]]:
        """Positions of the images on one side by patient, patients in order of first appearance."""
        found: dict[str, list[int]] = {}
        for i in self.indices(side).tolist():
            found.setdefault(self.patients[i], []).append(i)
        return {name: np.array(places, dtype=np.int64) for name, places in found.items()}

    def counts(self, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        """In how many of some images each class occurs, int64 [classes]: its label, or at least one of its pixels."""
        if self.target is Target.CLASS:
            return np.bincount(self.targets[chosen], minlength=len(self.classes)).astype(np.int64)
        if self.target is Target.LABELS:
            return np.asarray(self.targets[chosen].sum(axis=0), dtype=np.int64)
        found = np.zeros(len(self.classes), np.int64)
        for at in chosen.tolist():
            found[np.unique(self.targets[at])] += 1
        return found

    def duplicates(self) -> Doubles:
        """The pairs of equal or nearly equal images on two sides of the split."""
        return across([origin.prints for origin in self.origins], self.membership)

    def summary(self) -> dict[str, Any]:
        """Counts for the operator's eyes, plain values; it stays at the site."""
        sides: dict[str, Any] = {}
        for side in Membership:
            chosen = self.indices(side)
            counts = self.counts(chosen)
            sides[side.value] = {
                "images": len(chosen),
                "patients": len({self.patients[i] for i in chosen}),
                "classes": dict(zip(self.classes, counts.tolist(), strict=True)),
            }
        return {
            "images": len(self),
            "patients": len(set(self.patients)),
            "patient_rule": self.patient_rule,
            "split": sides,
            "quarantined": len(self.quarantine),
            "quarantine": dict(Counter(item.reason.value for item in self.quarantine).most_common()),
            "scanners": dict(self.scanners.most_common()),
        }


def members(key: bytes, names: Sequence[str], own: Sequence[Membership | None], split: Split) -> tuple[Membership, ...]:
    """Each image's side: the source's own where it has one, else by its patient's pseudonym."""
    drawn = {name: split.side(key, name) for name in set(names)}
    return tuple(drawn[name] if given is None else given for name, given in zip(names, own, strict=True))


def _check_key(key: bytes) -> None:
    if len(key) < MIN_KEY_BYTES:
        raise ValueError(f"the site's key has {len(key)} bytes; at least {MIN_KEY_BYTES} are needed")
