"""What does this site write into, and believe of, the consortium's log? Its own releases, and heads that hold them.

Every noised release is signed with the site's own gapless number before a byte of it leaves, and handed in with the
answer, together with earlier ones that no cosigned head has shown yet. The site cosigns a head only when it continues
the last one; when a release of its own is missing for more than `PATIENCE` slots, nothing noised leaves (RULES B7).
The state (`privacy.witness`) is durable in the transaction that keeps the answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime

from client.agent.policy import Site
from client.agent.purse import Purse
from client.agent.store import Store
from privacy.errors import Refusal, RefusalCode
from privacy.identity import Identity
from privacy.ledger_codes import LedgerCode, LedgerRefusal
from privacy.witness import Proposal, Witness

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
            Refusal: LEDGER when a release of its own has been missing in the log for too long.
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
            Refusal: LEDGER when the log's numbers say that these records are old.
        """
        try:
            state, _ = self._state().step(self._identity, study, slot, request, release)
        except LedgerRefusal as refusal:
            raise Refusal(RefusalCode.LEDGER, str(slot)) from refusal
        mine = (leaf.data.decode() for _, leaf in state.pending if leaf.entry.study == study)
        return state.encode(), "\n".join(mine)

    def cosign(self, payload: bytes) -> dict[str, str]:
        """The cosignature of a proposed head, durable before it is returned, or the size to begin from.

        Raises:
            Refusal: MALFORMED, TOO_LARGE, BAD_SIGNATURE; LEDGER when the log does not tell the truth.
        """
        proposal = Proposal.decode(payload)
        with self.turn:
            state = self._state()
            try:
                known, signature = state.cosign(self._identity, proposal, int(self._now().timestamp()), PATIENCE)
            except LedgerRefusal as refusal:
                if refusal.code is LedgerCode.OTHER_START:
                    return {"size": str(state.size)}
                self._store.note("", f"the consortium's log was not cosigned: {refusal}")
                if refusal.code is LedgerCode.STATE_LOST:
                    self._forget(state.recovered(self._identity.public, proposal))
                raise Refusal(RefusalCode.LEDGER) from refusal
            self._store.keep_witness(known.encode())
        return {"cosignature": signature.line}

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
