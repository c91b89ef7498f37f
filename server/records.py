"""What does the registry remember, in words? The frozen records it gives out, and the states a study passes through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from privacy.identity import Document
from privacy.study import Study

Statistics = npt.NDArray[np.float64]


class State(StrEnum):
    """Where a study stands."""

    SIGNED = "signed"
    REQUESTED = "requested"
    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    INTERRUPTED = "interrupted"
    FINISHED = "finished"
    FAILED = "failed"


LIVE = frozenset({State.WAITING, State.RUNNING})
_ENDED = frozenset({State.PAUSED, State.STOPPED, State.INTERRUPTED, State.FAILED})

TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.SIGNED: frozenset({State.REQUESTED, State.STOPPED}),
    State.REQUESTED: frozenset({State.WAITING, State.RUNNING}) | _ENDED,
    State.WAITING: frozenset({State.RUNNING}) | _ENDED,
    State.RUNNING: frozenset({State.WAITING, State.FINISHED}) | _ENDED,
    State.PAUSED: frozenset({State.REQUESTED, State.STOPPED}),
    State.STOPPED: frozenset({State.REQUESTED}),
    State.INTERRUPTED: frozenset({State.REQUESTED, State.STOPPED}),
    State.FAILED: frozenset({State.REQUESTED, State.STOPPED}),
    State.FINISHED: frozenset({State.REQUESTED}),  # to deliver to sites that were away; nothing is trained again
}


@dataclass(frozen=True)
class StudyRecord:
    """One signed study. `request` is what the person asked of the running process: "", "pause" or "stop".

    `initial` is the blob of the full initial state (safetensors), `weights` the blob of its trainable part (flat
    float32).
    """

    hash: str
    name: str
    document: Document
    study: Study
    state: State
    reason: str
    request: str
    session: int
    initial: str
    weights: str
    created: str
    updated: str


@dataclass(frozen=True)
class ApprovalRecord:
    """What a site has said of a study: pending, approved, declined, withdrawn, or "" when it was not asked yet."""

    site: str
    state: str
    document: bytes
    at: str


class SlotState(StrEnum):
    """Where a slot stands."""

    OPEN = "open"
    DONE = "done"
    FAILED = "failed"
    ABANDONED = "abandoned"


@dataclass(frozen=True)
class SlotRecord:
    """One slot and the one request it serves for ever (`request`: the encoded document; `hash`: what it binds)."""

    slot: int
    session: int
    round: int
    kind: str
    attempt: int
    request: bytes
    hash: str
    payload: str
    cohort: tuple[str, ...]
    state: SlotState
    reason: str
    opened: str
    closed: str


class OutcomeState(StrEnum):
    """What became of one site in one slot."""

    WAITING = "waiting"
    IN = "in"
    LATE = "late"
    REFUSED = "refused"
    LOST = "lost"


@dataclass(frozen=True)
class Outcome:
    """One site in one slot: `code` is a refusal code or "", `reason` says it in words, `bytes` came in `seconds`.

    `about` is the site that it blames; it lives until the exchange ends.
    """

    site: str
    state: OutcomeState
    code: str = ""
    reason: str = ""
    bytes: int = 0
    seconds: float = 0.0
    at: str = ""
    about: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """The model after a round. `weights` ("" when pruned) and the optimiser's `memory` name blobs."""

    round: int
    slot: int
    weights: str
    memory: tuple[str, ...]
    at: str


@dataclass(frozen=True)
class Evaluation:
    """Summed statistics of the model of `round` on one split ("validation" or "test"), and the metrics they give."""

    round: int
    split: str
    slot: int
    sites: tuple[str, ...]
    statistics: Statistics
    metrics: Mapping[str, float]
    at: str


@dataclass(frozen=True)
class Delivery:
    """Whether a site has the finished model: waiting, delivered, or refused (`reason`)."""

    site: str
    state: str
    reason: str
    at: str


@dataclass(frozen=True)
class ModelRecord:
    """A published model: which round, the package that sites receive (a blob), and the test metrics."""

    study: str
    name: str
    round: int
    package: str
    metrics: Mapping[str, float]
    at: str


@dataclass(frozen=True)
class Event:
    """One thing that happened. `kind` is stable, for programs; `text` is for people; `data` holds figures."""

    id: int
    at: str
    study: str
    kind: str
    site: str
    text: str
    data: Mapping[str, Any]
