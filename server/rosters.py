"""Which sites are enrolled, by which signed roster? Its versions only go up, and the public door follows the newest."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import sqlalchemy as sa

from privacy.errors import ConsiliumError
from privacy.identity import Document
from privacy.roster import Enrolment, Roster
from server import tables as t
from server.chronicle import Chronicle
from server.home import CoordinatorHome


class Rosters(Chronicle):
    """The rosters in a coordinator's database."""

    def __init__(self, database: t.Database, now: Callable[[], datetime], home: CoordinatorHome) -> None:
        super().__init__(database, now)
        self._home = home

    def save_roster(self, document: Document, enrolment: Document | None = None) -> Roster:
        """Keep a signed roster, one version above the last, and the enrolment that led to it; opens the door to it.

        Raises:
            Refusal: badly signed or malformed.
            ConsiliumError: not the next version.
        """
        roster = Roster.verified(document, self._home.identity().public)
        with self._db.write() as db:
            last = db.scalar(sa.select(sa.func.max(t.rosters.c.version)))
            if last is not None and roster.version != last + 1:
                raise ConsiliumError(
                    "The roster was changed by somebody else meanwhile",
                    f"version {roster.version} after {last}",
                    "Give the command again.",
                )
            db.execute(t.rosters.insert().values(version=roster.version, document=document.encode(), at=self._stamp()))
            if enrolment is not None:
                site = Enrolment.verified(enrolment).site
                db.execute(
                    t.enrolments.insert().values(
                        site=site, version=roster.version, document=enrolment.encode(), at=self._stamp()
                    )
                )
            self._event(db, "", "roster", f"roster version {roster.version}")
        self.refresh_nodes()
        return roster

    def roster(self) -> tuple[Document, Roster]:
        """The newest roster, as signed and as read.

        Raises:
            ConsiliumError: there is none yet.
        """
        with self._db.read() as db:
            data = db.scalar(sa.select(t.rosters.c.document).order_by(t.rosters.c.version.desc()).limit(1))
        if data is None:
            raise ConsiliumError(
                "No hospital is enrolled yet",
                "",
                "Give sites the consortium file, and add what they hand back: `consilium-coordinator sites add FILE`.",
            )
        document = Document.decode(bytes(data), "roster")
        return document, Roster.verified(document, self._home.identity().public)

    def refresh_nodes(self) -> dict[str, str]:
        """Tell the SuperLink which node keys to let in now: those of sites neither revoked nor expired."""
        nodes = {site.name: site.node_key for site in self.roster()[1].sites if site.active(self.now())}
        self._home.write_nodes(nodes)
        return nodes
