"""Which records does the agent keep? The tables of its memory, and their rows as values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

TABLES = """
CREATE TABLE roster (one INTEGER PRIMARY KEY CHECK (one = 1), version INTEGER NOT NULL, document BLOB NOT NULL);
CREATE TABLE studies (
    hash TEXT PRIMARY KEY, name TEXT NOT NULL, document BLOB NOT NULL, state TEXT NOT NULL,
    data TEXT NOT NULL DEFAULT '', approval BLOB NOT NULL DEFAULT x'',
    session INTEGER NOT NULL DEFAULT 0, highest INTEGER NOT NULL DEFAULT 0, result TEXT NOT NULL DEFAULT '',
    last TEXT NOT NULL, at TEXT NOT NULL);
CREATE TABLE slots (
    study TEXT NOT NULL REFERENCES studies (hash), slot INTEGER NOT NULL, session INTEGER NOT NULL,
    request TEXT NOT NULL, kind TEXT NOT NULL, state TEXT NOT NULL CHECK (state IN ('bound', 'stored', 'spent')),
    answer BLOB NOT NULL DEFAULT x'', sha256 TEXT NOT NULL DEFAULT '', size INTEGER NOT NULL DEFAULT 0,
    round INTEGER NOT NULL DEFAULT 0, cohort TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (study, slot)) WITHOUT ROWID;
CREATE TABLE sources (name TEXT PRIMARY KEY, source TEXT NOT NULL, summary TEXT NOT NULL DEFAULT '');
CREATE TABLE events (id INTEGER PRIMARY KEY, at TEXT NOT NULL, study TEXT NOT NULL, text TEXT NOT NULL);
"""

SECURE_TABLES = """
CREATE TABLE rings (
    study TEXT NOT NULL REFERENCES studies (hash), session INTEGER NOT NULL, state BLOB NOT NULL,
    PRIMARY KEY (study, session)) WITHOUT ROWID;
CREATE TABLE stages (
    study TEXT NOT NULL REFERENCES studies (hash), session INTEGER NOT NULL, slot INTEGER NOT NULL,
    stage TEXT NOT NULL, request TEXT NOT NULL, answer BLOB NOT NULL, answer_sha256 TEXT NOT NULL,
    payload BLOB NOT NULL DEFAULT x'',
    PRIMARY KEY (study, session, slot, stage)) WITHOUT ROWID;
CREATE TABLE choices (
    study TEXT NOT NULL REFERENCES studies (hash), slot INTEGER NOT NULL, kind TEXT NOT NULL, round INTEGER NOT NULL,
    choice BLOB NOT NULL, opened INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (study, slot)) WITHOUT ROWID;
CREATE TABLE pins (
    study TEXT NOT NULL REFERENCES studies (hash), site TEXT NOT NULL, identity TEXT NOT NULL,
    PRIMARY KEY (study, site)) WITHOUT ROWID;
"""
"""What secure aggregation adds: a session's secrets, the answers of its stages, which share a slot got, and the sites'
keys as the operator approved them. Choices and the rows of `stages` are tombstones: they outlive the secrets and the
bytes."""

PURSE_TABLES = """
CREATE TABLE officer (one INTEGER PRIMARY KEY CHECK (one = 1), key TEXT NOT NULL, at TEXT NOT NULL);
CREATE TABLE allowances (
    id INTEGER PRIMARY KEY, officer TEXT NOT NULL, serial INTEGER NOT NULL, document BLOB NOT NULL,
    UNIQUE (officer, serial));
CREATE TABLE grants (
    id INTEGER PRIMARY KEY, officer TEXT NOT NULL, serial INTEGER NOT NULL, study TEXT NOT NULL,
    document BLOB NOT NULL, state TEXT NOT NULL CHECK (state IN ('open', 'consumed', 'revoked')),
    UNIQUE (officer, serial));
CREATE TABLE histories (id INTEGER PRIMARY KEY, vector TEXT NOT NULL UNIQUE);
CREATE TABLE patients (
    id INTEGER PRIMARY KEY, pseudonym TEXT NOT NULL UNIQUE, history INTEGER NOT NULL);
CREATE TABLE plans (
    id INTEGER PRIMARY KEY, study TEXT NOT NULL UNIQUE, name TEXT NOT NULL, mode TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'committed', 'aborted')),
    granted INTEGER REFERENCES grants (id), members INTEGER NOT NULL, gone INTEGER NOT NULL DEFAULT 0,
    at TEXT NOT NULL);
