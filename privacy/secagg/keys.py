"""Which secrets do two sites share, and how? X25519 and ML-KEM-768 together, so that one may fall (RULES S6).

Each site encapsulates to the other. What i sends to j is sealed under a key that only that direction, that session and
those very keys give; the pair's own secret takes both encapsulations. Every use has its own label, and whatever is
hashed is length-prefixed. HKDF: RFC 5869; ML-KEM: FIPS 203; X25519: RFC 7748.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from privacy.errors import Refusal, RefusalCode
from privacy.secagg.fixed import Random

X25519_BYTES, KEM_BYTES, CIPHERTEXT_BYTES, SEED_BYTES, TAG_BYTES = 32, 1184, 1088, 32, 16
_LABEL = b"consilium/v1/secagg/"
_ONCE = bytes(12)
"""The nonce of a key that seals one message only."""


@dataclass(frozen=True)
class Secrets:
    """A site's private keys of one session: `x25519` 32 bytes, `kem` the 64-byte seed of ML-KEM-768."""

    x25519: bytes
    kem: bytes

    @classmethod
    def generate(cls, random: Random = os.urandom) -> Secrets:
        """Fresh keys."""
        return cls(random(32), random(64))

    @cached_property
    def _exchange(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self.x25519)

    @cached_property
    def _decapsulator(self) -> MLKEM768PrivateKey:
        return MLKEM768PrivateKey.from_seed_bytes(self.kem)

    @property
    def public(self) -> tuple[bytes, bytes]:
        """X25519 (32 bytes) and ML-KEM-768 (1184 bytes) public keys."""
        return self._exchange.public_key().public_bytes_raw(), self._decapsulator.public_key().public_bytes_raw()

    def agree(self, public: bytes) -> bytes:
        """The X25519 secret with a peer, 32 bytes.

        Raises:
            Refusal: PEER_KEYS for a key that gives zero, or no key.
        """
        try:
            return self._exchange.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise Refusal(RefusalCode.PEER_KEYS) from error

    def decapsulate(self, ciphertext: bytes) -> bytes:
        """The secret that a peer encapsulated, 32 bytes; a wrong ciphertext gives another secret (FIPS 203).

        Raises:
            Refusal: PEER_SHARES for a ciphertext of another length.
        """
        try:
            return self._decapsulator.decapsulate(ciphertext)
        except ValueError as error:
            raise Refusal(RefusalCode.PEER_SHARES) from error


def encapsulate(public: bytes) -> tuple[bytes, bytes]:
    """A fresh secret (32 bytes) for the holder of an ML-KEM-768 key, and its ciphertext (1088 bytes).

    Raises:
        Refusal: PEER_KEYS for bytes that are no such key.
    """
    try:
        return MLKEM768PublicKey.from_public_bytes(public).encapsulate()
    except ValueError as error:
        raise Refusal(RefusalCode.PEER_KEYS) from error


def derive(secret: bytes, label: str, *parts: bytes) -> bytes:
    """HKDF (extract and expand) of a raw secret to 32 bytes."""
    return HKDF(SHA256(), SEED_BYTES, None, info(label, *parts)).derive(secret)


def expand(key: bytes, label: str, *parts: bytes) -> bytes:
    """HKDF-Expand of a key to 32 bytes."""
    return HKDFExpand(SHA256(), SEED_BYTES, info(label, *parts)).derive(key)


def self_mask_key(seed: bytes, bound: bytes) -> bytes:
    """The keystream's key that a self-mask seed gives for one binding."""
    return expand(seed, "self-mask", bound)


def deposit_key(seed: bytes, bound: bytes, survivors: Sequence[str]) -> bytes:
    """What a survivor's deposit is sealed under: only who knows its self-mask seed can open it, for this set alone."""
    return expand(seed, "deposit", bound, *(name.encode() for name in survivors))


def about_deposit(context: bytes, site: str) -> bytes:
    """What is authenticated with a deposit."""
    return info("deposit", context, site.encode())


def info(label: str, *parts: bytes) -> bytes:
    """Label and parts, each after its length in four bytes, so that no two lists give the same bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in (_LABEL + label.encode(), *parts))


def seal(key: bytes, data: bytes, about: bytes) -> bytes:
    """AES-256-GCM under a key that serves this one message; `about` is authenticated with it."""
    return AESGCM(key).encrypt(_ONCE, data, about)


def unseal(key: bytes, data: bytes, about: bytes) -> bytes:
    """Open what `seal` closed.

    Raises:
        Refusal: PEER_SHARES.
    """
    try:
        return AESGCM(key).decrypt(_ONCE, data, about)
    except (InvalidTag, ValueError) as error:
        raise Refusal(RefusalCode.PEER_SHARES) from error
