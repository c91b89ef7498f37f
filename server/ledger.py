"""Where does the consortium's ledger stand? An append-only log in the coordinator's database, its heads and witnesses.

Entries are bytes that never change (`privacy.ledger`); the tree and the studies' accounts are worked out from them
when the ledger is opened, and every stored hash is checked on the way. A write is one exclusive transaction (SQLite:
BEGIN IMMEDIATE; PostgreSQL: LOCK TABLE), which first takes in what another process has appended, so there are never
two writers and no head is ever signed over a tree that is not the stored one. An entry is on the disk before `append`
returns; a crash between an entry and the next head leaves entries without a head, and the next head covers them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Self

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from privacy.checkpoint import Checkpoint, Note, NoteSignature, cosigned_at, needed, origin, valid_head, witness_name
from privacy.errors import ConsiliumError, Refusal
from privacy.files import sync_folder
from privacy.identity import Identity
from privacy.ledger import Account, Leaf, Step, admit_all
from privacy.ledger_check import first_line
from privacy.ledger_codes import LedgerCode, LedgerRefusal
from privacy.merkle import Tree, leaf_hash
from privacy.proposal import Inclusion, Proposal
from privacy.roster import timestamp
from server.ledger_tables import cosignatures, heads, insert, leaves, metadata, row
from server.tables import Database

CHUNK = 1000
SHOWN = 256
"""Releases proven to a site in one proposal; it asks for the others by their hashes."""
SHOWN_STUDIES = 64
"""Studies whose reservation and end are proven to a site in one proposal, two entries each."""


class Ledger:
    """The consortium's log. Any number of processes may have it open; safe between threads."""

    def __init__(self, url: str, consortium: str, now: Callable[[], datetime] | None = None) -> None:
        """Open the ledger in a database, creating its tables when new, and check every stored entry's hash.

        Args:
            url: SQLAlchemy URL of the registry's database, or of one of its own.
            consortium: whose log it is.
            now: the clock.

        Raises:
            ConsiliumError: it cannot be opened, or what is stored is not what was written.
        """
        self._db = Database(url)
        self.origin = origin(consortium)
        self._now = now or (lambda: datetime.now(UTC))
        self._lock = threading.RLock()
        self._tree, self._books = Tree(), dict[str, Account]()
        with self._exclusive(tables=False) as db:
            metadata.create_all(db)
        with self._db.read() as db:
            head = db.scalar(sa.select(heads.c.note).order_by(heads.c.size.desc()).limit(1))
            note = None if head is None else Note.decode(bytes(head))
            self._take_in(db, known=note.checkpoint.size if note else 0)
            if note is not None:
                self._sound(note)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the database."""
        self._db.close()

    # ---- writing ---------------------------------------------------------------------------------------------

    def append(self, entries: Sequence[Leaf]) -> range:
        """Write entries in one transaction, all or none, durably; returns their places.

        The signature of a STEP must have been verified; what comes from a site goes through `take`.

        Raises:
            LedgerRefusal: an entry may not stand there.
            ConsiliumError: it cannot be written.
        """
        with self._lock:
            with self._exclusive() as db:
                self._take_in(db)
                changed = admit_all(self._books, (leaf.entry for leaf in entries))
                first = self._tree.size
                rows = [row(place, leaf) for place, leaf in enumerate(entries, first)]
                for at in range(0, len(rows), CHUNK):
                    insert(db, rows[at : at + CHUNK])
            self._tree.extend(leaf.hash for leaf in entries)
            self._books.update(changed)
        return range(first, first + len(entries))

    def take(self, data: bytes, keys: Collection[str]) -> int:
        """Write a release that a site handed in, and return its place; handing it in again changes nothing.

        Args:
            data: the leaf's bytes.
            keys: the site's pinned identity keys, 64 hex digits.

        Raises:
            Refusal: MALFORMED, TOO_LARGE or BAD_SIGNATURE.
            LedgerRefusal: it may not stand there.
        """
        leaf = Leaf.read(data)
        if not isinstance(leaf.entry, Step):
            raise LedgerRefusal(LedgerCode.NOT_GRANTED, "a site hands in releases only")
        leaf.verify(keys)
        known = self.find(leaf.hash)
        return known if known is not None else self.append([leaf])[0]

    def checkpoint(self, log: Identity) -> Note:
        """Sign a head over everything written, keep it and return it; the same size gives the same head again."""
        with self._lock, self._exclusive() as db:
            self._take_in(db)
            size = self._tree.size
            data = db.scalar(sa.select(heads.c.note).where(heads.c.size == size))
            if data is not None:
                return self._sound(Note.decode(bytes(data)))
            note = Note(Checkpoint(self.origin, size, self._tree.root())).signed_by(log)
            db.execute(heads.insert().values(size=size, note=note.encode(), at=timestamp(self._now())))
        return note

    def add_cosignature(self, size: int, site: str, signature: NoteSignature, key: str) -> None:
        """Keep a site's cosignature of the head of `size`; a later one of the same head takes its place.

        Args:
            key: the site's pinned key.

        Raises:
            Refusal: BAD_SIGNATURE.
            ConsiliumError: there is no such head.
        """
        note = self.note(size)
        if signature.name != witness_name(self.origin, site):
            raise LedgerRefusal(LedgerCode.OTHER_LOG, signature.name)
        cosigned_at(note.checkpoint, signature, key)
        mine = (cosignatures.c.size == size) & (cosignatures.c.site == site)
        with self._lock, self._exclusive() as db:
            if not db.execute(cosignatures.update().where(mine).values(line=signature.line)).rowcount:
                db.execute(cosignatures.insert().values(size=size, site=site, line=signature.line))

    # ---- reading ---------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """How many entries are written."""
        with self._lock:
            self._refresh()
            return self._tree.size

    def account(self, study: str) -> Account | None:
        """What the log says of one study (by its full hash) so far."""
        with self._lock:
            self._refresh()
            return self._books.get(study)

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Leaf]:
        """Entries start..stop-1 in order (None: to the end), each checked against the tree.

        Raises:
            ConsiliumError: an entry was changed since it was written.
        """
        return (Leaf.known(data) for data in self._bytes(start, stop))

    def find(self, hash_: bytes) -> int | None:
        """The place of the leaf with this hash, if it is written."""
        with self._db.read() as db:
            place = db.scalar(sa.select(leaves.c.place).where(leaves.c.hash == hash_))
        return None if place is None else int(place)

    def note(self, size: int | None = None) -> Note:
        """A head with all its cosignatures (None: the newest).

        Raises:
            ConsiliumError: there is none, or what is stored is not what was signed.
        """
        order = sa.select(heads).order_by(heads.c.size.desc()).limit(1)
        with self._db.read() as db:
            head = db.execute(order if size is None else order.where(heads.c.size == size)).one_or_none()
            if head is None:
                what = "any size" if size is None else f"size {size}"
                raise ConsiliumError("The ledger has no head yet", what, "Sign one first.")
            lines = db.scalars(sa.select(cosignatures.c.line).where(cosignatures.c.size == head.size)).all()
        return self._sound(Note.decode(bytes(head.note))).adding(*(NoteSignature.read(line) for line in lines))

    def valid_note(self, key: str, witnesses: Mapping[str, str], colluding: int) -> Note | None:
        """The newest head with enough cosignatures of the pinned witnesses (RULES B7); None when there is none.

        Args:
            key: the log's key.
            witnesses: key name → key of all n sites, as `privacy.checkpoint.witnesses_of` gives them.
        """
        count = sa.func.count()
        enough = sa.select(cosignatures.c.size).group_by(cosignatures.c.size)
        enough = enough.having(count >= needed(len(witnesses), colluding)).order_by(cosignatures.c.size.desc())
        with self._db.read() as db:
            sizes = db.scalars(enough).all()
        for size in sizes:
            note = self.note(size)
            try:
                valid_head(note, self.origin, key, witnesses, colluding)
            except (Refusal, LedgerRefusal):
                continue  # cosigned under keys that are no longer pinned: an older head may do
            return note
        return None

    def inclusion(self, place: int, size: int) -> Inclusion:
        """The proof that the leaf at `place` stands under the head of `size`."""
        with self._lock:
            self._refresh()
            return Inclusion(place, self._tree.inclusion(place, size))

    def consistency(self, old: int, new: int) -> tuple[bytes, ...]:
        """The proof that the head of size `new` continues the one of size `old`."""
        with self._lock:
            self._refresh()
            return self._tree.consistency(old, new)

    def proposal(self, site: str, since: int, pending: Sequence[bytes] = (), study: str = "") -> Proposal:
        """The newest head, as it is put before a site for its cosignature.

        Args:
            since: the size of the head that the site cosigned last, by its own word.
            pending: hashes of releases that the site asks for; those written since `since` are proven without asking.
            study: the study in which it is asked. What the coordinator wrote of that one is always shown; of the site's
                other studies, what was written since `since`, and what goes with the releases that are proven.

        Raises:
            ConsiliumError: no head is signed yet, or the site names a size that this log never had.
        """
        note = self.note()
        size = note.checkpoint.size
        if since > size:
            raise ConsiliumError(
                "A site has cosigned a longer ledger than this one",
                f"{site}: size {since}, the newest head here has {size}",
                "This database was restored from an old copy. Restore the newest one; nothing may be appended to this.",
            )
        fresh = sa.select(leaves.c.place).where(
            (leaves.c.site == site) & (leaves.c.place >= since) & (leaves.c.place < size)
        )
        last = sa.select(sa.func.max(cosignatures.c.size)).where(cosignatures.c.site == site)
        with self._db.read() as db:
            new = db.scalars(fresh.order_by(leaves.c.place).limit(SHOWN)).all()
            cosigned = db.scalar(last)
        asked = (self.find(hash_) for hash_ in islice(pending, SHOWN))
        places = {int(p) for p in (*new, *asked) if p is not None and p < size}
        entries = self._own(site, since, size, study, places)
        places.update(entries)
        with self._lock:
            rows = {self._tree.leaf(p): Inclusion(p, self._tree.inclusion(p, size)) for p in sorted(places)}
            proof = self._tree.consistency(since, size)
        own = tuple(entries[place] for place in sorted(entries))
        return Proposal(note, since, proof, rows, self.note(cosigned) if cosigned is not None else None, own)

    def _own(self, site: str, since: int, size: int, study: str, places: Collection[int]) -> dict[int, Leaf]:
        """Entries of the coordinator's own below `size` to show to a site, by place; of `SHOWN_STUDIES` at most."""
        own = sa.select(leaves.c.place, leaves.c.data).where((leaves.c.site == "") & (leaves.c.place < size))
        fresh = sa.select(leaves.c.study).where((leaves.c.site == "") & leaves.c.place.between(since, size - 1))
        steps = sa.select(leaves.c.study).where(leaves.c.place.in_(sorted(places))).distinct()
        with self._db.read() as db:
            named = [study, *db.scalars(steps), *db.scalars(fresh.order_by(leaves.c.place))]
            mine = [s for s in dict.fromkeys(named) if s in self._books and site in self._books[s].reserve.grants]
            found = db.execute(own.where(leaves.c.study.in_(mine[:SHOWN_STUDIES]))).all()
        return {int(place): Leaf.read(bytes(data)) for place, data in found}

    def export(self, path: Path, size: int | None = None) -> int:
        """Write the ledger to one file for `privacy.ledger_check.verify_file`; returns how many entries it holds.

        Args:
            size: the head to export under, and so the number of entries; None takes the newest head.

        Raises:
            ConsiliumError: no such head, or the file cannot be written.
        """
        note = self.note(size)
        count = note.checkpoint.size
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                file.write(first_line(note, count))
                file.writelines(data + b"\n" for data in self._bytes(0, count))
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            sync_folder(path.parent)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise ConsiliumError(
                "The ledger cannot be written to this file",
                f"{path}: {error.strerror}",
                "Check the folder's permissions and free space.",
            ) from error
        return count

    # ---- inside ----------------------------------------------------------------------------------------------

    @contextmanager
    def _exclusive(self, *, tables: bool = True) -> Iterator[sa.Connection]:
        """One transaction that no other writer shares."""
        try:
            with self._db.write() as db:
                if tables and db.dialect.name == "postgresql":
                    # before anything is read: a serializable transaction sees the state of its first query
                    db.execute(sa.text("LOCK TABLE ledger_leaves IN EXCLUSIVE MODE"))
                yield db
        except DBAPIError as error:
            raise ConsiliumError(
                "The ledger could not be written",
                f"{self._db.name} ({error.orig})",
                "Give the command again; nothing that was committed is lost, and nothing was half written.",
            ) from error

    def _bytes(self, start: int, stop: int | None) -> Iterator[bytes]:
        """Stored entries in order, each compared with the tree."""
        stop = self.size if stop is None else min(stop, self.size)
        while start < stop:
            span = (leaves.c.place >= start) & (leaves.c.place < min(start + CHUNK, stop))
            with self._db.read() as db:
                rows = db.scalars(sa.select(leaves.c.data).where(span).order_by(leaves.c.place)).all()
            for place, data in enumerate(rows, start):
                if leaf_hash(data) != self._tree.leaf(place):
                    raise self._changed(place)
                yield bytes(data)
            if not rows:
                raise self._changed(start)
            start += len(rows)

    def _refresh(self) -> None:
        """Take in what other processes have appended."""
        with self._db.read() as db:
            self._take_in(db)

    def _take_in(self, db: sa.Connection, known: int = 0) -> None:
        """Follow the stored entries from where this process stands, checking every one.

        The first `known` stand under a head whose root the caller compares next, so only their hashes are checked.
        """
        last = db.scalar(sa.select(sa.func.max(leaves.c.place)))
        stored = 0 if last is None else int(last) + 1
        if stored < self._tree.size:
            raise ConsiliumError(
                "Entries of the ledger were taken away while it was open",
                f"{self._db.name}: {stored} instead of {self._tree.size}",
                "Stop the coordinator, find out who wrote to the database, and restore the newest copy.",
            )
        while self._tree.size < stored:
            self._take_chunk(db, known)

    def _take_chunk(self, db: sa.Connection, known: int) -> None:
        span = leaves.c.place >= self._tree.size
        rows = db.execute(sa.select(leaves).where(span).order_by(leaves.c.place).limit(CHUNK)).all()
        for stored in rows:
            place = self._tree.size
            try:
                leaf = Leaf.known(bytes(stored.data)) if place < known else Leaf.read(bytes(stored.data))
                sound = row(place, leaf) == {**stored._mapping, "hash": bytes(stored.hash), "data": bytes(stored.data)}
                changed = admit_all(self._books, [leaf.entry])
            except (Refusal, LedgerRefusal) as error:
                raise self._changed(place) from error
            if not sound:
                raise self._changed(place)
            self._tree.append(leaf.hash)
            self._books.update(changed)
        if not rows:
            raise self._changed(self._tree.size)

    def _sound(self, note: Note) -> Note:
        """The stored head, if it is over this tree."""
        head = note.checkpoint
        with self._lock:
            if head.size > self._tree.size:
                self._refresh()
            fits = head.size <= self._tree.size and head.root == self._tree.root(head.size)
        if head.origin != self.origin or not fits:
            raise ConsiliumError(
                "The ledger's entries are not those its head was signed over",
                f"{self._db.name}, head of size {head.size} of {head.origin}",
                "Keep the database as evidence, find out who wrote to it, and restore the last good copy.",
            )
        return note

    def _changed(self, place: int) -> ConsiliumError:
        return ConsiliumError(
            "An entry of the ledger was changed or removed",
            f"{self._db.name}, entry {place + 1}",
            "Keep the database as evidence, find out who wrote to it, and restore the last good copy.",
        )
