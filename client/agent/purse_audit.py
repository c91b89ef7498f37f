"""Does a hospital's privacy ledger add up, and how far is it spent? Readings only; nothing here changes a row."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from privacy import budget
from privacy.accounting import Role
from privacy.budget import NOTHING, History, Lifetime, Part
from privacy.errors import Refusal, RefusalCode
from privacy.identity import Document
from privacy.study import KIND, Study

LOST = "the privacy ledger's own tables are gone; restore the last good backup of the agent's folder"
OTHER_KEY = (
    "the ledger was kept under another key of pseudonyms, so every patient would begin anew; restore pseudonym.key"
)
BINS = 10
ROLE_OF: dict[str, Role] = {"train": "train", "validate": "validation", "test": "test"}
"""Which patients pay for a request of each kind."""


@dataclass(frozen=True)
class Plan:
    """A reserved study; `grant` is the state of the grant it runs on, empty for one closed before it began."""

    id: int
    study: str
    state: str
    grant: str

    def check_running(self) -> None:
        """Whether something may be charged to it.

        Raises:
            Refusal: GRANT_SPENT when it is closed, GRANT_REVOKED.
        """
        if self.state != "reserved":
            raise Refusal(RefusalCode.GRANT_SPENT, self.study)
        if self.grant != "consumed":
            raise Refusal(RefusalCode.GRANT_REVOKED, self.study)


def plan_of(db: sqlite3.Connection, study: str) -> Plan | None:
    """What is reserved for a study, or None."""
    row = db.execute(
        "SELECT p.id, p.study, p.state, ifnull(g.state, '') FROM plans p LEFT JOIN grants g ON g.id = p.granted"
        " WHERE p.study = ?",
        (study,),
    ).fetchone()
    return Plan(*row) if row else None


def counter(db: sqlite3.Connection) -> int:
    """The number of the last charge, known or forgotten."""
    last, forgotten = db.execute(
        "SELECT (SELECT ifnull(max(counter), 0) FROM charges), (SELECT ifnull(max(forgotten), 0) FROM ledger)"
    ).fetchone()
    return int(max(last, forgotten))


def doubt(db: sqlite3.Connection, mark: str) -> str:
    """Why the ledger cannot be relied on; "" when everything adds up.

    Args:
        mark: a fingerprint of the site's key of pseudonyms.
    """
    row = db.execute("SELECT pseudonyms, forgotten FROM ledger").fetchone()
    if row is None:
        return LOST
    if db.execute("SELECT 1 FROM patients LIMIT 1").fetchone() and row[0] != mark:
        return OTHER_KEY
    if slots := _uncharged(db):
        return f"{slots} noised answers were stored that no charge pays for; {LOST}"
    if not _gapless(db, row[1]):
        return f"charges are missing; {LOST}"
    for study, members, found in db.execute(
        "SELECT study, members, (SELECT count(*) FROM members WHERE plan = plans.id) FROM plans"
    ):
        if members != found:
            return f"patients of study {study[:16]} are missing; {LOST}"
    if db.execute("SELECT 1 FROM members WHERE patient NOT IN (SELECT id FROM patients)").fetchone():
        return f"patients' histories are missing; {LOST}"
    return "" if _adds_up(db) else f"patients' histories are not the sum of their studies; {LOST}"


def noised(db: sqlite3.Connection, study: str) -> bool:
    """Whether a study has noise. One that these records do not know may have had: then they are older than it."""
    row = db.execute("SELECT document FROM studies WHERE hash = ?", (study,)).fetchone()
    if row is None:
        return True
    privacy = Document.decode(bytes(row[0]), KIND).body.get("privacy")
    return isinstance(privacy, dict) and privacy.get("mode", "none") != "none"


def used(db: sqlite3.Connection, study: str) -> Counter[Role]:
    """Releases charged so far for a study, by the role that paid."""
    rows = db.execute("SELECT kind, sum(steps) FROM charges WHERE study = ? GROUP BY kind", (study,))
    return Counter({ROLE_OF[kind]: steps for kind, steps in rows})


def eligible(db: sqlite3.Connection, study: str) -> dict[str, Role]:
    """The frozen cohort of a study: pseudonym -> role; empty before the reservation."""
    return dict(
        db.execute(
            "SELECT t.pseudonym, m.role FROM plans p JOIN members m ON m.plan = p.id"
            " JOIN patients t ON t.id = m.patient WHERE p.study = ? ORDER BY t.pseudonym",
            (study,),
        ).fetchall()
    )


def price(db: sqlite3.Connection, plan: Plan, study: Study, slot: int, kind: str, round_: int) -> tuple[int, int]:
    """How many releases a slot costs that was not charged yet, and the slot that pays for them.

    Raises:
        Refusal: GRANT_SPENT when the plan holds no more of them.
    """
    role, steps = ROLE_OF[kind], 1
    if kind == "train" and study.privacy.mode == "per-site":
        row = db.execute(
            "SELECT slot FROM charges WHERE study = ? AND kind = 'train' AND round = ? AND steps > 0",
            (plan.study, round_),
        ).fetchone()
        if row is not None:
            return 0, int(row[0])
        steps = study.rounds.local_steps
    if used(db, plan.study)[role] + steps > parts(db, plan.id)[role].count:
        raise Refusal(RefusalCode.GRANT_SPENT, str(slot))
    return steps, slot


def parts(db: sqlite3.Connection, plan: int) -> dict[Role, Part]:
    """What a plan asks of each role."""
    rows = db.execute("SELECT role, unit, count FROM parts WHERE plan = ?", (plan,))
    return {role: Part(tuple(json.loads(unit)), count) for role, unit, count in rows}


def report(db: sqlite3.Connection, lifetime: Lifetime | None) -> dict[str, Any]:
    """Each study's releases by role (reserved, charged, left, and ε of what histories hold), and the lifetimes."""
    studies = []
    for plan, study, name, mode, state in db.execute("SELECT id, study, name, mode, state FROM plans ORDER BY id"):
        charged = used(db, study)
        held = dict(db.execute("SELECT role, held FROM parts WHERE plan = ?", (plan,)).fetchall())
        count = "SELECT {0}, count(*) FROM {1} WHERE {2} = ? GROUP BY {0}"
        studies.append(
            {
                "study": study,
                "name": name,
                "mode": mode,
                "state": state,
                "slots": dict(db.execute(count.format("kind", "charges", "study"), (study,)).fetchall()),
                "patients": dict(db.execute(count.format("role", "members", "plan"), (plan,)).fetchall()),
                "roles": {
                    role: {
                        "reserved": part.count,
                        "charged": charged[role],
                        "held": held[role],
                        "left": part.count - charged[role] if state == "reserved" else 0,
                        "epsilon": f"{budget.epsilon(part.of(held[role]), lifetime.delta):f}" if lifetime else "",
                    }
                    for role, part in parts(db, plan).items()
                },
            }
        )
    rows = db.execute("SELECT h.vector, count(*) FROM patients t JOIN histories h ON h.id = t.history GROUP BY h.id")
    counts = {tuple(json.loads(vector)): number for vector, number in rows}
    return {"studies": studies, "lifetime": distribution(counts, lifetime) if lifetime is not None else None}


