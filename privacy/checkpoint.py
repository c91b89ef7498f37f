"""Which state of the log has been signed, and by whom? Checkpoints, as text that other tools read too.

A checkpoint is three lines, origin, size and root (C2SP tlog-checkpoint); a note is that text, an empty line and one
line per signature (C2SP signed-note). The log signs the text itself (key type 0x01); a witness signs it with the time
in front (C2SP tlog-cosignature v1, key type 0x04), and so says: of this log I have seen no larger head, and this one
continues all that I signed before. A head is valid with more than (n + c) / 2 such cosignatures of the n pinned sites,
c of which may collude (RULES B7): two such majorities share more than c sites, so an honest one saw both heads.

Reading is strict: one spelling of every text, no extension lines, no key twice. A signature of a key that is not asked
about is kept and ignored; a wrong one of a key that is asked about refuses the whole note.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from privacy.errors import Refusal, RefusalCode
from privacy.identity import Identity
from privacy.ledger_codes import LedgerCode, LedgerRefusal
from privacy.merkle import EMPTY, HASH
from privacy.roster import Roster

NOTE_LIMIT = 1 << 16
MOST_SIGNATURES = 128
LOG, COSIGNATURE = b"\x01", b"\x04"
KEY_ID, TIME, ED25519 = 4, 8, 64
LATEST = 253_402_300_799
"""The last second of the year 9999, beyond which no calendar here goes."""
_NAME = re.compile(r"[!-*,-~]{1,200}\Z")  # printable ASCII without space and plus
_SIZE = re.compile(r"(0|[1-9][0-9]{0,15})\Z")
_LINE = re.compile(r"— (\S+) (\S+)\Z")


def origin(consortium: str) -> str:
    """What a consortium's log is called, and the name of the log's key."""
    return f"consilium/v1/ledger/{consortium}"


def witness_name(log: str, site: str) -> str:
    """The name of a site's key as a witness of the log `log`."""
    return f"{log}/{site}"


def key_id(name: str, key: str, kind: bytes) -> bytes:
    """Four bytes that say which key signed (C2SP signed-note); `key` is 64 hex digits."""
    return hashlib.sha256(name.encode() + b"\n" + kind + bytes.fromhex(key)).digest()[:KEY_ID]


@dataclass(frozen=True)
class Checkpoint:
    """The state of one log: how many leaves, and the root over them (32 bytes)."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        """The three lines that are signed."""
        return f"{self.origin}\n{self.size}\n{_base64(self.root)}\n"

    @classmethod
    def read(cls, text: str) -> Checkpoint:
        """What `text` gave.

        Raises:
            Refusal: MALFORMED for any other text, extension lines included.
        """
        lines = text.split("\n")
        if len(lines) != 4 or lines[3] or not _NAME.match(lines[0]) or not _SIZE.match(lines[1]):
            raise Refusal(RefusalCode.MALFORMED, "checkpoint")
        checkpoint = cls(lines[0], int(lines[1]), _bytes(lines[2]))
        if len(checkpoint.root) != HASH or (checkpoint.size == 0) != (checkpoint.root == EMPTY):
            raise Refusal(RefusalCode.MALFORMED, "checkpoint")
        return checkpoint


@dataclass(frozen=True)
class NoteSignature:
    """One line under a note: the signer's name, its key's id, and the bytes of the signature."""

    name: str
    key: bytes
    value: bytes

    @property
    def line(self) -> str:
        """The line, without its end."""
        return f"— {self.name} {_base64(self.key + self.value)}"

    @classmethod
    def read(cls, line: str) -> NoteSignature:
        """What `line` gave.

        Raises:
            Refusal: MALFORMED.
        """
        match = _LINE.match(line)
        if match is None or not _NAME.match(match[1]):
            raise Refusal(RefusalCode.MALFORMED, "signature line")
        data = _bytes(match[2])
        if len(data) <= KEY_ID:
            raise Refusal(RefusalCode.MALFORMED, "signature line")
        return cls(match[1], data[:KEY_ID], data[KEY_ID:])


@dataclass(frozen=True)
class Note:
    """A checkpoint and its signatures, those of strangers included."""

    checkpoint: Checkpoint
    signatures: tuple[NoteSignature, ...] = ()

    def encode(self) -> bytes:
        """The note as UTF-8 text."""
        return (self.checkpoint.text + "\n" + "".join(f"{s.line}\n" for s in self.signatures)).encode()

    @classmethod
    def decode(cls, data: bytes) -> Note:
        """Read a note. Signatures are parsed here, not verified: call `verify` and `cosigners`.

        Raises:
            Refusal: MALFORMED or TOO_LARGE.
        """
        if len(data) > NOTE_LIMIT:
            raise Refusal(RefusalCode.TOO_LARGE, "checkpoint")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refusal(RefusalCode.MALFORMED, "checkpoint") from error
        body, gap, tail = text.rpartition("\n\n")
        if not gap or not tail.endswith("\n"):
            raise Refusal(RefusalCode.MALFORMED, "checkpoint")
        lines = tail[:-1].split("\n")
        if len(lines) > MOST_SIGNATURES:
            raise Refusal(RefusalCode.TOO_LARGE, "checkpoint")
        signatures = tuple(NoteSignature.read(line) for line in lines)
        if len({(s.name, s.key) for s in signatures}) != len(signatures):
            raise Refusal(RefusalCode.MALFORMED, "checkpoint")
        return cls(Checkpoint.read(body + "\n"), signatures)

    def adding(self, *signatures: NoteSignature) -> Note:
        """The same note with more signatures; one of the same key takes the older one's place."""
        fresh = {(s.name, s.key): s for s in signatures}
        kept = tuple(s for s in self.signatures if (s.name, s.key) not in fresh)
        return replace(self, signatures=(*kept, *fresh.values()))

    def signed_by(self, log: Identity) -> Note:
        """The same note with the log's own signature, under the origin's name."""
        name, text = self.checkpoint.origin, self.checkpoint.text
        return self.adding(NoteSignature(name, key_id(name, log.public, LOG), log.sign_text(text)))

    def verify(self, key: str) -> Checkpoint:
        """The checkpoint, once the log's own signature under the pinned `key` is found good.

        Raises:
            Refusal: BAD_SIGNATURE when it is missing or wrong.
        """
        name, text = self.checkpoint.origin, self.checkpoint.text
        found = self._of(name, key_id(name, key, LOG))
        if found is None or not _verified(key, text, found.value):
            raise Refusal(RefusalCode.BAD_SIGNATURE, f"checkpoint by {key[:16]}")
        return self.checkpoint

    def cosigners(self, witnesses: Mapping[str, str]) -> dict[str, int]:
        """Which of the pinned witnesses cosigned, and when each says it did (seconds since 1970, UTC).

        Args:
            witnesses: key name → Ed25519 public key, 64 hex digits.

        Raises:
            Refusal: BAD_SIGNATURE when a line of a pinned witness does not verify.
        """
        times = {}
        for name, key in witnesses.items():
            found = self._of(name, key_id(name, key, COSIGNATURE))
            if found is not None:
                times[name] = cosigned_at(self.checkpoint, found, key)
        return times

    def _of(self, name: str, key: bytes) -> NoteSignature | None:
        return next((s for s in self.signatures if s.name == name and s.key == key), None)


