"""What must the agent never forget of secure aggregation? A session's secrets, every stage's answer, every choice.

A stage is answered once: its request, its answer, the secrets it leads to and the choice it makes are one
transaction, on the disk before the answer leaves (RULES S2, S3). The secrets die with their session; the rows of
`stages` and `choices` stay as tombstones, so that nobody can talk a restarted agent into the other share (S4).
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from client.agent.rows import StageRow
from privacy.canonical import sha256
from privacy.errors import Refusal, RefusalCode


@dataclass(frozen=True)
class StageLeft:
    """An answer to a stage that left the site; `kind` and `round` say which round it opened, if it did."""

    answer_sha256: str
    slot: int
    kind: str
    round: int


class Rings:
    """The part of the store that secure aggregation needs; its transactions are the store's own."""

    def __init__(
        self,
        db: sqlite3.Connection,
        lock: threading.RLock,
        transaction: Callable[[], AbstractContextManager[None]],
        event: Callable[[str, str], None],
    ) -> None:
        self._db, self._lock, self._transaction, self._event = db, lock, transaction, event

    def pin(self, study: str, identities: Mapping[str, str]) -> None:
        """Fix whose keys count for a study, as its operator approved it: site -> Ed25519 public key."""
        with self._transaction():
            self._db.execute("DELETE FROM pins WHERE study = ?", (study,))
            self._db.executemany(
                "INSERT INTO pins VALUES (?, ?, ?)", [(study, site, key) for site, key in identities.items()]
            )

    def pins(self, study: str) -> dict[str, str]:
        """Site -> Ed25519 public key, as pinned with the approval; a newer roster does not change it."""
        with self._lock:
            return dict(self._db.execute("SELECT site, identity FROM pins WHERE study = ?", (study,)).fetchall())

    def secrets(self, study: str, session: int) -> bytes | None:
        """The state of a session's set-up, or None when there is none (any more)."""
        with self._lock:
            row = self._db.execute(
                "SELECT state FROM rings WHERE study = ? AND session = ?", (study, session)
            ).fetchone()
        return bytes(row[0]) if row else None

    def stage(self, study: str, session: int, slot: int, stage: str) -> StageRow | None:
        """What was answered to a stage, or None."""
        with self._lock:
            row = self._db.execute(
                "SELECT stage, request, answer, payload FROM stages"
                " WHERE study = ? AND session = ? AND slot = ? AND stage = ?",
                (study, session, slot, stage),
            ).fetchone()
        return StageRow(row[0], row[1], bytes(row[2]), bytes(row[3])) if row else None

    def answered(self, study: str, session: int, slot: int, request: str) -> StageRow | None:
        """The stage that this request was answered in, or None."""
        with self._lock:
            row = self._db.execute(
                "SELECT stage, request, answer, payload FROM stages"
                " WHERE study = ? AND session = ? AND slot = ? AND request = ?",
                (study, session, slot, request),
            ).fetchone()
        return StageRow(row[0], row[1], bytes(row[2]), bytes(row[3])) if row else None

    def choices(self, study: str) -> list[bytes]:
        """Every choice made for a slot of the study, in the order of the slots."""
        with self._lock:
            rows = self._db.execute("SELECT choice FROM choices WHERE study = ? ORDER BY slot", (study,)).fetchall()
        return [bytes(row[0]) for row in rows]

    def opened(self, study: str, kind: str, round_: int, but: int = 0) -> bool:
        """Whether shares were released for an attempt at this round in another slot than `but` (RULES S4)."""
        with self._lock:
            row = self._db.execute(
                "SELECT 1 FROM choices WHERE study = ? AND kind = ? AND round = ? AND slot != ? AND opened",
                (study, kind, round_, but),
            ).fetchone()
        return row is not None

    def keep(
        self,
        study: str,
        session: int,
        slot: int,
        stage: str,
        request: str,
        answer: bytes,
        *,
        payload: bytes = b"",
        state: bytes = b"",
        choice: tuple[str, int, bytes, bool] | None = None,
    ) -> None:
        """Write a stage's answer with everything that follows from it, all or nothing.

        Args:
            state: the session's secrets from now on; empty leaves them.
            choice: (kind, round, choice, whether shares are released) of the slot.

        Raises:
            Refusal: SESSION_CLOSED when a newer session was opened meanwhile; SLOT_BOUND when another request was
                answered in this stage, or another choice was made for the slot; SLOT_SPENT when the slot was killed.
        """
        with self._transaction():
            live = self._db.execute("SELECT session FROM studies WHERE hash = ?", (study,)).fetchone()
            if live is None or live[0] != session:
                raise Refusal(RefusalCode.SESSION_CLOSED, str(session))
            if (
                slot
                and not self._db.execute(
                    "SELECT 1 FROM slots WHERE study = ? AND slot = ? AND session = ? AND state = 'stored'",
                    (study, slot, session),
                ).fetchone()
            ):
                raise Refusal(RefusalCode.SLOT_SPENT, str(slot))
            try:
                self._db.execute(
                    "INSERT INTO stages VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (study, session, slot, stage, request, answer, sha256(answer), payload),
                )
            except sqlite3.IntegrityError as error:
                raise Refusal(RefusalCode.SLOT_BOUND, str(slot)) from error
            if state:
                self._db.execute("INSERT OR REPLACE INTO rings VALUES (?, ?, ?)", (study, session, state))
            if choice is not None:
                self._choose(study, slot, *choice)
            what = f"slot {slot}: {stage}" if slot else f"session {session}: {stage}"
            self._event(study, f"{what} answered")

    def forgotten(self, study: str, left: Iterable[StageLeft]) -> bool:
        """Inside a transaction: whether an answer left that these records do not know; opened rounds are noted."""
        known = {row[0] for row in self._db.execute("SELECT answer_sha256 FROM stages WHERE study = ?", (study,))}
        missing = [line for line in left if line.answer_sha256 not in known]
        for line in missing:
            if line.kind:
                self._db.execute(
                    "INSERT INTO choices VALUES (?, ?, ?, ?, x'', 1)"
                    " ON CONFLICT (study, slot) DO UPDATE SET opened = 1",
                    (study, line.slot, line.kind, line.round),
                )
        return bool(missing)

    def destroy(self, study: str) -> None:
        """Inside a transaction: delete a study's secrets and the bytes it could send again; the tombstones stay."""
        self._db.execute("DELETE FROM rings WHERE study = ?", (study,))
        self._db.execute("UPDATE stages SET answer = x'', payload = x'' WHERE study = ?", (study,))

    def wipe(self) -> None:
        """Let nothing that was deleted stay in the write-ahead log (the database overwrites what it deletes)."""
        with self._lock:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _choose(self, study: str, slot: int, kind: str, round_: int, choice: bytes, opened: bool) -> None:
        row = self._db.execute("SELECT choice FROM choices WHERE study = ? AND slot = ?", (study, slot)).fetchone()
        if row is None:
            self._db.execute(
                "INSERT INTO choices VALUES (?, ?, ?, ?, ?, ?)", (study, slot, kind, round_, choice, int(opened))
            )
        elif bytes(row[0]) != choice:
            raise Refusal(RefusalCode.SLOT_BOUND, str(slot))
        elif opened:
            self._db.execute("UPDATE choices SET opened = 1 WHERE study = ? AND slot = ?", (study, slot))
