"""How does a plan get into patients' histories, and out again? Writing only, inside the caller's transaction.

A history is a vector of costs, kept once however many patients have it, so that equal cases are composed once.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping

from client.agent import purse_audit
from privacy import budget
from privacy.accounting import ROLES, Role
from privacy.budget import NOTHING, History, Lifetime, Part


def admit(
    db: sqlite3.Connection, plan: int, members: Mapping[str, Role], asked: Mapping[Role, Part], lifetime: Lifetime
) -> None:
    """Write who is in a plan, each by his own history; who has no room is left out.

    Args:
        plan: its id.
        members: pseudonym -> role.
        asked: what the plan costs a patient of each role.
    """
    known = {name: (at, old) for at, name, old in db.execute("SELECT id, pseudonym, history FROM patients")}
    untouched, last = _kept(db, NOTHING), max((at for at, _ in known.values()), default=0)
    held = {(known.get(name, (0, untouched))[1], role) for name, role in members.items()}
    vectors = _vectors(db, (old for old, _ in held))
    composed = budget.compose(((vectors[old], role) for old, role in held), asked, lifetime)
    moved = {
        (old, role): _kept(db, new) for old, role in sorted(held) if (new := composed[vectors[old], role]) is not None
    }
    fresh, changed, admitted = [], [], []
    for name in sorted(members):
        at, old = known.get(name, (0, untouched))
        to = moved.get((old, members[name]))
        if to is None:
            continue
        if at:
            changed.append((to, at))
        else:
            at = last = last + 1
            fresh.append((at, name, to))
        admitted.append((plan, at, members[name]))
    db.executemany("INSERT INTO patients (id, pseudonym, history) VALUES (?, ?, ?)", fresh)
    db.executemany("UPDATE patients SET history = ? WHERE id = ?", changed)
    db.executemany("INSERT INTO members (plan, patient, role) VALUES (?, ?, ?)", sorted(admitted))
    db.execute("UPDATE plans SET members = ? WHERE id = ?", (len(admitted), plan))


def give_back(db: sqlite3.Connection, plan: int, used: Mapping[Role, int]) -> None:
    """Take out of every member's history what a plan reserved for him and no slot used.

    Args:
        used: releases that were charged, by the role that paid.
    """
    unused = {role: part.of(part.count - used[role]) for role, part in purse_audit.parts(db, plan).items()}
    rows = db.execute(
        "SELECT t.id, t.history, m.role FROM members m JOIN patients t ON t.id = m.patient WHERE m.plan = ?"
        " ORDER BY t.id",
        (plan,),
    ).fetchall()
    vectors = _vectors(db, (history for _, history, _ in rows))
    moved = {
        (old, role): _kept(db, budget.refund(vectors[old], unused[role]))
        for old, role in {(old, role) for _, old, role in rows}
    }
    db.executemany("UPDATE patients SET history = ? WHERE id = ?", [(moved[old, role], at) for at, old, role in rows])
    db.executemany("UPDATE parts SET held = ? WHERE plan = ? AND role = ?", [(used[r], plan, r) for r in ROLES])


def _kept(db: sqlite3.Connection, vector: History) -> int:
    """The id of a vector, written when it is new."""
    text = json.dumps(vector)
    db.execute("INSERT OR IGNORE INTO histories (vector) VALUES (?)", (text,))
    return int(db.execute("SELECT id FROM histories WHERE vector = ?", (text,)).fetchone()[0])


def _vectors(db: sqlite3.Connection, ids: Iterable[int]) -> dict[int, History]:
    read_one = "SELECT vector FROM histories WHERE id = ?"
    return {at: tuple(json.loads(db.execute(read_one, (at,)).fetchone()[0])) for at in set(ids)}
