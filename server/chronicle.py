"""What has happened, and what was published? Events for whoever watches, and the shelf of finished models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime

import sqlalchemy as sa

from privacy.roster import timestamp
from server import tables as t
from server.records import Event, ModelRecord


class Chronicle:
    """Events and models in the registry's database. `now` is the registry's clock."""

    def __init__(self, database: t.Database, now: Callable[[], datetime]) -> None:
        self._db, self.now = database, now

    def _stamp(self) -> str:
        return timestamp(self.now())

    def add_model(self, study: str, round_: int, package: str, metrics: Mapping[str, float]) -> None:
        """Note the published model; again with the same study replaces the package."""
        values = {"round": round_, "package": package, "metrics": json.dumps(dict(metrics)), "at": self._stamp()}
        with self._db.write() as db:
            if not db.execute(t.models.update().where(t.models.c.study == study).values(**values)).rowcount:
                db.execute(t.models.insert().values(study=study, **values))
            self._event(db, study, "published", f"the model of round {round_} is published", data={"round": round_})

    def models(self) -> list[ModelRecord]:
        """All published models, newest first."""
        query = (
            sa.select(t.models, t.studies.c.name)
            .join(t.studies, t.studies.c.hash == t.models.c.study)
            .order_by(t.models.c.at.desc(), t.models.c.study)
        )
        with self._db.read() as db:
            rows = db.execute(query).all()
        return [ModelRecord(r.study, r.name, r.round, r.package, json.loads(r.metrics), r.at) for r in rows]

    def note(self, study: str, kind: str, text: str, site: str = "", data: Mapping[str, object] | None = None) -> None:
        """Add an event for whoever watches."""
        with self._db.write() as db:
            self._event(db, study, kind, text, site, data)

    def events(self, study: str | None = None, after: int = 0, limit: int = 1000) -> list[Event]:
        """Events of one study (None: of all) with an id above `after`, oldest first."""
        query = sa.select(t.events).where(t.events.c.id > after).order_by(t.events.c.id).limit(limit)
        if study is not None:
            query = query.where(t.events.c.study == study)
        with self._db.read() as db:
            rows = db.execute(query).all()
        return [Event(r.id, r.at, r.study, r.kind, r.site, r.text, json.loads(r.data or "{}")) for r in rows]

    def _event(
        self,
        db: sa.Connection,
        study: str,
        kind: str,
        text: str,
        site: str = "",
        data: Mapping[str, object] | None = None,
    ) -> None:
        t.add_event(db, self._stamp(), study, kind, text, site, data)