def cosign(checkpoint: Checkpoint, name: str, witness: Identity, at: int) -> NoteSignature:
    """A witness's cosignature. Only `privacy.witness` knows whether it may be given.

    Args:
        name: the witness's key name, of `witness_name`.
        at: seconds since 1970, UTC.

    Raises:
        ValueError: the time is before 1970 or beyond the year 9999.
    """
    if not 0 <= at <= LATEST:
        raise ValueError("a cosignature's time is in seconds since 1970")
    value = at.to_bytes(TIME, "big") + witness.sign_text(_timed(checkpoint, at))
    return NoteSignature(name, key_id(name, witness.public, COSIGNATURE), value)


def cosigned_at(checkpoint: Checkpoint, signature: NoteSignature, key: str) -> int:
    """When the witness with `key` says that it cosigned this checkpoint (seconds since 1970).

    Raises:
        Refusal: BAD_SIGNATURE when it did not.
    """
    value = signature.value
    at = int.from_bytes(value[:TIME], "big")
    right = signature.key == key_id(signature.name, key, COSIGNATURE) and len(value) == TIME + ED25519 and at <= LATEST
    if not right or not _verified(key, _timed(checkpoint, at), value[TIME:]):
        raise Refusal(RefusalCode.BAD_SIGNATURE, f"cosignature by {key[:16]}")
    return at


def needed(sites: int, colluding: int) -> int:
    """How many cosignatures make a head valid: the least number above (n + c) / 2 (RULES B7)."""
    return (sites + colluding) // 2 + 1


def witnesses_of(roster: Roster) -> dict[str, str]:
    """The pinned witnesses of a consortium's log, key name → key: every site of the roster that is not revoked."""
    log = origin(roster.consortium)
    return {witness_name(log, site.name): site.identity for site in roster.sites if not site.revoked}


def valid_head(
    note: Note, log: str, key: str, witnesses: Mapping[str, str], colluding: int
) -> tuple[Checkpoint, dict[str, int]]:
    """The checkpoint and who cosigned it when, if it is a head to be believed (RULES B7).

    Args:
        log: the origin that the log must have.
        key: the log's pinned key.
        witnesses: all n pinned sites, key name → key; no key twice.
        colluding: c, the sites that may lie together.

    Raises:
        Refusal: BAD_SIGNATURE by the log or by a pinned witness.
        LedgerRefusal: OTHER_LOG, or TOO_FEW_WITNESSES.
        ValueError: two witnesses have one key, or c is below 0.
    """
    if len(set(witnesses.values())) != len(witnesses) or colluding < 0:
        raise ValueError("each witness has its own key, and c is 0 or more")
    if note.checkpoint.origin != log:
        raise LedgerRefusal(LedgerCode.OTHER_LOG, note.checkpoint.origin)
    checkpoint, times = note.verify(key), note.cosigners(witnesses)
    least = needed(len(witnesses), colluding)
    if len(times) < least:
        raise LedgerRefusal(
            LedgerCode.TOO_FEW_WITNESSES, f"{len(times)} of {len(witnesses)} at size {checkpoint.size}, {least} needed"
        )
    return checkpoint, times


def _timed(checkpoint: Checkpoint, at: int) -> str:
    return f"cosignature/v1\ntime {at}\n{checkpoint.text}"


def _verified(key: str, text: str, value: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(value, text.encode())
    except (InvalidSignature, ValueError):
        return False
    return True


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Refusal(RefusalCode.MALFORMED, "base64") from error
    if _base64(data) != text:  # one spelling: no bits left over behind the last byte
        raise Refusal(RefusalCode.MALFORMED, "base64")
    return data
