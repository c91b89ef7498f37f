"""Keystream, sharing and keys, each against its own law or against somebody else's arithmetic."""

import hashlib
import hmac
import itertools

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.secagg import keys, masks, shamir
from tests.privacy.secagg.secagg_kit import refused

KEYS = [bytes([at]) * 32 for at in range(5)]


def stream(key: bytes, numbers: int) -> np.ndarray:
    """The keystream in one piece."""
    return np.frombuffer(
        Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * numbers)), "<u4"
    )


@pytest.mark.parametrize("numbers", [0, 1, 5, masks.BLOCK, masks.BLOCK + 1, 3 * masks.BLOCK + 77])
@pytest.mark.parametrize("threads", [1, 2, None])
def test_masks_are_the_plain_keystream_whatever_the_blocks_and_threads(numbers, threads):
    vector = np.arange(numbers, dtype=np.uint32)
    masks.apply(vector, KEYS[:3], KEYS[3:], threads)
    expected = np.arange(numbers, dtype=np.uint32)
    for key in KEYS[:3]:
        expected += stream(key, numbers)
    for key in KEYS[3:]:
        expected -= stream(key, numbers)
    assert np.array_equal(vector, expected)


def test_what_was_added_comes_off():
    vector = np.arange(100, dtype=np.uint32)
    masks.apply(vector, KEYS)
    masks.apply(vector, [], KEYS)
    assert np.array_equal(vector, np.arange(100))


@given(st.binary(min_size=32, max_size=32), st.integers(1, 8), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_any_threshold_of_the_shares_give_the_secret_back(secret, threshold, more):
    positions = list(range(1, threshold + more + 1))
    shares = dict(zip(positions, shamir.split(secret, threshold, positions), strict=True))
    for some in itertools.islice(itertools.combinations(positions, threshold), 20):
        assert shamir.combine({x: shares[x] for x in some}) == secret


def test_one_share_too_few_fits_every_secret():
    """With w - 1 shares any secret is still possible: for each there is a last share that leads to it."""
    shares = dict(zip([1, 2, 3], shamir.split(b"a" * 32, 3, [1, 2, 3]), strict=True))
    weights = shamir._lagrange((1, 2, 3))
    for secret in (bytes(32), b"\xff" * 32, b"b" * 32):
        known = sum(weights[x - 1] * shamir.number(shares[x]) for x in (1, 2))
        last = (int.from_bytes(secret, "big") - known) * pow(weights[2], -1, shamir.PRIME) % shamir.PRIME
        assert shamir.combine({1: shares[1], 2: shares[2], 3: last.to_bytes(33, "big")}) == secret


@pytest.mark.parametrize("share", [b"", bytes(32), bytes(34), shamir.PRIME.to_bytes(33, "big"), b"\xff" * 33])
def test_a_share_outside_the_field_is_refused(share):
    good = shamir.split(b"a" * 32, 2, [1, 2])
    assert refused(lambda: shamir.combine({1: good[0], 2: share})) == "opening"


def test_the_field_is_a_prime_just_above_the_seeds():
    """Fermat to several bases; 2^256 + 297 is a known prime."""
    assert shamir.PRIME > 2**256
    assert all(pow(base, shamir.PRIME - 1, shamir.PRIME) == 1 for base in (2, 3, 5, 7, 11, 13))


def test_hkdf_is_rfc_5869_and_every_part_counts():
    """Against the RFC's own construction, written out here."""
    secret, about = b"s" * 64, keys.info("pair", b"a", b"bc")
    extracted = hmac.digest(bytes(32), secret, "sha256")
    assert keys.derive(secret, "pair", b"a", b"bc") == hmac.digest(extracted, about + b"\x01", "sha256")
    assert keys.expand(b"k" * 32, "pair", b"a", b"bc") == hmac.digest(b"k" * 32, about + b"\x01", "sha256")


def test_S6_no_two_lists_of_parts_give_the_same_bytes():
    seen = [keys.info(*parts) for parts in (
        ("a", b"bc"), ("ab", b"c"), ("a", b"b", b"c"), ("a", b"bc", b""), ("a",), ("abc",), ("a", b"c", b"b"),
    )]  # fmt: skip
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    "point",
    ["00" * 32, "01" + "00" * 31, "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
     "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"],
)  # fmt: skip
def test_S6_a_key_that_gives_an_all_zero_secret_is_refused(point):
    """Points of small order (RFC 7748, section 6.1)."""
    assert refused(lambda: keys.Secrets.generate().agree(bytes.fromhex(point))) == "peer-keys"


def test_S6_bytes_that_are_no_key_or_no_ciphertext_are_refused():
    secrets = keys.Secrets.generate()
    assert refused(lambda: secrets.agree(b"short")) == "peer-keys"
    assert refused(lambda: keys.encapsulate(bytes(10))) == "peer-keys"
    assert refused(lambda: keys.encapsulate(b"\xff" * keys.KEM_BYTES)) == "peer-keys"
    assert refused(lambda: secrets.decapsulate(bytes(10))) == "peer-shares"


def test_a_sealed_parcel_opens_under_its_own_key_and_words_only():
    sealed = keys.seal(b"k" * 32, b"shares", b"about")
    assert keys.unseal(b"k" * 32, sealed, b"about") == b"shares"
    for key, data, about in (
        (b"l" * 32, sealed, b"about"), (b"k" * 32, sealed, b"other"), (b"k" * 32, sealed[:-1], b"about"),
        (b"k" * 32, b"", b"about"), (b"k" * 32, bytes([sealed[0] ^ 1]) + sealed[1:], b"about"),
    ):  # fmt: skip
        assert refused(lambda k=key, d=data, a=about: keys.unseal(k, d, a)) == "peer-shares"


def test_keys_from_the_same_bytes_are_the_same_keys():
    counter = itertools.count()

    def random(size: int) -> bytes:
        return hashlib.shake_256(bytes([next(counter)])).digest(size)

    first = keys.Secrets.generate(random)
    again = keys.Secrets(first.x25519, first.kem)
    assert first.public == again.public
    secret, ciphertext = keys.encapsulate(first.public[1])
    assert again.decapsulate(ciphertext) == secret
