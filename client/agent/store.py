"""What must the agent never forget? Studies, sessions and slots, in one SQLite file.

Every method is one transaction, on the disk before it returns (WAL, synchronous=FULL). A slot goes from nothing to
`bound` to `stored` to `spent`, never back, and its row is never deleted: the row is the tombstone (RULES S1, S2, S7).
Highest slot and session belong to the study's hash.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from client.agent.purse import Purse
from client.agent.rings import Rings, StageLeft
from client.agent.rows import (
    PURSE_TABLES,
    SECURE_TABLES,
    SLOT,
    STUDY,
    TABLES,
    UPGRADES,
    SlotRow,
    SourceRow,
    State,
    StudyRow,
)
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.roster import timestamp

SCHEMA = 3
KEPT_EVENTS = 1000


class Store:
    """The agent's memory. Thread-safe; one process only (the caller holds the home's lock).

    Raises (any method):
        Refusal: DISK_FULL when a change cannot be made durable, BUSY when another program holds the file; then it has
            not happened.
    """

    def __init__(self, path: Path, now: Callable[[], datetime] | None = None) -> None:
        self._now = now or (lambda: datetime.now(UTC))
        self._lock = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            self._db.execute("PRAGMA secure_delete=ON")
            version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            if version < SCHEMA:
                with self._transaction():
                    upgrades = [UPGRADES[number] for number in range(version + 1, SCHEMA + 1) if version]
                    for statements in upgrades or [TABLES, SECURE_TABLES, PURSE_TABLES]:
                        for statement in statements.split(";\n"):
                            self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version={SCHEMA}")
        except sqlite3.DatabaseError as error:
            raise ConsiliumError(
                "The agent's records cannot be read",
                str(path),
                "Free disk space if it is full; otherwise keep the file as it is and restore the last good backup.",
            ) from error
        if version > SCHEMA:
            raise ConsiliumError(
                "The agent's records were written by a newer release",
                str(path),
                "Install the newer release again; an older one would misread them.",
            )
        self.rings = Rings(self._db, self._lock, self._transaction, self._event)

    def purse(self, site: str) -> Purse:
        """The patients' budgets of a site, in this same file and under its transactions."""
        return Purse(self._db, self._lock, self._transaction, self._event, self._shut, self._now, site)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    # ---- roster ----------------------------------------------------------------------------------------------

    def roster(self) -> bytes | None:
        """The newest roster document seen, or None."""
        with self._lock:
            row = self._db.execute("SELECT document FROM roster").fetchone()
        return bytes(row[0]) if row else None

    def take_roster(self, version: int, document: bytes) -> bool:
        """Keep a verified roster if it is newer than the one held; its version never goes down."""
        with self._transaction():
            changed = self._db.execute(
                "INSERT INTO roster VALUES (1, ?, ?) ON CONFLICT (one) DO UPDATE"
                " SET version = excluded.version, document = excluded.document WHERE excluded.version > version",
                (version, document),
            )
            return changed.rowcount > 0

    # ---- studies ---------------------------------------------------------------------------------------------

    def study(self, study: str) -> StudyRow | None:
        """One study by its hash."""
        with self._lock:
            row = self._db.execute(f"{STUDY} WHERE hash = ?", (study,)).fetchone()
        return StudyRow.of(row) if row else None

    def studies(self) -> list[StudyRow]:
        """All studies, in the order they became known."""
        with self._lock:
            return [StudyRow.of(row) for row in self._db.execute(f"{STUDY} ORDER BY rowid").fetchall()]

    def add_study(self, study: str, name: str, document: bytes) -> StudyRow:
        """Remember a verified study as pending; one that is known stays what it is."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO studies (hash, name, document, state, last, at) VALUES (?, ?, ?, 'pending', ?, ?)"
                " ON CONFLICT (hash) DO NOTHING",
                (study, name, document, "offered by the coordinator", self._stamp()),
            )
        row = self.study(study)
        assert row is not None
        return row

    def decide(self, study: str, state: State, data: str = "", approval: bytes = b"") -> None:
        """Write the site's decision; anything but an approval kills the open slots too."""
        with self._transaction():
            self._db.execute(
                "UPDATE studies SET state = ?, data = ?, approval = ? WHERE hash = ?",
                (state.value, data, approval, study),
            )
            if state is not State.APPROVED:
                self._shut(study)
            self._event(study, f"{state.value} by the operator")

    def finish(self, study: str, why: str = "finished: the model has arrived") -> None:
        """The study is over, because the model has arrived or for another reason: every slot is spent."""
        with self._transaction():
            self._db.execute("UPDATE studies SET state = 'finished' WHERE hash = ?", (study,))
            self._shut(study)
            self._event(study, why)

    def keep_result(self, study: str, result: str) -> None:
        """This site's own test result (JSON); it stays at the site."""
        with self._transaction():
            self._db.execute("UPDATE studies SET result = ? WHERE hash = ?", (result, study))

    def note(self, study: str, text: str) -> None:
        """Tell the operator what happened. Words only, nothing derived from patients."""
        with self._transaction():
            self._event(study, text)

    def events(self, limit: int = 50) -> list[tuple[str, str, str]]:
        """The latest events, newest first: (when, study, words)."""
        with self._lock:
            return self._db.execute("SELECT at, study, text FROM events ORDER BY id DESC LIMIT ?", (limit,)).fetchall()

    # ---- sessions and slots ----------------------------------------------------------------------------------

    def open_session(self, study: str, session: int) -> None:
        """Make `session` the live one; a newer one first kills the older one's slots and keys for ever (RULES S7).

        Raises:
            Refusal: SESSION_CLOSED when a newer session has been accepted.
        """
        with self._transaction():
            live = self._require(study).session
            if session < live:
                raise Refusal(RefusalCode.SESSION_CLOSED, str(session))
            if session > live:
                self._shut(study)
                self._db.execute("UPDATE studies SET session = ? WHERE hash = ?", (session, study))
                self._event(study, f"session {session} opened")

    def never_below(self, study: str, slot: int) -> None:
        """Count every slot up to this one as used, and kill what is stored, if the records are older than that.

        Records older than the journal were restored from a backup: what left since then is forgotten (RULES S3).
        """
        with self._transaction():
            row = self._db.execute("SELECT highest FROM studies WHERE hash = ?", (study,)).fetchone()
            if row is not None and row[0] < slot:
                self._shut(study)
                self._db.execute("UPDATE studies SET highest = ? WHERE hash = ?", (slot, study))
                self._event(study, f"these records were restored from a backup: slots up to {slot} count as used")

    def start_over(self, study: str, why: str) -> None:
        """Spend every open slot of a study and destroy its keys, for a reason that the operator reads (RULES S3)."""
        with self._transaction():
            self._shut(study)
            self._event(study, f"{why}: the keys of its sessions are destroyed")

    def remember(self, study: str, left: Iterable[StageLeft]) -> None:
        """Hold the records against what left in the stages of secure sums; older records lose every secret.

        Records that do not know an answer that left were restored from a backup: a choice may be forgotten, so the
        keys are destroyed, open slots are spent, and the rounds that were opened stay opened (RULES S3, S4).
        """
        with self._transaction():
            if self._db.execute("SELECT 1 FROM studies WHERE hash = ?", (study,)).fetchone() is None:
                return
            if self.rings.forgotten(study, left):
                self._shut(study)
                self._event(study, "these records were restored from a backup: the keys of its sessions are destroyed")

    def look(self, study: str, session: int, slot: int, request: str, limit: int) -> SlotRow | None:
        """What would `bind` say? The slot's row if it serves this request, None if it is free; same refusals."""
        with self._lock:
            return self._look(study, session, slot, request, limit)

    def bind(
        self, study: str, session: int, slot: int, request: str, kind: str, limit: int,
        *, round_: int = 0, cohort: Iterable[str] = (),
    ) -> SlotRow:  # fmt: skip
        """Bind a slot to one request for ever, and spend every older slot (RULES S1, S2).

        Args:
            limit: T_max of the signed study.
            round_, cohort: the request's, for the stages that open a masked sum.

        Returns:
            The slot's row: `bound` (compute) or `stored` (send again what is stored).

        Raises:
            Refusal: SESSION_UNKNOWN, SESSION_CLOSED, SLOT_LIMIT, SLOT_BOUND, SLOT_OLD or SLOT_SPENT; ROUND_OPENED when
                shares were released for another attempt at this round (RULES S4).
        """
        with self._transaction():
            row = self._look(study, session, slot, request, limit)
            if row is not None:
                return row
            if self.rings.opened(study, kind, round_):
                raise Refusal(RefusalCode.ROUND_OPENED, str(round_))
            self._spend(study)
            self._db.execute(
                "INSERT INTO slots (study, slot, session, request, kind, state, round, cohort)"
                " VALUES (?, ?, ?, ?, ?, 'bound', ?, ?)",
                (study, slot, session, request, kind, round_, " ".join(cohort)),
            )
            self._db.execute("UPDATE studies SET highest = ? WHERE hash = ?", (slot, study))
            self._event(study, f"slot {slot}: {kind} begun")
            bound = self.slot(study, slot)
            assert bound is not None
            return bound

    def keep_answer(
        self, study: str, slot: int, request: str, answer: bytes, sha256: str, size: int, witness: bytes = b""
    ) -> None:
        """Record the answer whose payload is already on the disk.

        Args:
            witness: what the site knows of the consortium's log from now on; empty leaves it.

        Raises:
            Refusal: SLOT_SPENT when the slot was killed while the agent computed.
        """
        with self._transaction():
            changed = self._db.execute(
                "UPDATE slots SET state = 'stored', answer = ?, sha256 = ?, size = ?"
                " WHERE study = ? AND slot = ? AND request = ? AND state = 'bound'",
                (answer, sha256, size, study, slot, request),
            )
            if changed.rowcount != 1:
                raise Refusal(RefusalCode.SLOT_SPENT, str(slot))
            self._keep_witness(witness)
            self._event(study, f"slot {slot}: answer stored")

    def witness(self) -> bytes:
        """What the site knows of the consortium's log (`privacy.witness`); empty when nothing yet."""
        with self._lock:
            row = self._db.execute("SELECT state FROM witness").fetchone()
        return bytes(row[0]) if row else b""

    def keep_witness(self, state: bytes) -> None:
        """Replace it, durably, before a cosignature leaves."""
        with self._transaction():
            self._keep_witness(state)

    def slot(self, study: str, slot: int) -> SlotRow | None:
        """One slot, or None when it was never bound."""
        with self._lock:
            row = self._db.execute(f"{SLOT} WHERE study = ? AND slot = ?", (study, slot)).fetchone()
        return SlotRow(*row) if row else None

    def stored(self) -> set[tuple[str, int]]:
        """Every (study, slot) whose bytes must be kept."""
        with self._lock:
            return set(self._db.execute("SELECT study, slot FROM slots WHERE state = 'stored'").fetchall())

    # ---- data sources ----------------------------------------------------------------------------------------

    def sources(self) -> list[SourceRow]:
        """All data sources by name."""
        with self._lock:
            rows = self._db.execute("SELECT name, source, summary FROM sources ORDER BY name").fetchall()
        return [SourceRow(*row) for row in rows]

    def put_source(self, name: str, source: str, summary: str = "") -> None:
        """Add or replace a source."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO sources VALUES (?, ?, ?)", (name, source, summary))

    def remove_source(self, name: str) -> None:
        """Forget a source; its images stay where they are."""
        with self._transaction():
            self._db.execute("DELETE FROM sources WHERE name = ?", (name,))

    # ---- inside a transaction --------------------------------------------------------------------------------

    def _require(self, study: str) -> StudyRow:
        row = self._db.execute(f"{STUDY} WHERE hash = ?", (study,)).fetchone()
        if row is None:
            raise Refusal(RefusalCode.UNKNOWN_STUDY, study)
        return StudyRow.of(row)

    def _look(self, study: str, session: int, slot: int, request: str, limit: int) -> SlotRow | None:
        known = self._require(study)
        if session < known.session:
            raise Refusal(RefusalCode.SESSION_CLOSED, str(session))
        if session > known.session or session == 0:
            raise Refusal(RefusalCode.SESSION_UNKNOWN, str(session))
        if not 1 <= slot <= limit:
            raise Refusal(RefusalCode.SLOT_LIMIT, str(slot))
        row = self.slot(study, slot)
        if row is None:
            if slot <= known.highest:
                raise Refusal(RefusalCode.SLOT_OLD, str(slot))
            return None
        if row.request != request:
            raise Refusal(RefusalCode.SLOT_BOUND, str(slot))
        if row.state == "spent":
            raise Refusal(RefusalCode.SLOT_SPENT, str(slot))
        return row

    def _keep_witness(self, state: bytes) -> None:
        if state:
            self._db.execute("INSERT OR REPLACE INTO witness VALUES (1, ?)", (state,))

    def _spend(self, study: str) -> None:
        self._db.execute(
            "UPDATE slots SET state = 'spent', answer = x'' WHERE study = ? AND state != 'spent'", (study,)
        )

    def _shut(self, study: str) -> None:
        """Nothing of the study's open slots and sessions leaves any more."""
        self._spend(study)
        self.rings.destroy(study)

    def _event(self, study: str, text: str) -> None:
        stamp = self._stamp()
        cursor = self._db.execute("INSERT INTO events (at, study, text) VALUES (?, ?, ?)", (stamp, study, text))
        self._db.execute("DELETE FROM events WHERE id <= ?", ((cursor.lastrowid or 0) - KEPT_EVENTS,))
        self._db.execute("UPDATE studies SET last = ?, at = ? WHERE hash = ?", (text, stamp, study))

    def _stamp(self) -> str:
        return timestamp(self._now())

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF in {
                    sqlite3.SQLITE_FULL,
                    sqlite3.SQLITE_IOERR,
                    sqlite3.SQLITE_CANTOPEN,
                }:
                    raise Refusal(RefusalCode.DISK_FULL) from error
                if error.sqlite_errorcode & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
                    raise Refusal(RefusalCode.BUSY) from error
                raise
