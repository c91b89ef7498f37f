"""What does the consortium's log learn of a study with noise? Reserve, every release, and the end; and who has seen it.

RESERVE stands before the first slot, with every site's grant. A release is written down when a site's answer brings it,
which is before its vector counts. Every `EVERY` slots the sites are asked to cosign a new head, and hand in what they
still hold; what is not cosigned is asked for again, and a site that finds its own releases missing, or something else
reserved than it approved, stops by itself (RULES B7).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

from privacy import reservation
from privacy.canonical import sha256
from privacy.checkpoint import NoteSignature
from privacy.errors import Refusal, RefusalCode
from privacy.identity import Identity
from privacy.ledger import Commit, Entry, Leaf, Step
from privacy.ledger_codes import LedgerRefusal
from server.attempt import LOST_PAUSE
from server.desk import Call, Desk, Said, words
from server.ledger import Ledger
from server.members import Members

EVERY = 10
"""Slots between two heads that the sites are asked to cosign."""
PATIENCE_SECONDS = 60
STEPS = "steps"


class Books:
    """The log, as one run of one study writes it."""

    def __init__(
        self,
        ledger: Ledger,
        identity: Identity,
        desk: Desk,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Take the log up for one run.

        Args:
            note: told, in words, what the coordinator should know.
        """
        self._ledger, self._identity, self._desk, self._note = ledger, identity, desk, note
        self._since: dict[str, int] = {}  # what a site cosigned last; it says so itself when it is asked first
        self._witnessed = 0

    def begin(self, members: Members, minimum: int, obey: Callable[[], None]) -> str:
        """Before the first slot: open the session at every site, and write RESERVE with the grants they name.

        RESERVE is written once, and whoever is not in it takes no part for good: not before enough sites are in it.

        Args:
            minimum: how many sites that is.

        Returns:
            Why it is not written yet; "" when it is.
        """
        if (account := self._ledger.account(self._desk.record.hash)) is not None:
            members.reserved = frozenset(account.reserve.grants)
            return ""

        def wanted() -> dict[str, Call]:
            calls = {site: members.preparation(site) for site in members.ready()}
            return {site: call for site, call in calls.items() if call is not None}

        refused: dict[str, str] = {}

        def hear(said: Said) -> float:
            code = members.hear(said)
            if code and not said.lost:
                refused[said.site] = code
            return LOST_PAUSE

        self._desk.canvass(wanted, hear, lambda: set(wanted()) <= set(refused), PATIENCE_SECONDS, obey)
        missing = sorted(set(self._desk.record.study.sites) - set(members.grants))
        why = {
            site: words(refused[site]).lower() if site in refused else "it has not opened the session"
            for site in missing
        }
        if len(members.grants) < minimum:
            named = "; ".join(f"{site}: {why[site]}" for site in missing)
            return f"waiting for grants of the officers of at least {minimum} sites ({named})"
        for site in missing:
            self._note(f"{site} takes no part, because no grant of its officer is at hand: {why[site]}")
        self.reserve(members.grants)
        members.reserved = frozenset(members.grants)
        return ""

    def reserve(self, grants: Mapping[str, str]) -> None:
        """Write the whole plan down, once, with the digest of each site's grant."""
        self._ledger.append([Leaf.of(reservation.reserve(self._desk.record.study, grants))])

    def hear(self, said: Said) -> None:
        """Write down the releases that an answer brings, before its vector is used.

        Raises:
            Refusal: LEDGER when there is none for this very answer, or one that is not the site's next; BAD_SIGNATURE.
        """
        assert said.answer is not None
        try:
            newest = self._take(said)
        except LedgerRefusal as refusal:
            raise Refusal(RefusalCode.LEDGER, said.site) from refusal
        named = (newest.slot, newest.request, newest.release) if isinstance(newest, Step) else None
        if named != (said.answer.slot, said.answer.request, said.answer.payload_sha256):
            raise Refusal(RefusalCode.LEDGER, said.site)

    def witness(self, sites: set[str], slot: int, obey: Callable[[], None], *, now: bool = False) -> int:
        """Ask the sites to cosign a new head, when it is time; returns how many did.

        Args:
            sites: who is asked.
            now: whether it is time, whatever the slot.
        """
        if not now and slot - self._witnessed < EVERY:
            return 0
        self._witnessed = slot
        note = self._ledger.checkpoint(self._identity)
        todo, signed, calls = set(sites), set[str](), dict[str, Call]()

        def wanted() -> dict[str, Call]:
            for site in todo - set(calls):
                calls[site] = self._call(site)
            return {site: calls[site] for site in todo}

        def hear(said: Said) -> float:
            if said.lost:
                return LOST_PAUSE
            if said.answer is None or said.answer.status == "refused" or said.site not in todo:
                todo.discard(said.site)
                return 0.0
            with suppress(Refusal, LedgerRefusal):  # of a site that lies; its vectors need a release of their own
                self._take(said)
            if "size" in said.answer.detail and said.site not in self._since:
                self._since[said.site] = int(said.answer.detail["size"])
                del calls[said.site]
                return 0.0
            todo.discard(said.site)
            if self._cosigned(said, note.checkpoint.size):
                signed.add(said.site)
            return 0.0

        self._desk.canvass(wanted, hear, lambda: all(self._desk.lost(s) for s in todo), PATIENCE_SECONDS, obey)
        return len(signed)

    def close(self, sites: set[str], slots: int, obey: Callable[[], None]) -> None:
        """The study is done: take in the releases that sites still hold, write COMMIT, and ask for cosignatures of it.

        Args:
            sites: who is asked.
            slots: how many were opened. A site may have signed a release for the last of them that nobody waited for.
        """
        account = self._ledger.account(self._desk.record.hash)
        if account is not None and account.open:
            self.witness(sites, 0, obey, now=True)
            account = self._ledger.account(self._desk.record.hash)
            used = max(slots, account.slots_used if account is not None else 0)
            self._ledger.append([Leaf.of(Commit(study=self._desk.record.hash, slots_used=used))])
        self.witness(sites, 0, obey, now=True)

    def _take(self, said: Said) -> Entry | None:
        """Write down every release that an answer brings; returns the last of them."""
        assert said.answer is not None
        key, lines = self._desk.roster.site(said.site).identity, said.answer.detail.get(STEPS, "").splitlines()
        for line in lines:
            self._ledger.take(line.encode(), [key])
        return Leaf.read(lines[-1].encode()).entry if lines else None

    def _call(self, site: str) -> Call:
        payload = self._ledger.proposal(site, self._since.get(site, 0), study=self._desk.record.hash).encode()
        document = self._desk.sign(
            "witness",
            cohort=self._desk.record.study.sites,
            payload=payload,
            payload_sha256=sha256(payload),
            seconds=PATIENCE_SECONDS,
        )
        return Call.of(document, payload)

    def _cosigned(self, said: Said, size: int) -> bool:
        assert said.answer is not None
        try:
            signature = NoteSignature.read(said.answer.detail.get("cosignature", ""))
            self._ledger.add_cosignature(size, said.site, signature, self._desk.roster.site(said.site).identity)
        except (Refusal, LedgerRefusal):
            return False
        self._since[said.site] = size
        return True
