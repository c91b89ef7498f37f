"""Who says so? Ed25519 identities, and documents that carry their signatures.

A signature covers "consilium/v1/sign/" ‖ kind ‖ NUL ‖ RFC 8785(body): a signature given to one kind of document
is worth nothing on another (RFC 8032 for the scheme).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privacy.canonical import canonical, digest, parse
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.files import write_atomically, write_once

KEY = re.compile(r"[0-9a-f]{64}\Z")
SIGNATURE = re.compile(r"[0-9a-f]{128}\Z")
DOCUMENT_LIMIT = 1 << 20
MAX_SIGNATURES = 64


def fingerprint(key: str) -> str:
    """A public key in eight groups of four, to be read out over the telephone (the key's first 128 bits)."""
    return " ".join(key[i : i + 4] for i in range(0, 32, 4))


@dataclass(frozen=True)
class Signature:
    """`key`: signer's Ed25519 public key, 64 hex digits. `value`: the signature, 128 hex digits."""

    key: str
    value: str


class Identity:
    """An Ed25519 private key on disk: who a coordinator or a hospital is."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public: str = private.public_key().public_bytes_raw().hex()

    @classmethod
    def generate(cls) -> Identity:
        """A new identity in memory, from the operating system's generator."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def create(cls, path: Path) -> Identity:
        """Make a new identity and write it to `path` (PKCS #8 PEM, readable by its owner only).

        Raises:
            ConsiliumError: the file exists already; a key is never overwritten.
        """
        identity = cls.generate()
        pem = identity._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            write_once(path, pem)
        except FileExistsError as error:
            raise ConsiliumError(
                "There is an identity already", str(path), "A key is never overwritten; use another folder."
            ) from error
        return identity

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read an identity.

        Raises:
            ConsiliumError: missing, unreadable, or not an Ed25519 key.
        """
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise ConsiliumError(
                "The identity key cannot be read",
                str(path),
                "Restore it from your backup; it cannot be made again.",
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ConsiliumError("The identity key is not Ed25519", str(path), "Restore the right file from backup.")
        return cls(key)

    def sign(self, kind: str, body: Mapping[str, Any]) -> Signature:
        """Sign a document's body under its kind."""
        return Signature(self.public, self._private.sign(_signed_bytes(kind, body)).hex())

    def sign_text(self, text: str) -> bytes:
        """Sign plain text as it stands (RFC 8032, 64 bytes), as C2SP's signed notes want it.

        Raises:
            ValueError: the text holds NUL; every document's signed bytes do, so a note never passes for one.
        """
        if "\0" in text:
            raise ValueError("a note is plain text without NUL")
        return self._private.sign(text.encode())


@dataclass(frozen=True)
class Document:
    """A signed statement: `kind`, a JSON `body` without floats, and any number of signatures."""

    kind: str
    body: dict[str, Any]
    signatures: tuple[Signature, ...] = ()

    @property
    def digest(self) -> str:
        """Hex SHA-256 of kind and body; signatures are not part of it."""
        return digest(f"document/{self.kind}", self.body)

    def signed_by(self, identity: Identity) -> Document:
        """The same document with this identity's signature added (in place of an older one of the same key)."""
        others = tuple(s for s in self.signatures if s.key != identity.public)
        return replace(self, signatures=(*others, identity.sign(self.kind, self.body)))

    def verify(self, key: str) -> None:
        """Check that `key` signed this document.

        Raises:
            Refusal: BAD_SIGNATURE when it did not, or the signature is wrong.
        """
        for signature in self.signatures:
            if signature.key == key and _valid(signature, self.kind, self.body):
                return
        raise Refusal(RefusalCode.BAD_SIGNATURE, f"{self.kind} by {key[:16]}")

    def plain(self) -> dict[str, Any]:
        """The whole document as a JSON value, to stand inside another message."""
        signatures = [{"key": s.key, "value": s.value} for s in self.signatures]
        return {"kind": self.kind, "body": self.body, "signatures": signatures}

    @classmethod
    def of_plain(cls, value: Any, kind: str) -> Document:
        """What `plain` gave, checked like bytes from a stranger.

        Raises:
            Refusal: MALFORMED or TOO_LARGE.
        """
        try:
            return cls.decode(canonical(value), kind)
        except (TypeError, ValueError) as error:
            raise Refusal(RefusalCode.MALFORMED, kind) from error

    def encode(self) -> bytes:
        """Canonical bytes of the whole document, signatures included."""
        return canonical(self.plain())

    @classmethod
    def decode(cls, data: bytes, kind: str, limit: int = DOCUMENT_LIMIT) -> Document:
        """Read a document of one kind. Signatures are parsed here, not verified: call `verify`.

        Raises:
            Refusal: MALFORMED or TOO_LARGE.
        """
        value = parse(data, limit)
        body, signatures = value.get("body"), value.get("signatures")
        if set(value) != {"kind", "body", "signatures"} or value["kind"] != kind:
            raise Refusal(RefusalCode.MALFORMED)
        if not isinstance(body, dict) or not isinstance(signatures, list) or len(signatures) > MAX_SIGNATURES:
            raise Refusal(RefusalCode.MALFORMED)
        return cls(kind, body, tuple(_signature(item) for item in signatures))

    def write(self, path: Path) -> None:
        """Write the document to a file that people pass on, whole or not at all."""
        write_atomically(path, self.encode() + b"\n", 0o644)

    @classmethod
    def read(cls, path: Path, kind: str) -> Document:
        """Read a document file.

        Raises:
            ConsiliumError: no such file, or not a document of this kind.
        """
        try:
            return cls.decode(path.read_bytes().strip(), kind)
        except OSError as error:
            raise ConsiliumError("The file cannot be read", str(path), "Check the path and its permissions.") from error
        except Refusal as error:
            raise ConsiliumError(
                f"The file is not a well-formed {kind} document",
                str(path),
                "Ask its author to send it again.",
            ) from error


def _signature(item: Any) -> Signature:
    if not isinstance(item, dict) or set(item) != {"key", "value"}:
        raise Refusal(RefusalCode.MALFORMED)
    key, value = item["key"], item["value"]
    if not (isinstance(key, str) and isinstance(value, str) and KEY.match(key) and SIGNATURE.match(value)):
        raise Refusal(RefusalCode.MALFORMED)
    return Signature(key, value)


def _valid(signature: Signature, kind: str, body: Mapping[str, Any]) -> bool:
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.key))
        public.verify(bytes.fromhex(signature.value), _signed_bytes(kind, body))
    except (InvalidSignature, ValueError):
        return False
    return True


def _signed_bytes(kind: str, body: Mapping[str, Any]) -> bytes:
    return f"consilium/v1/sign/{kind}".encode() + b"\0" + canonical(dict(body))
