"""How does a study end at a site? With the model, or when the common log was shown to have closed it.

Each step is durable before the next, and is done again after a kill at any point: nothing can be computed or fetched
for the study any more, then what no slot used is given back (RULES B2, S3).
"""

from __future__ import annotations

import logging
from pathlib import Path

from client.agent.delivery import unpack
from client.agent.desk import Desk
from client.agent.logbook import Logbook
from client.agent.payload import Payload
from client.agent.purse import Purse
from client.agent.rows import State, StudyRow
from client.agent.spool import Spool
from client.agent.store import Store
from client.agent.workshop import Workshop
from privacy.errors import Refusal, RefusalCode
from privacy.messages import Request
from privacy.study import Study

log = logging.getLogger("consilium.agent")


class Closing:
    """The ends of one agent's studies.

    Args:
        models: where delivered models lie, one folder per study.
    """

    def __init__(
        self, store: Store, purse: Purse, logbook: Logbook, workshop: Workshop, desk: Desk, spool: Spool, models: Path
    ) -> None:
        self._store, self._purse, self._logbook, self._workshop = store, purse, logbook, workshop
        self._desk, self._spool, self._models = desk, spool, models

    def deliver(self, request: Request, row: StudyRow, study: Study, payload: Payload) -> None:
        """Take the model; the study is finished.

        Raises:
            Refusal: SESSION_UNKNOWN, or the parcel is not what it should be.
        """
        header = request.header
        if header.session > row.session:
            raise Refusal(RefusalCode.SESSION_UNKNOWN, str(header.session))
        with self._spool.file(request, payload) as part:
            unpack(part, self._models / header.study, self._desk.sizes(study), row.result)
        self._desk.leave_own(study, header.round, self._models / header.study)
        self._store.finish(header.study)
        if study.privacy.mode != "none":
            self._settle(header.study, committed=True)
        self._store.rings.wipe()
        self._workshop.cancel(header.study, RefusalCode.SESSION_CLOSED)
        self._desk.forget(header.study)
        self._desk.keepsakes(study).discard()

    def ended(self) -> None:
        """Close the studies that the log has closed. That nothing is released for them was kept with the head.

        After COMMIT the model is still to come; after ABORT nothing is. What the disk does not take now is done with
        the next head or at the next start.
        """
        for study, committed in self._logbook.ended().items():
            if self._purse.closed(study):
                continue
            try:
                row = self._store.study(study)
                if not committed and row is not None and row.state is not State.FINISHED:
                    self._store.finish(study, "over: the coordinator has aborted it")
                    self._store.rings.wipe()
            except Refusal:
                log.exception("study %s was aborted, and that could not be recorded yet", study)
                continue
            self._workshop.cancel(study, RefusalCode.SESSION_CLOSED)
            self._settle(study, committed=committed)

    def _settle(self, study: str, *, committed: bool) -> None:
        """Give back what a closed study did not use; a ledger in doubt keeps it reserved, which is the safe side."""
        try:
            self._purse.settle(study, committed=committed)
        except Refusal:
            log.exception("the privacy ledger was not settled for study %s", study)
