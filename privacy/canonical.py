"""Which bytes does a document have? Exactly one sequence: RFC 8785 (JSON canonicalisation scheme).

Whatever is signed or hashed here passes through `canonical` first. Floats are refused, because two programs may
print them differently: a real number is written as a decimal string.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import rfc8785

from privacy.errors import Refusal, RefusalCode

SAFE_INTEGER = 2**53 - 1
MAX_DEPTH = 32


def canonical(value: Any) -> bytes:
    """Encode JSON-like `value` as RFC 8785 bytes.

    Raises:
        TypeError: a float, or something JSON does not know, is inside.
        ValueError: an integer beyond ±(2^53 - 1), where JSON readers disagree.
    """
    _check(value, 0)
    return rfc8785.dumps(value)


def parse(data: bytes, limit: int) -> dict[str, Any]:
    """Decode bytes that must be the canonical encoding of one object of at most `limit` bytes.

    Raises:
        Refusal: TOO_LARGE, or MALFORMED for anything that is not canonical (duplicate keys, other spacing,
            floats and non-finite numbers included).
    """
    if len(data) > limit:
        raise Refusal(RefusalCode.TOO_LARGE)
    try:
        value = json.loads(data)
        if not isinstance(value, dict) or canonical(value) != data:
            raise Refusal(RefusalCode.MALFORMED)
    except (ValueError, TypeError, RecursionError) as error:
        raise Refusal(RefusalCode.MALFORMED) from error
    return value


def digest(domain: str, value: Any) -> str:
    """Hex SHA-256 of `value` under a domain, so that a hash made for one purpose never serves another."""
    return hashlib.sha256(f"consilium/v1/{domain}".encode() + b"\0" + canonical(value)).hexdigest()


def sha256(data: bytes | bytearray | memoryview) -> str:
    """Hex SHA-256 of raw bytes."""
    return hashlib.sha256(data).hexdigest()


def _check(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if value is None or isinstance(value, bool | str):
        return
    if isinstance(value, int):
        if abs(value) > SAFE_INTEGER:
            raise ValueError(f"{value} is beyond the integers that JSON readers agree on")
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a key is not text: {key!r}")
            _check(item, depth + 1)
        return
    if isinstance(value, list | tuple):
        for item in value:
            _check(item, depth + 1)
        return
    raise TypeError(f"{type(value).__name__} has no canonical form; write a real number as a decimal string")
