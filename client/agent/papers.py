"""What has the privacy officer of this site signed? The pinned key, the allowances, the grants, as the agent has them.

Every paper is verified against the pinned key, is for this site, and has a higher serial than all before it. A grant
goes from `open` to `consumed` to `revoked`, never back (RULES B6).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from datetime import datetime

from privacy.budget import Lifetime
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.grants import Allowance, Claims, Grant, read, shortfalls
from privacy.identity import KEY, Document, fingerprint
from privacy.roster import timestamp


class Papers:
    """The officer's side of the ledger. Every method runs inside a transaction, or under the lock, of its caller."""

    def __init__(
        self, db: sqlite3.Connection, event: Callable[[str, str], None], now: Callable[[], datetime], site: str
    ) -> None:
        self._db, self._event, self._now, self._site = db, event, now, site

    def officer(self) -> str:
        """The pinned officer's public key, or ""."""
        row = self._db.execute("SELECT key FROM officer").fetchone()
        return str(row[0]) if row else ""

    def trust(self, key: str, *, replace: bool) -> None:
        """As `Purse.trust`."""
        if not KEY.match(key):
            raise ConsiliumError("This is not an officer's key", key[:80], "It is 64 hexadecimal digits.")
        pinned = self.officer()
        if pinned == key:
            return
        if pinned and not replace:
            raise ConsiliumError(
                "Another privacy officer is trusted here already",
                fingerprint(pinned),
                "Only when the officer has really changed: `consilium-site officer trust KEY --replace`.",
            )
        self._db.execute("UPDATE grants SET state = 'revoked' WHERE state = 'open'")
        self._db.execute("INSERT OR REPLACE INTO officer VALUES (1, ?, ?)", (key, timestamp(self._now())))
        self._event("", f"privacy officer trusted: {fingerprint(key)}")

    def take(self, data: bytes) -> tuple[str, str]:
        """As `Purse.take`."""
        officer = self.officer()
        if not officer:
            raise ConsiliumError(
                "No privacy officer is trusted here yet", self._site, "First: `consilium-site officer trust KEY`."
            )
        paper, document = read(data.strip(), officer)
        if paper.site != self._site:
            raise ConsiliumError(
                f"The {paper.KIND} is for another hospital", paper.site, f"Ask the officer for one for {self._site}."
            )
        if isinstance(paper, Allowance):
            return paper.KIND, self._take_allowance(paper, document.encode(), officer)
        return paper.KIND, self._take_grant(paper, document.encode(), officer)

    def revoke(self, study: str) -> None:
        """As `Purse.revoke`."""
        ended = self._db.execute("UPDATE grants SET state = 'revoked' WHERE study = ? AND state != 'revoked'", (study,))
        if ended.rowcount == 0:
            raise ConsiliumError(
                "The study has no grant that could be revoked", study[:16], "`consilium-site budget` lists them."
            )
        self._event(study, "the privacy officer's grant is revoked")

    def lifetime(self) -> Lifetime | None:
        """The lifetime budget of the newest allowance."""
        row = self._db.execute(
            "SELECT document FROM allowances WHERE officer = ? ORDER BY id DESC LIMIT 1", (self.officer(),)
        ).fetchone()
        return Allowance.of(Document.decode(bytes(row[0]), Allowance.KIND)).lifetime if row else None

    def covering(self, claims: Claims) -> int:
        """The id of the open grant that covers a plan now.

        Raises:
            Refusal: NO_GRANT.
        """
        officer = self.officer()
        row = self._db.execute(
            "SELECT id, document FROM grants WHERE study = ? AND state = 'open' AND officer = ?",
            (claims.study, officer),
        ).fetchone()
        if row is None:
            raise Refusal(RefusalCode.NO_GRANT, claims.study)
        grant = Grant.verified(Document.decode(bytes(row[1]), Grant.KIND), officer)
        if grant.site != self._site or grant.expired(self._now()) or shortfalls(grant, claims):
            raise Refusal(RefusalCode.NO_GRANT, claims.study)
        return int(row[0])

    def lacking(self, claims: Claims) -> list[str]:
        """As `Purse.lacking`."""
        if not self.officer():
            return [
                "No privacy officer is trusted here yet: `consilium-site officer trust officer.pub`, then import the "
                "allowance and the grant that this officer writes."
            ]
        found = []
        if self.lifetime() is None:
            found.append(
                "The privacy officer's allowance is missing: the officer writes it with `consilium-officer allow`; "
                "here: `consilium-site grant import FILE`."
            )
        try:
            self.covering(claims)
        except Refusal:
            newest = [grant for grant, state in self.grants() if grant.study == claims.study and state == "open"]
            short = "; ".join(shortfalls(newest[-1], claims)) or "it has expired" if newest else ""
            trouble = f"does not cover it ({short})" if short else "is missing"
            found.append(
                f"The privacy officer's grant for this study {trouble}: the officer writes it with `consilium-officer "
                "grant`; here: `consilium-site grant import FILE`."
            )
        return found

    def digest(self, grant: int) -> str:
        """The digest of a grant by its id, 64 hex digits."""
        row = self._db.execute("SELECT document FROM grants WHERE id = ?", (grant,)).fetchone()
        return Document.decode(bytes(row[0]), Grant.KIND).digest

    def digests(self, study: str) -> set[str]:
        """As `Purse.digests`."""
        rows = self._db.execute("SELECT document FROM grants WHERE study = ?", (study,)).fetchall()
        return {Document.decode(bytes(data), Grant.KIND).digest for (data,) in rows}

    def consume(self, grant: int) -> None:
        """A plan runs on this grant now; it serves no second time."""
        self._db.execute("UPDATE grants SET state = 'consumed' WHERE id = ?", (grant,))

    def grants(self) -> list[tuple[Grant, str]]:
        """Every grant with its state, in the order in which they came."""
        rows = self._db.execute("SELECT document, state FROM grants ORDER BY id").fetchall()
        return [(Grant.of(Document.decode(bytes(data), Grant.KIND)), state) for data, state in rows]

    def _take_allowance(self, paper: Allowance, data: bytes, officer: str) -> str:
        words = f"serial {paper.serial}: epsilon {paper.epsilon} at delta {paper.delta}, decided at order {paper.order}"
        if not self._newer("allowances", paper, data, officer):
            return words + (
                "" if paper.lifetime == self.lifetime() else "; a newer one is here already, and that counts"
            )
        touched, fixed = self._db.execute("SELECT 1 FROM plans WHERE members > 0").fetchone(), self._order()
        if touched and fixed and fixed != paper.order:
            raise ConsiliumError(
                "The order of a lifetime budget cannot change once patients were charged",
                f"{fixed} here, {paper.order} in the allowance",
                f"Ask the officer for one at order {fixed}.",
            )
        self._db.execute(
            "INSERT INTO allowances (officer, serial, document) VALUES (?, ?, ?)", (officer, paper.serial, data)
        )
        self._event("", f"allowance {paper.serial} taken")
        words += self._settle(paper.settles)
        histories = self._db.execute(
            "SELECT h.vector, count(*) FROM patients t JOIN histories h ON h.id = t.history GROUP BY h.id"
        )
        lifetime = paper.lifetime
        above = sum(count for vector, count in histories if json.loads(vector)[lifetime.at] > lifetime.room)
        return words + (f"; {above} patients have more than that reserved already, and get no more" if above else "")

    def _settle(self, code: str) -> str:
        """End the doubt of this code; what came of it, in words."""
        row = self._db.execute("SELECT trouble FROM ledger").fetchone()
        doubt = str(row[0]) if row else ""
        if code and code == doubt:
            self._db.execute("UPDATE ledger SET trouble = ''")
            self._event("", f"the privacy officer has settled the doubt {code}")
            return "; the doubt about the ledger is settled"
        return f"; the doubt about the ledger stays: the officer settles it with `--settle {doubt}`" if doubt else ""

    def _take_grant(self, paper: Grant, data: bytes, officer: str) -> str:
        words = f"serial {paper.serial}: study {paper.study}, epsilon {paper.epsilon}, {paper.slots} slots"
        row = self._db.execute("SELECT state FROM grants WHERE document = ?", (data,)).fetchone()
        if row is not None and row[0] != "open":
            raise ConsiliumError(
                "This grant was used or revoked here before",
                f"serial {paper.serial}",
                "A grant serves once; ask the officer for a new one.",
            )
        if not self._newer("grants", paper, data, officer):
            return words
        if paper.expired(self._now()):
            raise ConsiliumError("The grant has expired", paper.expires, "Ask the officer for a new one.")
        plan = self._db.execute("SELECT state FROM plans WHERE study = ?", (paper.study,)).fetchone()
        if plan is not None and plan[0] != "reserved":
            raise ConsiliumError(
                "The study is closed in this site's ledger",
                paper.study[:16],
                "A closed plan never runs again; ask for a new study.",
            )
        self._db.execute("UPDATE grants SET state = 'revoked' WHERE study = ? AND state = 'open'", (paper.study,))
        self._db.execute(
            "INSERT INTO grants (officer, serial, study, document, state) VALUES (?, ?, ?, ?, 'open')",
            (officer, paper.serial, paper.study, data),
        )
        self._event(paper.study, f"grant {paper.serial} taken")
        return words

    def _order(self) -> int:
        """The order of the newest allowance, of whichever officer (RULES B3); 0 when there is none."""
        row = self._db.execute("SELECT document FROM allowances ORDER BY id DESC LIMIT 1").fetchone()
        return Allowance.of(Document.decode(bytes(row[0]), Allowance.KIND)).order if row else 0

    def _newer(self, table: str, paper: Allowance | Grant, data: bytes, officer: str) -> bool:
        """Whether a paper is new; False for the one that is held already."""
        if self._db.execute(f"SELECT 1 FROM {table} WHERE document = ?", (data,)).fetchone():  # noqa: S608  our names
            return False
        found = self._db.execute(f"SELECT max(serial) FROM {table} WHERE officer = ?", (officer,))  # noqa: S608
        last = found.fetchone()[0]
        if last is not None and paper.serial <= last:
            raise ConsiliumError(
                f"The officer has written a newer {paper.KIND} that is here already",
                f"serial {paper.serial} after {last}",
                "Papers are imported in the order of their serials; ask the officer for a new one.",
            )
        return True
