"""What has each patient still to spend, and who allowed it? The hospital's own ledger, which never leaves the site.

A study with noise needs the officer's allowance and grant. Its first reservation freezes who is eligible: each patient
by his own history, and the whole plan is charged to him at once, whatever will be used (RULES B1). From then on a slot
is charged before it is computed. All of it is on the disk before a method returns, or has not happened (RULES S3).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import sqlite3
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from decimal import Decimal
from typing import Any

from client.agent import histories, purse_audit
from client.agent.papers import Papers
from client.agent.purse_audit import Plan
from privacy import budget
from privacy.accounting import Role
from privacy.budget import NOTHING, Part
from privacy.charge import Charge
from privacy.errors import Refusal, RefusalCode
from privacy.grants import Claims
from privacy.roster import timestamp
from privacy.study import Study

RESTORED = (
    "these records were restored from a backup: studies begun since then are forgotten; what was reserved counts as "
    "spent, and once it is known what is missing, the officer writes a new allowance with `--settle {code}`"
)
UNCHECKED = "the ledger has not been checked since the agent started"
_LABEL = b"consilium/v1/ledger\0pseudonyms"


class Purse:
    """The part of the store that holds patients' budgets; its transactions are the store's own.

    Raises (any method that changes something):
        Refusal: DISK_FULL or BUSY, as the store; then nothing was changed.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        lock: threading.RLock,
        transaction: Callable[[], AbstractContextManager[None]],
        event: Callable[[str, str], None],
        shut: Callable[[str], None],
        now: Callable[[], datetime],
        site: str,
    ) -> None:
        self._db, self._lock, self._transaction, self._event, self._shut = db, lock, transaction, event, shut
        self._now, self._site, self._doubt = now, site, UNCHECKED
        self._papers = Papers(db, event, now, site)
        self._claims: dict[str, Claims] = {}

    # ---- the officer and the officer's papers ----------------------------------------------------------------

    def officer(self) -> str:
        """The pinned officer's public key, or ""."""
        with self._lock:
            return self._papers.officer()

    def trust(self, key: str, *, replace: bool = False) -> None:
        """Pin the privacy officer's key. With `replace`, another officer's open grants end; begun studies go on.

        Raises:
            ConsiliumError: not a key, or another one is pinned.
        """
        with self._transaction():
            self._papers.trust(key, replace=replace)

    def take(self, data: bytes) -> tuple[str, str]:
        """Take an allowance or a grant; returns its kind, and what it says in words.

        A new allowance that names the code of the doubt about a restored backup also settles that: it is the officer's
        word on it, and was not signed before.

        Raises:
            Refusal: TOO_LARGE, MALFORMED or BAD_SIGNATURE.
            ConsiliumError: no officer is trusted, another site's paper, an old or used one, another order.
        """
        with self._transaction():
            return self._papers.take(data)

    def revoke(self, study: str) -> None:
        """End the grant of a study, spend its open slots and destroy its keys, all at once (RULES B6).

        What is being computed can then not be kept, and what was kept is gone; what was charged stays charged. Through
        `client.agent.gate`, so that nothing is half way out meanwhile.

        Raises:
            ConsiliumError: it has none, or none any more.
        """
        with self._transaction():
            self._papers.revoke(study)
            self._shut(study)

    # ---- reserving and charging ------------------------------------------------------------------------------

    def reserve(self, study: Study, members: Mapping[str, Role]) -> None:
        """Reserve the whole plan for every patient who can bear it, once; later calls change nothing.

        A patient whose own history has no room is left out, silently: nothing that leaves depends on how many there
        were. One who appears later is not in; one who is gone from the disk stays charged (RULES B1).

        Args:
            study: with noise.
            members: pseudonym -> role, of every patient the site has for the study.

        Raises:
            Refusal: NO_GRANT, GRANT_REVOKED, GRANT_SPENT (closed), BUDGET_SPENT (by public constants alone), LEDGER.
            ConsiliumError: the study has no noise.
        """
        asked, claims = budget.plan(study), self._claimed(study)
        with self._transaction():
            self._sound()
            known = self._plan(study.hash)
            if known is not None and known.grant == "revoked":
                self._renew(known, claims)
            elif known is not None:
                known.check_running()
            else:
                self._reserve(study, members, asked, claims)

    def lacking(self, study: Study) -> list[str]:
        """Which of the officer's papers a study with noise waits for, and what to do; nothing once it has begun."""
        claims = self._claimed(study)
        with self._lock:
            return [] if self._plan(study.hash) is not None else self._papers.lacking(claims)

    def granted(self, study: Study) -> str:
        """The digest of the grant that a study runs on here, or would; nothing is changed.

        Raises:
            Refusal: NO_GRANT, GRANT_REVOKED, GRANT_SPENT, LEDGER.
        """
        claims = self._claimed(study)
        with self._lock:
            self._sound()
            known = self._plan(study.hash)
            if known is None:
                return self._papers.digest(self._papers.covering(claims))
            if known.grant == "revoked":
                return self._papers.digest(self._anew(known, claims))
            known.check_running()
            row = self._db.execute("SELECT granted FROM plans WHERE study = ?", (study.hash,)).fetchone()
            return self._papers.digest(row[0])

    def check_grant(self, study: Study) -> None:
        """Whether anything of a study may leave as far as its grant goes; one that has not begun has nothing to leave.

        Raises:
            Refusal: GRANT_REVOKED when the grant that it began on was revoked, and no new one is here.
        """
        with self._lock:
            known = self._plan(study.hash)
            if known is not None and known.grant == "revoked":
                self._anew(known, self._claimed(study))

    def digests(self, study: str) -> set[str]:
        """The digests of all grants that this site was ever given for a study, used or revoked ones too."""
        with self._lock:
            return self._papers.digests(study)

    def closed(self, study: str) -> bool:
        """Whether the study is closed here for good, so that nothing can be charged for it any more."""
        with self._lock:
            plan = self._plan(study)
        return plan is not None and plan.state != "reserved"

    def eligible(self, study: str) -> dict[str, Role]:
        """The frozen cohort: pseudonym -> role; empty before the reservation."""
        with self._lock:
            return purse_audit.eligible(self._db, study)

    def charge(self, study: Study, slot: int, kind: str, round_: int, request: str) -> Charge:
        """Charge one slot of a reserved study to all its patients of the role; on the disk before it returns.

        The same request again is the same charge (compute again; nothing had left, RULES S3). `shared`: every training
        slot is one step. `per-site`: a round is all its steps once; a further slot for it is free, has a counter of its
        own, and is not fresh: only the update that was noised before may be masked again (RULES B2). An evaluation
        costs each time.

        Args:
            kind: train, validate or test.
            request: hash of the whole request.

        Raises:
            Refusal: NO_GRANT (not reserved), GRANT_REVOKED, GRANT_SPENT, SLOT_LIMIT, SLOT_BOUND, LEDGER.
        """
        name = study.hash  # a whole encoding of the study: once
        with self._transaction():
            self._sound()
            plan = self._plan(name)
            if plan is None:
                raise Refusal(RefusalCode.NO_GRANT, name)
            plan.check_running()
            if not 1 <= slot <= study.slots:
                raise Refusal(RefusalCode.SLOT_LIMIT, str(slot))
            row = self._db.execute(
                "SELECT request, kind, round, steps, paid, counter FROM charges WHERE study = ? AND slot = ?",
                (name, slot),
            ).fetchone()
            fresh = row is None
            if row is None:
                steps, paid = purse_audit.price(self._db, plan, study, slot, kind, round_)
                row = (request, kind, round_, steps, paid, self._counter() + 1)
                self._db.execute(
                    "INSERT INTO charges (study, slot, request, kind, round, steps, paid, counter)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (name, slot, *row),
                )
            if row[:3] != (request, kind, round_):
                raise Refusal(RefusalCode.SLOT_BOUND, str(slot))
            steps, paid, counter = row[3:]
            if paid != slot and not self.answered(name, round_):
                paid = slot  # what was paid for was never stored, so nothing has left: compute it under this slot (S3)
        return Charge(name, slot, kind, round_, paid, counter, fresh and steps > 0)

    def answered(self, study: str, round_: int) -> bool:
        """Whether noised numbers of this training round were ever stored to leave. Then, with per-site noise, only the
        update that was kept may leave again; if that is lost, the round is over (RULES B2, S3)."""
        with self._lock:
            row = self._db.execute(
                "SELECT 1 FROM charges c JOIN slots s ON s.study = c.study AND s.slot = c.slot"
                " WHERE c.study = ? AND c.kind = 'train' AND c.round = ? AND s.sha256 != ''",
                (study, round_),
            ).fetchone()
        return row is not None

    def settle(self, study: str, committed: bool) -> None:
        """Close a plan for good (COMMIT or ABORT) and give back what no slot used; it never runs again (RULES B2).

        Only for a study whose open slots the agent has closed for good. Twice is once.
        """
        state = "committed" if committed else "aborted"
        with self._transaction():
            self._sound()
            plan = self._plan(study)
            if plan is None:
                self._close_unbegun(study)
            elif plan.state == "reserved":
                histories.give_back(self._db, plan.id, purse_audit.used(self._db, study))
                self._db.execute("UPDATE plans SET state = ? WHERE id = ?", (state, plan.id))
            else:
                return
            self._event(study, f"the privacy ledger closed the study: {state}")

    # ---- is it whole? ----------------------------------------------------------------------------------------

    def verify_whole(self, key: bytes) -> None:
        """Add everything up again; nothing is reserved or charged until this has passed once (RULES B1).

        Args:
            key: the site's key of pseudonyms; with another one every patient would begin anew.

        Raises:
            Refusal: LEDGER; `trouble` says why.
        """
        mark = hmac.new(key, _LABEL, hashlib.sha256).hexdigest()
        with self._transaction():
            self._doubt = purse_audit.doubt(self._db, mark)
            if not self._doubt:
                self._db.execute("UPDATE ledger SET pseudonyms = ?", (mark,))
        if self._doubt:
            raise Refusal(RefusalCode.LEDGER)

    def trouble(self) -> str:
        """What is wrong with the ledger, in words; "" when nothing is."""
        with self._lock:
            row = self._db.execute("SELECT trouble FROM ledger").fetchone()
        return self._doubt or (purse_audit.LOST if row is None else RESTORED.format(code=row[0]) if row[0] else "")

    def counter(self) -> int:
        """How many charges this site has made; the number of the last."""
        with self._lock:
            return self._counter()

    def hold_against(self, study: str, slot: int) -> None:
        """Hold the ledger against the highest slot of a study that the site's journal knows to have left.

        A noised slot that left was charged before. A ledger that does not know the charge is older: a restored backup.
        """
        if slot < 1 or not purse_audit.noised(self._db, study):
            return
        with self._transaction():
            plan = self._plan(study)
            known = self._db.execute(
                "SELECT max(ifnull(max(c.slot), 0), ifnull(max(p.gone), 0)) FROM plans p LEFT JOIN charges c"
                " ON c.study = p.study WHERE p.study = ?",
                (study,),
            ).fetchone()[0]
            if slot <= (known or 0):
                return
            if plan is None:
                self._close_unbegun(study)
            self._db.execute("UPDATE plans SET gone = ? WHERE study = ?", (slot, study))
            self._restored(study)

    def never_below(self, counter: int) -> None:
        """Hold the ledger against the highest of this site's own counters that anybody else holds (RULES S3, B7)."""
        with self._transaction():
            if counter > self._counter():
                self._db.execute("UPDATE ledger SET forgotten = ?", (counter,))
                self._restored("")

    def report(self) -> dict[str, Any]:
        """Everything `budget` shows, plain values. Numbers of patients are in it: it stays at the site."""
        with self._lock:
            return {
                "site": self._site,
                "officer": self._papers.officer(),
                "trouble": self.trouble(),
                "counter": self._counter(),
                "grants": [{**grant.body(), "state": state} for grant, state in self._papers.grants()],
                **purse_audit.report(self._db, self._papers.lifetime()),
            }

    # ---- inside a transaction --------------------------------------------------------------------------------

    def _sound(self) -> None:
        if self.trouble():
            raise Refusal(RefusalCode.LEDGER)

    def _claimed(self, study: Study) -> Claims:
        if study.hash not in self._claims:
            self._claims[study.hash] = Claims.of(study)
        return self._claims[study.hash]

    def _plan(self, study: str) -> Plan | None:
        return purse_audit.plan_of(self._db, study)

    def _anew(self, plan: Plan, claims: Claims) -> int:
        """The id of the new grant that a revoked study would go on with."""
        if plan.state != "reserved":
            raise Refusal(RefusalCode.GRANT_SPENT, claims.study)
        try:
            return self._papers.covering(claims)
        except Refusal as refusal:
            raise Refusal(RefusalCode.GRANT_REVOKED, claims.study) from refusal

    def _renew(self, plan: Plan, claims: Claims) -> None:
        """Go on with a revoked study on a new grant: the same reservation, and no slot more."""
        granted = self._anew(plan, claims)
        self._db.execute("UPDATE plans SET granted = ? WHERE id = ?", (granted, plan.id))
        self._papers.consume(granted)
        self._event(claims.study, "goes on with a new grant")

    def _reserve(self, study: Study, members: Mapping[str, Role], asked: Mapping[Role, Part], claims: Claims) -> None:
        granted, lifetime = self._papers.covering(claims), self._papers.lifetime()
        if lifetime is None:
            raise Refusal(RefusalCode.NO_GRANT, study.hash)
        delta = Decimal(lifetime.delta)
        if claims.delta > delta or delta * study.privacy.patients_bound >= 1:  # RULES B5
            raise Refusal(RefusalCode.NO_GRANT, study.hash)
        if not all(budget.fits(NOTHING, part.whole, lifetime) for part in asked.values()):
            raise Refusal(RefusalCode.BUDGET_SPENT, study.hash)
        plan = self._db.execute(
            "INSERT INTO plans (study, name, mode, state, granted, members, at) VALUES (?, ?, ?, 'reserved', ?, 0, ?)",
            (study.hash, study.study.name, study.privacy.mode, granted, timestamp(self._now())),
        ).lastrowid
        self._db.executemany(
            "INSERT INTO parts (plan, role, unit, count, held) VALUES (?, ?, ?, ?, ?)",
            [(plan, role, json.dumps(part.unit), part.count, part.count) for role, part in asked.items()],
        )
        histories.admit(self._db, plan or 0, members, asked, lifetime)
        self._papers.consume(granted)
        self._event(study.hash, "the plan is reserved in the privacy ledger")

    def _counter(self) -> int:
        return purse_audit.counter(self._db)

    def _close_unbegun(self, study: str) -> None:
        """A tombstone for a study that never reserved anything."""
        self._db.execute(
            "INSERT INTO plans (study, name, mode, state, members, at) VALUES (?, '', '', 'aborted', 0, ?)",
            (study, timestamp(self._now())),
        )
        self._db.execute("UPDATE grants SET state = 'revoked' WHERE study = ? AND state = 'open'", (study,))

    def _restored(self, study: str) -> None:
        """Count every open reservation as spent, and stop until the officer has written a new allowance."""
        self._db.execute("UPDATE plans SET state = 'aborted' WHERE state = 'reserved'")
        code = secrets.token_hex(8)
        self._db.execute("UPDATE ledger SET trouble = ?", (code,))
        self._event(study, RESTORED.format(code=code))