def distribution(counts: Mapping[History, int], lifetime: Lifetime) -> dict[str, Any]:
    """How far lifetimes are spent, and how much room is left for a next study; plain values.

    Args:
        counts: history -> patients.

    Returns:
        `bins`: patients by tenth of the lifetime, the last one for what is spent wholly or beyond; `room`: the share of
        a lifetime that is free for an untouched patient, for one in the middle, and for the one charged most.
    """
    bins, shares = [0] * (BINS + 1), []
    for history, count in counts.items():
        share = budget.spent(history, lifetime)
        bins[min(BINS, int(share * BINS))] += count
        shares.append((share, count, history))
    shares.sort()
    total, passed, middle = sum(counts.values()), 0, (budget.spent(NOTHING, lifetime), 0, NOTHING)
    for entry in shares:
        passed += entry[1]
        if 2 * passed >= total:
            middle = entry
            break
    most = shares[-1] if shares else middle
    return {
        "epsilon": lifetime.epsilon,
        "delta": lifetime.delta,
        "order": lifetime.order,
        "patients": total,
        "bins": bins,
        "room": {
            name: {
                "free": round(max(0.0, float(1 - share)), 4),
                "spent_epsilon": f"{budget.epsilon(history, lifetime.delta, lifetime.order):f}",
            }
            for name, (share, _, history) in {
                "untouched": (budget.spent(NOTHING, lifetime), 0, NOTHING),
                "middle": middle,
                "most": most,
            }.items()
        },
    }


def _uncharged(db: sqlite3.Connection) -> int:
    """How many stored answers of noised studies no charge stands for; the hash outlives the bytes."""
    rows = db.execute(
        "SELECT s.study, count(*) FROM slots s LEFT JOIN charges c ON c.study = s.study AND c.slot = s.slot"
        " WHERE s.sha256 != '' AND c.slot IS NULL"
        " AND s.slot > ifnull((SELECT gone FROM plans WHERE study = s.study), 0) GROUP BY s.study"
    ).fetchall()
    return sum(count for study, count in rows if noised(db, study))


def _gapless(db: sqlite3.Connection, forgotten: int) -> bool:
    """Whether the charges since the last restored backup count on by one, beginning after `forgotten`."""
    count, highest = db.execute(
        "SELECT count(*), ifnull(max(counter), 0) FROM charges WHERE counter > ?", (forgotten,)
    ).fetchone()
    return bool(count == max(0, highest - forgotten))


def _adds_up(db: sqlite3.Connection) -> bool:
    """Whether every patient's history is the sum of what his studies hold; equal cases are added once."""
    held_of: dict[str, History] = {}
    for plan, role, unit, count, held in db.execute("SELECT plan, role, unit, count, held FROM parts"):
        held_of[f"{plan}:{role}"] = Part(tuple(json.loads(unit)), count).of(held)
    cases = db.execute(
        "SELECT DISTINCT h.vector, e.entries FROM patients t JOIN histories h ON h.id = t.history LEFT JOIN"
        " (SELECT patient, group_concat(plan || ':' || role, ' ') AS entries FROM"
        " (SELECT patient, plan, role FROM members ORDER BY patient, plan) GROUP BY patient) e ON e.patient = t.id"
    )
    for vector, entries in cases:
        total = NOTHING
        for entry in (entries or "").split():
            if entry not in held_of:
                return False
            total = budget.add(total, held_of[entry])
        if total != tuple(json.loads(vector)):
            return False
    return True