CREATE TABLE parts (
    plan INTEGER NOT NULL REFERENCES plans (id), role TEXT NOT NULL, unit TEXT NOT NULL, count INTEGER NOT NULL,
    held INTEGER NOT NULL, PRIMARY KEY (plan, role)) WITHOUT ROWID;
CREATE TABLE members (
    plan INTEGER NOT NULL, patient INTEGER NOT NULL, role TEXT NOT NULL, PRIMARY KEY (plan, patient)) WITHOUT ROWID;
CREATE TABLE charges (
    study TEXT NOT NULL REFERENCES plans (study), slot INTEGER NOT NULL, kind TEXT NOT NULL, round INTEGER NOT NULL,
    request TEXT NOT NULL, steps INTEGER NOT NULL, paid INTEGER NOT NULL, counter INTEGER NOT NULL UNIQUE,
    PRIMARY KEY (study, slot)) WITHOUT ROWID;
CREATE TABLE ledger (
    one INTEGER PRIMARY KEY CHECK (one = 1), pseudonyms TEXT NOT NULL DEFAULT '', forgotten INTEGER NOT NULL DEFAULT 0,
    trouble TEXT NOT NULL DEFAULT '');
INSERT INTO ledger (one) VALUES (1);
CREATE TABLE witness (one INTEGER PRIMARY KEY CHECK (one = 1), state BLOB NOT NULL);
"""
"""What differential privacy adds. `histories`: RDP vectors, JSON, each once. `parts`: what a plan costs a patient of a
role: `unit` of one release, `count` of them reserved, `held` of them in the histories now. `plans.gone`: the highest
slot that the journal knows to have left. `ledger`: a fingerprint of the pseudonyms' key, the last charge that records
lost with a backup had counted, and the code of the doubt that this left, which the officer's next allowance names. No
row of these is ever deleted."""

UPGRADES = {
    2: (
        "ALTER TABLE slots ADD COLUMN round INTEGER NOT NULL DEFAULT 0;\n"
        "ALTER TABLE slots ADD COLUMN cohort TEXT NOT NULL DEFAULT '';\n" + SECURE_TABLES
    ),
    3: PURSE_TABLES,
}
"""What brings the records of an older release up to each schema."""

STUDY = "SELECT hash, name, document, state, data, approval, session, highest, result, last, at FROM studies"
SLOT = "SELECT study, slot, session, request, kind, state, answer, sha256, size, round, cohort FROM slots"


class State(StrEnum):
    """What a site has decided about a study."""

    PENDING = "pending"
    APPROVED = "approved"
    DECLINED = "declined"
    WITHDRAWN = "withdrawn"
    FINISHED = "finished"


@dataclass(frozen=True)
class StudyRow:
    """One study as the site knows it. `document` is signed by the coordinator, `approval` by this site or empty."""

    hash: str
    name: str
    document: bytes
    state: State
    data: str
    approval: bytes
    session: int
    highest: int
    result: str
    last: str
    at: str

    @classmethod
    def of(cls, row: tuple[Any, ...]) -> StudyRow:
        """A row that `STUDY` selected."""
        digest, name, document, state, data, approval, *rest = row
        return cls(digest, name, bytes(document), State(state), data, bytes(approval), *rest)


@dataclass(frozen=True)
class SlotRow:
    """One slot: the request it serves for ever, and the answer while it is kept (`size` 0: no payload).

    `cohort` is the bound request's, names with a blank between them.
    """

    study: str
    slot: int
    session: int
    request: str
    kind: str
    state: str
    answer: bytes
    sha256: str
    size: int
    round: int = 0
    cohort: str = ""


@dataclass(frozen=True)
class StageRow:
    """One answered stage of a session (`slot` 0) or of a slot; `answer` is empty once the session is over."""

    stage: str
    request: str
    answer: bytes
    payload: bytes


@dataclass(frozen=True)
class SourceRow:
    """A data source: the operator's declaration and the summary of its last check, both JSON."""

    name: str
    source: str
    summary: str

    @property
    def one_image_per_patient(self) -> bool:
        """Whether the operator declared that no patient has two images; an approval tells it to everybody."""
        return bool(json.loads(self.source).get("one_image_per_patient", False))
