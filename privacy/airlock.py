"""How does anything leave a hospital's agent? Through here, and only through here.

Every byte for the outside becomes a `Released` value, made by `Airlock` alone after the journal holds what it is,
how large, for which study and slot, and its SHA-256. The service that faces the network accepts no other type. A
study with secure aggregation hands its vectors over masked (`privacy.secagg`), so that what is kept here, and ever
leaves, says nothing alone. In a study with noise it is made here, and only against a charge that is on the disk:

    bind the slot, charge the budget (durably) → clip and sum → round, integer noise → mask → store → hand over

A computed vector is kept on disk, whole and fsynced, before its first byte leaves, and only those stored bytes are
ever sent again (RULES S2, S3).
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from privacy.charge import Charge
from privacy.errors import Refusal, RefusalCode
from privacy.files import sync_folder
from privacy.journal import Journal
from privacy.mechanisms import Doubles, Mechanism, Words
from privacy.noise import Source
from privacy.roster import timestamp

_SEAL = object()
Numbers = npt.NDArray[np.float32] | npt.NDArray[np.uint32]
PIECE = 1 << 20


class Released:
    """Bytes that may leave: made by `Airlock` only, after the journal named them."""

    __slots__ = ("data",)

    def __init__(self, data: bytes, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("only the airlock releases bytes")
        self.data = data


@dataclass(frozen=True)
class Stored:
    """A vector on disk, ready to leave any number of times."""

    path: Path
    sha256: str
    size: int


class Airlock:
    """The one way out. `journal` records; `folder` holds the stored vectors; `now` is the clock."""

    def __init__(self, journal: Journal, folder: Path, now: Callable[[], datetime] | None = None) -> None:
        self._journal, self._folder = journal, folder
        self._now = now or (lambda: datetime.now(UTC))
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def release(self, what: str, data: bytes, study: str = "", slot: int = 0) -> Released:
        """Record small bytes (a greeting, a receipt, a refusal, an approval) and let them go.

        Raises:
            Refusal: DISK_FULL; then nothing leaves.
        """
        self._record(what, data, study, slot)
        return Released(data, _SEAL)

    def release_range(self, what: str, data: bytes, offset: int, length: int, study: str, slot: int) -> Released:
        """Let a range of small bytes go that the agent's records hold.

        Raises:
            Refusal: SLOT_SPENT when they are gone, MALFORMED for a range outside them, DISK_FULL.
        """
        if not data:
            raise Refusal(RefusalCode.SLOT_SPENT)
        if offset < 0 or length < 1 or offset + length > len(data):
            raise Refusal(RefusalCode.MALFORMED)
        return self.release(what, data[offset : offset + length], study, slot)

    def noise(self, charge: Charge, mechanism: Mechanism, sums: Doubles) -> Words:
        """Put a release's noise on a sum over patients (`privacy.mechanisms`); nothing leaves yet.

        Args:
            charge: pays for it.
            mechanism: the study's, for this kind of release.
            sums: float64 [d], of vectors each clipped to `mechanism.least_of_a_patient`.

        Returns:
            uint32 [d].

        Raises:
            TypeError: nobody paid.
            Refusal: SLOT_SPENT when another slot paid for this round's noise: what that one stored is sent again, and
                nothing is noised anew (RULES B2).
        """
        if type(charge) is not Charge:
            raise TypeError("a release that nobody paid for")
        if charge.paid != charge.slot:
            raise Refusal(RefusalCode.SLOT_SPENT, str(charge.slot))
        return mechanism.release(sums, Source())

    def keep(self, name: str, vector: Numbers) -> Stored:
        """Write a vector to disk durably and say where. Nothing leaves yet.

        Args:
            name: file name, unique for study and slot.
            vector: flat, four bytes a number: little-endian float32, or the masked words of a secure sum.

        Raises:
            Refusal: DISK_FULL.
        """
        path = self._folder / name
        part = path.with_suffix(".part")
        view = vector.data.cast("B")
        digest = hashlib.sha256(view).hexdigest()
        try:
            with open(part, "wb") as file:
                for start in range(0, len(view), PIECE):
                    file.write(view[start : start + PIECE])
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            sync_folder(self._folder)
        except OSError as error:
            part.unlink(missing_ok=True)
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise Refusal(RefusalCode.DISK_FULL) from error
            raise
        return Stored(path, digest, len(view))

    def fetch(self, what: str, stored: Stored, offset: int, length: int, *, study: str, slot: int) -> Released:
        """Let a range of a stored vector go.

        Raises:
            Refusal: SLOT_SPENT when the bytes are gone, MALFORMED for a range outside them, DISK_FULL.
        """
        if offset < 0 or length < 1 or offset + length > stored.size:
            raise Refusal(RefusalCode.MALFORMED)
        try:
            with open(stored.path, "rb") as file:
                file.seek(offset)
                data = file.read(length)
        except OSError as error:
            raise Refusal(RefusalCode.SLOT_SPENT) from error
        if len(data) != length:
            raise Refusal(RefusalCode.SLOT_SPENT)
        self._record(what, data, study, slot)
        return Released(data, _SEAL)

    def discard(self, stored: Stored) -> None:
        """Delete a stored vector; its slot stays spent."""
        stored.path.unlink(missing_ok=True)

    def _record(self, what: str, data: bytes, study: str, slot: int) -> None:
        self._journal.append(
            {
                "at": timestamp(self._now()),
                "what": what,
                "size": len(data),
                "study": study,
                "slot": slot,
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )


def released_bytes(released: Released) -> bytes:
    """The only serialiser of the service that faces the network: it takes nothing but `Released`.

    Raises:
        TypeError: something tried to leave past the airlock.
    """
    if type(released) is not Released:
        raise TypeError("something tried to leave past the airlock")
    return released.data
