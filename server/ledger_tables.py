"""How is the consortium's ledger laid out on disk? Entries by place, heads by size, one cosignature per head and site.

The bytes of an entry are the truth; hash, study and site stand beside them to be looked up by, and are compared with
them whenever the ledger is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from privacy.ledger import Leaf, Step

metadata = sa.MetaData()
leaves = sa.Table(
    "ledger_leaves",
    metadata,
    sa.Column("place", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("hash", sa.LargeBinary(32), nullable=False, unique=True),
    sa.Column("study", sa.String(64), nullable=False),
    sa.Column("site", sa.String(80), nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
    sa.Index("ledger_leaves_of_site", "site", "place"),
)
heads = sa.Table(
    "ledger_heads",
    metadata,
    sa.Column("size", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("note", sa.LargeBinary, nullable=False),
    sa.Column("at", sa.String(20), nullable=False),
)
cosignatures = sa.Table(
    "ledger_cosignatures",
    metadata,
    sa.Column("size", sa.BigInteger, sa.ForeignKey("ledger_heads.size"), primary_key=True, autoincrement=False),
    sa.Column("site", sa.String(80), primary_key=True),
    sa.Column("line", sa.Text, nullable=False),
)


def row(place: int, leaf: Leaf) -> dict[str, Any]:
    """A leaf as a row of `leaves`."""
    site = leaf.entry.site if isinstance(leaf.entry, Step) else ""
    return {"place": place, "hash": leaf.hash, "study": leaf.entry.study, "site": site, "data": leaf.data}


def insert(db: sa.Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of `leaves`, in one statement where each statement is a journey to a server."""
    if db.dialect.name == "sqlite":
        db.execute(leaves.insert(), list(rows))
    else:
        db.execute(leaves.insert().values(list(rows)))
