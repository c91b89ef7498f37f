"""Until when may something of a study leave? Until a person at the hospital says no, and nothing from then on.

To look whether it may leave and to let it go are one step, and a no is written between two such steps, never within
one. So nothing leaves any more once `study withdraw` or `grant revoke` has returned (RULES B6). What left before cannot
be called back: a masked vector that is at the coordinator may still be summed, but this site's share of the key to the
sum stays here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from client.agent import policy
from client.agent.purse import Purse
from client.agent.rows import State, StudyRow
from client.agent.store import Store
from client.agent.workshop import Workshop
from privacy.errors import Refusal, RefusalCode
from privacy.study import Study


class Gate:
    """What stands between one agent's answers and the outside.

    Args:
        known: a study by its hash: its row and what was signed.
    """

    def __init__(
        self,
        store: Store,
        purse: Purse,
        workshop: Workshop,
        known: Callable[[str], tuple[StudyRow | None, Study | None]],
    ) -> None:
        self._store, self._purse, self._workshop, self._known = store, purse, workshop, known
        self._lock = threading.Lock()

    def check(self, study: str) -> Study:
        """The study, if something of it may leave now.

        Raises:
            Refusal: UNKNOWN_STUDY; as `policy.decided`; GRANT_REVOKED, or GRANT_SPENT when it was closed besides.
        """
        row, known = self._known(study)
        if row is None or known is None:
            raise Refusal(RefusalCode.UNKNOWN_STUDY, study)
        policy.decided(row, allow_finished=False)
        if known.privacy.mode != "none":
            self._purse.check_grant(known)
        return known

    @contextmanager
    def passing(self, study: str) -> Iterator[Study]:
        """Let something of a study go, inside; a no waits until it has gone.

        Raises:
            Refusal: as `check`.
        """
        with self._lock:
            yield self.check(study)

    def decide(self, study: str, state: State, data: str, approval: bytes) -> None:
        """Write the operator's decision; anything but an approval stops the study's work."""
        with self._lock:
            self._store.decide(study, state, data, approval)
        if state is not State.APPROVED:
            self._stop(study, RefusalCode.WITHDRAWN if state is State.WITHDRAWN else RefusalCode.DECLINED)

    def revoke(self, study: str) -> None:
        """End the grant of a study and stop its work.

        Raises:
            ConsiliumError: it has no grant, or none any more.
        """
        with self._lock:
            self._purse.revoke(study)
        self._stop(study, RefusalCode.GRANT_REVOKED)

    def _stop(self, study: str, code: RefusalCode) -> None:
        """Nothing of it can leave any more: end what is computed, and delete what was stored."""
        self._workshop.cancel(study, code)
        self._store.rings.wipe()
