"""What does this site write into, and believe of, the consortium's log? Its own releases, and heads that hold them.

Every noised release is signed with the site's own gapless number before a byte of it leaves, and handed in with the
answer, together with earlier ones that no cosigned head has shown yet. The site cosigns a head only when it continues
the last one; when a release of its own is missing for more than `PATIENCE` slots, nothing noised leaves (RULES B7).
What the log says was reserved is held against the study approved here and the papers of the site's own officer. The
state (`privacy.witness`) is durable in the transaction that keeps the answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime

from client.agent.policy import Site
from client.agent.purse import Purse
from client.agent.store import Store
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.identity import Document, Identity
from privacy.ledger import Reserve, Step
from privacy.ledger_codes import LedgerCode, LedgerRefusal
from privacy.proposal import Proposal
from privacy.reservation import differences
from privacy.study import KIND, Study
from privacy.witness import Witness, WrongEntry

PATIENCE = 30
"""k of RULES B7, in slots; the coordinator asks for cosignatures far more often."""
STEPS = "steps"
"""Under which an answer carries the releases it hands in."""


class Logbook:
    """One agent as a witness of its consortium's log."""

    def __init__(self, store: Store, identity: Identity, here: Site, now: Callable[[], datetime], purse: Purse) -> None:
        self._store, self._identity, self._here, self._now, self._purse = store, identity, here, now, purse
        self.turn = threading.Lock()
        """Held from reading the state to its being durable: by `cosign`, and by who calls `released`."""

    def check(self, study: str, slot: int) -> None:
        """Whether the site may go on to this slot.

        Raises:
            Refusal: LEDGER when a release of its own has been missing in the log for too long, or the log says
                something untrue of the study, or that it is over.
        """
        try:
            self._state().check(PATIENCE, study=study, slot=slot)
        except LedgerRefusal as refusal:
            raise Refusal(RefusalCode.LEDGER, str(slot)) from refusal

    def released(self, study: str, slot: int, request: str, release: str) -> tuple[bytes, str]:
        """Sign a release that is on the disk and about to leave; the caller holds `turn` until the state is kept.

        Args:
            release: SHA-256 of its bytes.

        Returns:
            The state to keep with the answer, and the releases to hand in, one JSON text to a line.

        Raises:
            Refusal: LEDGER when the log's numbers say that these records are old, or as `check`.
        """
        try:
            state, _ = self._state().step(self._identity, study, slot, request, release)
        except LedgerRefusal as refusal:
            raise Refusal(RefusalCode.LEDGER, str(slot)) from refusal
        return state.encode(), _held(state, study)

    def cosign(self, study: str, payload: bytes) -> dict[str, str]:
        """The cosignature of a proposed head, durable before it is returned, or the size to begin from.

        Either comes with the releases of `study` that no head was shown to hold.

        Raises:
            Refusal: MALFORMED, TOO_LARGE, BAD_SIGNATURE; LEDGER when the log does not tell the truth.
        """
        proposal = Proposal.decode(payload)
        with self.turn:
            state = self._state()
            try:
                known, signature = state.cosign(
                    self._identity, proposal, int(self._now().timestamp()), self._judge, PATIENCE
                )
            except LedgerRefusal as refusal:
                if refusal.code is LedgerCode.OTHER_START:
                    return {"size": str(state.size), **_handed_in(state, study)}
                self._store.note("", f"the consortium's log was not cosigned: {refusal}")
                if isinstance(refusal, WrongEntry):
                    self._store.keep_witness(refusal.state.encode())
                    self._store.note(refusal.study, f"nothing more is released for it: {refusal}")
                if refusal.code is LedgerCode.STATE_LOST:
                    self._forget(state.recovered(self._identity.public, proposal))
                raise Refusal(RefusalCode.LEDGER) from refusal
            self._store.keep_witness(known.encode())
        self._tell_missing(state, known, proposal)
        return {"cosignature": signature.line, **_handed_in(known, study)}

    def ended(self) -> dict[str, bool]:
        """The studies that the log was shown to have closed, and whether by COMMIT; nothing is released for them."""
        return {study: found.end == "committed" for study, found in self._state().standings.items() if found.end}

    def _judge(self, reserve: Reserve) -> list[str] | None:
        """What a RESERVE says otherwise than the study approved here and its officer's grant."""
        row = self._store.study(reserve.study)
        if row is None:
            return None
        try:
            wrong = differences(Study.from_body(Document.decode(row.document, KIND).body), reserve)
        except ConsiliumError as error:
            return [error.what]
        if reserve.grants.get(self._here.name) not in self._purse.digests(reserve.study):
            wrong.append("the grant of this site's officer")
        return wrong

    def _tell_missing(self, before: Witness, known: Witness, proposal: Proposal) -> None:
        """Tell the operator of releases that can never come into the log, because their study was closed there."""
        kept = {leaf.hash for _, leaf in known.pending}
        for _, leaf in before.pending:
            if leaf.hash not in kept and proposal.shows(leaf) is None:
                step = leaf.entry
                assert isinstance(step, Step)
                self._store.note(step.study, f"slot {step.slot}: the log was closed without this site's release of it")

    def _forget(self, recovered: Witness) -> None:
        """These records are older than a head that this site cosigned: a restored backup (RULES S3).

        What was chosen and charged since is not known, so every session's keys are destroyed, open slots are spent, and
        the purse stays shut until the officer has written a new allowance. Then the site goes on from that head.
        """
        for row in self._store.studies():
            self._store.start_over(row.hash, "these records are older than the common log")
        self._purse.never_below(self._purse.counter() + 1)
        self._store.keep_witness(recovered.encode())

    def _state(self) -> Witness:
        held = self._store.witness()
        if held:
            return Witness.decode(held)
        return Witness(self._here.name, self._here.consortium, self._here.coordinator)


def _held(state: Witness, study: str) -> str:
    """The releases of a study that no head was shown to hold, one JSON text to a line."""
    return "\n".join(leaf.data.decode() for _, leaf in state.pending if leaf.entry.study == study)


def _handed_in(state: Witness, study: str) -> dict[str, str]:
    held = _held(state, study)
    return {STEPS: held} if held else {}
