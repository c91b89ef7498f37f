"""What does a site remember between two messages? Three states, each made from the one before, none ever changed.

`Keyed` holds the session's private keys; `Shared` what was encapsulated and dealt as well; `Ready` has destroyed the
private keys and keeps one secret for each pair, its own seeds and its shares of the others' seeds. Each turns into
bytes for the site's durable store and back. The bytes are as secret as the keys in them.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from privacy.canonical import digest
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.identity import DOCUMENT_LIMIT, Document
from privacy.secagg.keys import Secrets
from privacy.secagg.plan import Plan


@dataclass(frozen=True)
class Place:
    """Who and where: the same for all states of a session.

    Attributes:
        plan: the study's constants.
        session: the session's number.
        first_slot, last_slot: the slots that its keys serve.
        site: this site.
        roster: pinned identity key of each site of the study.
    """

    plan: Plan
    session: int
    first_slot: int
    last_slot: int
    site: str
    roster: Mapping[str, str]

    @property
    def slots(self) -> int:
        """S, how many slots the keys serve."""
        return self.last_slot - self.first_slot + 1

    @cached_property
    def context(self) -> bytes:
        """32 bytes over plan, session, slots and roster, in every key derivation (RULES S6)."""
        body = {
            "plan": self.plan.digest, "session": self.session, "slots": [self.first_slot, self.last_slot],
            "roster": dict(self.roster),
        }  # fmt: skip
        return bytes.fromhex(digest("secagg/context", body))

    def index(self, slot: int) -> int:
        """The slot's number within the session, from 0.

        Raises:
            Refusal: SLOT_SESSION.
        """
        if not self.first_slot <= slot <= self.last_slot:
            raise Refusal(RefusalCode.SLOT_SESSION, str(slot))
        return slot - self.first_slot

    def fields(self) -> dict[str, Any]:
        """What every message of the session names."""
        return {"study": self.plan.study, "session": self.session, "site": self.site}

    def body(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "plan": self.plan.body(), "session": self.session, "first_slot": self.first_slot,
            "last_slot": self.last_slot, "site": self.site, "roster": dict(self.roster),
        }  # fmt: skip

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Place:
        """Back from `body`."""
        return cls(**{**body, "plan": Plan.from_body(body["plan"])})


@dataclass(frozen=True)
class Keyed:
    """After `begin`: private keys, and the signed public ones."""

    place: Place
    secrets: Secrets
    document: Document

    def to_bytes(self) -> bytes:
        """For the site's durable store."""
        return _pack("keyed", self.place, x25519=self.secrets.x25519, kem=self.secrets.kem, document=self.document)

    @classmethod
    def from_bytes(cls, data: bytes) -> Keyed:
        """Back from `to_bytes`."""
        place, value = _unpack("keyed", data)
        return cls(place, Secrets(_bytes(value["x25519"]), _bytes(value["kem"])), _document(value["document"]))


@dataclass(frozen=True)
class Shared:
    """After `share`.

    Attributes:
        keyed: the state before.
        keys: every signed `Keys`, by site.
        sent: for each peer the secret encapsulated to it (32 bytes) and the ciphertext.
        seeds: own self-mask seeds, 32 bytes a slot.
        own: own shares of them, 33 bytes a slot.
        document: the signed `Shares`.
    """

    keyed: Keyed
    keys: Mapping[str, Document]
    sent: Mapping[str, tuple[bytes, bytes]]
    seeds: bytes
    own: bytes
    document: Document

    def to_bytes(self) -> bytes:
        """For the site's durable store."""
        return _pack(
            "shared",
            self.keyed.place,
            keyed=self.keyed.to_bytes(),
            keys=dict(self.keys),
            sent={peer: list(pair) for peer, pair in self.sent.items()},
            seeds=self.seeds,
            own=self.own,
            document=self.document,
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Shared:
        """Back from `to_bytes`."""
        _, value = _unpack("shared", data)
        return cls(
            Keyed.from_bytes(_bytes(value["keyed"])),
            {site: _document(item) for site, item in value["keys"].items()},
            {peer: (_bytes(pair[0]), _bytes(pair[1])) for peer, pair in value["sent"].items()},
            _bytes(value["seeds"]),
            _bytes(value["own"]),
            _document(value["document"]),
        )


@dataclass(frozen=True)
class Ready:
    """After `receive`: what it takes to mask and to open.

    Attributes:
        place: who and where.
        ring: the sites that finished the set-up, sorted; this one among them.
        transcript: digest of all their signed messages, 64 hex digits; it belongs into the request's header.
        pairs: the pair's secret with each other site of the ring, 32 bytes.
        seeds: own self-mask seeds, 32 bytes a slot.
        held: shares of each site's seeds, 33 bytes a slot; own ones included.
    """

    place: Place
    ring: tuple[str, ...]
    transcript: str
    pairs: Mapping[str, bytes]
    seeds: bytes
    held: Mapping[str, bytes]

    def to_bytes(self) -> bytes:
        """For the site's durable store."""
        return _pack(
            "ready",
            self.place,
            ring=list(self.ring),
            transcript=self.transcript,
            pairs=dict(self.pairs),
            seeds=self.seeds,
            held=dict(self.held),
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Ready:
        """Back from `to_bytes`."""
        place, value = _unpack("ready", data)
        return cls(
            place,
            tuple(value["ring"]),
            value["transcript"],
            {peer: _bytes(item) for peer, item in value["pairs"].items()},
            _bytes(value["seeds"]),
            {site: _bytes(item) for site, item in value["held"].items()},
        )

    def index(self, slot: int) -> int:
        """The slot's number within the session, from 0.

        Raises:
            Refusal: SLOT_SESSION, or SLOT_SPENT after `without`.
        """
        index = self.place.index(slot)
        if not any(self.seeds[32 * index : 32 * (index + 1)]):
            raise Refusal(RefusalCode.SLOT_SPENT, str(slot))
        return index

    def without(self, slot: int) -> Ready:
        """The state after a slot is closed for good: its own seed and all shares of that slot are gone."""
        index = self.place.index(slot)
        return replace(
            self,
            seeds=_blank(self.seeds, index, 32),
            held={site: _blank(data, index, 33) for site, data in self.held.items()},
        )


def _blank(data: bytes, index: int, width: int) -> bytes:
    return data[: index * width] + bytes(width) + data[(index + 1) * width :]


def _pack(state: str, place: Place, **fields: Any) -> bytes:
    return json.dumps({"state": state, "place": place.body(), **fields}, default=_plain).encode()


def _unpack(state: str, data: bytes) -> tuple[Place, dict[str, Any]]:
    try:
        value = json.loads(data)
        found, place = value["state"], Place.from_body(value["place"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConsiliumError(
            "The site's record of a secure session is damaged",
            f"{len(data)} bytes of a {state} state",
            "Nothing leaves; the coordinator sets up new keys. Check the disk.",
        ) from error
    if found != state:
        raise Refusal(RefusalCode.OUT_OF_ORDER)
    return place, value


def _plain(value: Any) -> str:
    return b64encode(value.encode() if isinstance(value, Document) else value).decode()


def _bytes(text: str) -> bytes:
    return b64decode(text, validate=True)


def _document(text: str) -> Document:
    data = _bytes(text)
    kind = json.loads(data)["kind"]
    return Document.decode(data, kind, DOCUMENT_LIMIT)
