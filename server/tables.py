"""How is the registry laid out on disk? Its tables, and an engine that never loses a committed row.

SQLite: write-ahead log, `synchronous=FULL`, foreign keys, and writers that lock first (BEGIN IMMEDIATE) so that two
processes never meet half-way. PostgreSQL, by URL: serializable transactions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError, SQLAlchemyError

from privacy.errors import ConsiliumError

SCHEMA = "1"
READ = "consilium_read"

metadata = sa.MetaData()


def _key(name: str, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.String(80), nullable=False, **options)


def _text(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, nullable=False, default="")


def _study(**options: Any) -> sa.Column[Any]:
    return sa.Column("study", sa.String(64), sa.ForeignKey("studies.hash"), nullable=False, **options)


def _number(name: str, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.Integer, nullable=False, **options)


meta = sa.Table("meta", metadata, _key("name", primary_key=True), _text("value"))
rosters = sa.Table(
    "rosters",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("document", sa.LargeBinary, nullable=False),
    _text("at"),
)
enrolments = sa.Table(
    "enrolments",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    _key("site"),
    sa.Column("version", sa.Integer, sa.ForeignKey("rosters.version"), nullable=False),
    sa.Column("document", sa.LargeBinary, nullable=False),
    _text("at"),
)
studies = sa.Table(
    "studies",
    metadata,
    sa.Column("hash", sa.String(64), primary_key=True),
    _key("name", index=True),
    sa.Column("document", sa.LargeBinary, nullable=False),
    _key("state"),
    _text("reason"),
    _key("request", default=""),
    _number("session", default=0),
    _key("initial"),
    _key("weights"),
    _text("created"),
    _text("updated"),
)
approvals = sa.Table(
    "approvals",
    metadata,
    _study(primary_key=True),
    _key("site", primary_key=True),
    _key("state"),
    sa.Column("document", sa.LargeBinary, nullable=False, default=b""),
    _text("at"),
)
slots = sa.Table(
    "slots",
    metadata,
    _study(primary_key=True),
    _number("slot", primary_key=True, autoincrement=False),
    _number("session"),
    _number("round"),
    _key("kind"),
    _number("attempt"),
    sa.Column("request", sa.LargeBinary, nullable=False),
    _key("hash"),
    _key("payload"),
    _text("cohort"),
    _key("state"),
    _text("reason"),
    _text("opened"),
    _text("closed"),
)
outcomes = sa.Table(
    "outcomes",
    metadata,
    _study(primary_key=True),
    _number("slot", primary_key=True, autoincrement=False),
    _key("site", primary_key=True),
    _key("state"),
    _key("code", default=""),
    _text("reason"),
    sa.Column("bytes", sa.BigInteger, nullable=False, default=0),
    sa.Column("seconds", sa.Float, nullable=False, default=0.0),
    _text("at"),
    sa.ForeignKeyConstraint(["study", "slot"], ["slots.study", "slots.slot"]),
)
checkpoints = sa.Table(
    "checkpoints",
    metadata,
    _study(primary_key=True),
    _number("round", primary_key=True, autoincrement=False),
    _number("slot"),
    _key("weights"),
    _text("memory"),
    _text("at"),
)
evaluations = sa.Table(
    "evaluations",
    metadata,
    _study(primary_key=True),
    _number("round", primary_key=True, autoincrement=False),
    _key("split", primary_key=True),
    _number("slot"),
    _text("sites"),
    sa.Column("statistics", sa.LargeBinary, nullable=False),
    _text("metrics"),
    _text("at"),
)
rings = sa.Table(
    "rings",
    metadata,
    _study(primary_key=True),
    _number("session", primary_key=True, autoincrement=False),
    _number("first"),
    _number("last"),
    _key("state"),
    _text("members"),
    sa.Column("documents", sa.LargeBinary, nullable=False, default=b""),
    _text("at"),
)
stages = sa.Table(
    "stages",
    metadata,
    _study(primary_key=True),
    _number("slot", primary_key=True, autoincrement=False),
    _key("stage", primary_key=True),
    sa.Column("request", sa.LargeBinary, nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
    _text("at"),
    sa.ForeignKeyConstraint(["study", "slot"], ["slots.study", "slots.slot"]),
)
deliveries = sa.Table(
    "deliveries",
    metadata,
    _study(primary_key=True),
    _key("site", primary_key=True),
    _key("state"),
    _text("reason"),
    _text("at"),
)
models = sa.Table(
    "models",
    metadata,
    _study(primary_key=True),
    _number("round"),
    _key("package"),
    _text("metrics"),
    _text("at"),
)
events = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    _text("at"),
    sa.Column("study", sa.String(64), nullable=False, default="", index=True),
    _key("kind"),
    _key("site", default=""),
    _text("text"),
    _text("data"),
    sqlite_autoincrement=True,
)


def add_event(
    db: sa.Connection,
    at: str,
    study: str,
    kind: str,
    text: str,
    site: str = "",
    data: Mapping[str, object] | None = None,
) -> None:
    """Add an event inside a transaction that does something else too."""
    values = {"at": at, "study": study, "kind": kind, "site": site, "text": text, "data": json.dumps(dict(data or {}))}
    db.execute(events.insert().values(**values))


class Database:
    """An engine with `read()` and `write()` transactions."""

    def __init__(self, url: str) -> None:
        """Open the database and make its tables.

        Raises:
            ConsiliumError: it cannot be opened, or a newer release wrote it.
        """
        try:
            parsed = make_url(url)
            self.name = parsed.render_as_string(hide_password=True)
            if parsed.get_backend_name() == "sqlite":
                self.engine = sa.create_engine(parsed, connect_args={"timeout": 30})
                event.listen(self.engine, "connect", _prepare)
                event.listen(self.engine, "begin", _begin)
            else:
                self.engine = sa.create_engine(parsed, isolation_level="SERIALIZABLE", pool_pre_ping=True)
            if parsed.get_backend_name() == "sqlite" and parsed.database:
                _private(Path(parsed.database))
            with self.write() as connection:
                metadata.create_all(connection)
                version = connection.scalar(sa.select(meta.c.value).where(meta.c.name == "schema"))
                if version is None:
                    connection.execute(meta.insert().values(name="schema", value=SCHEMA))
        except (ArgumentError, NoSuchModuleError, OperationalError, SQLAlchemyError, ImportError, OSError) as error:
            raise ConsiliumError(
                "The registry cannot be opened",
                f"{url.rsplit('@', maxsplit=1)[-1]} ({str(error).splitlines()[0]})",
                "Check `registry` in coordinator.toml, the folder's permissions and free space; or restore a backup.",
            ) from error
        if version not in (None, SCHEMA):
            raise ConsiliumError(
                "The registry was written by another release",
                f"{self.name}, schema {version}, this release knows {SCHEMA}",
                "Install the release that wrote it.",
            )

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction that may change rows; committed, and on the disk, when the block ends without an error."""
        with _explained(self), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One consistent view."""
        with _explained(self), self.engine.connect().execution_options(**{READ: True}) as connection:
            yield connection

    def close(self) -> None:
        """Let go of the connections."""
        self.engine.dispose()


@contextmanager
def _explained(database: Database) -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        raise ConsiliumError(
            "The registry could not be read or written",
            f"{database.name} ({error.orig})",
            "Free disk space if it is full; nothing that was committed is lost.",
        ) from error


def _private(path: Path) -> None:
    path.touch(mode=0o600, exist_ok=True)


def _prepare(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout=30000")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    reading = connection.get_execution_options().get(READ, False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
