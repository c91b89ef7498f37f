"""How does a log prove that it only grew? The hash tree of RFC 9162, section 2.1, its proofs and their checks.

A leaf is SHA-256(0x00 ‖ data), a node SHA-256(0x01 ‖ left ‖ right). The tree keeps the hash of every complete subtree,
level by level in one byte string each, so a leaf costs one node hash on average and 64 bytes of memory, and the root
or a proof at any earlier size is read off without the leaves.

A root does not say how many leaves are under it: some proofs hold for two sizes alike. Only the signed pair of size
and root (`privacy.checkpoint`) binds the size, so a size is never taken from anywhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from privacy.errors import Refusal, RefusalCode

HASH = 32
LONGEST = 64
"""Hashes in the longest proof that is read: enough for 2^63 leaves."""
EMPTY = hashlib.sha256(b"").digest()
"""The root of a tree without leaves (RFC 9162, 2.1.1)."""

Proof = tuple[bytes, ...]


def leaf_hash(data: bytes) -> bytes:
    """The hash of a leaf's data, 32 bytes."""
    return hashlib.sha256(b"\0" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of a node over its two halves, 32 bytes."""
    return hashlib.sha256(b"\1" + left + right).digest()


class Tree:
    """An append-only tree of leaf hashes. Nothing in it changes but its end."""

    def __init__(self, hashes: Iterable[bytes] = ()) -> None:
        """A tree of leaf hashes (32 bytes each, of `leaf_hash`)."""
        self._levels: list[bytearray] = [bytearray()]
        self.extend(hashes)

    @property
    def size(self) -> int:
        """How many leaves there are."""
        return len(self._levels[0]) // HASH

    def append(self, leaf: bytes) -> int:
        """Add one leaf hash and return its index.

        Raises:
            ValueError: not 32 bytes.
        """
        if len(leaf) != HASH:
            raise ValueError(f"a leaf hash has {HASH} bytes, not {len(leaf)}")
        index = place = self.size
        self._levels[0] += leaf
        depth, node = 0, leaf
        while place & 1:  # the new subtree completes a pair with the one before it
            node = node_hash(self._at(depth, place - 1), node)
            depth, place = depth + 1, place >> 1
            if depth == len(self._levels):
                self._levels.append(bytearray())
            self._levels[depth] += node
        return index

    def extend(self, hashes: Iterable[bytes]) -> None:
        """Add leaf hashes in order."""
        for leaf in hashes:
            self.append(leaf)

    def leaf(self, index: int) -> bytes:
        """The hash of one leaf."""
        if not 0 <= index < self.size:
            raise IndexError(f"no leaf {index} among {self.size}")
        return self._at(0, index)

    def root(self, size: int | None = None) -> bytes:
        """The root over the first `size` leaves (None: all), 32 bytes.

        Raises:
            IndexError: the tree is not that large.
        """
        return self._span(0, self._size(size))

    def inclusion(self, index: int, size: int | None = None) -> Proof:
        """The audit path of leaf `index` in the tree of the first `size` leaves (RFC 9162, 2.1.3.1).

        Raises:
            IndexError: no such leaf, or the tree is not that large.
        """
        low, high = 0, self._size(size)
        if not 0 <= index < high:
            raise IndexError(f"no leaf {index} among {high}")
        path = []
        while high - low > 1:
            middle = low + _split(high - low)
            if index < middle:
                path.append(self._span(middle, high))
                high = middle
            else:
                path.append(self._span(low, middle))
                low = middle
        return tuple(reversed(path))

    def consistency(self, old: int, new: int | None = None) -> Proof:
        """The proof that the tree of `old` leaves is the beginning of the tree of `new` leaves (RFC 9162, 2.1.4.1).

        Empty when `old` is 0 or equals `new`: then there is nothing to prove, or the roots say it.

        Raises:
            IndexError: `old` is above `new`, or the tree is not that large.
        """
        low, high = 0, self._size(new)
        if not 0 <= old <= high:
            raise IndexError(f"{old} leaves are not the beginning of {high}")
        if old == 0:
            return ()
        path, known = [], True  # known: the verifier has this subtree's hash, as it is its own root
        while old != high:
            middle = low + _split(high - low)
            if old <= middle:
                path.append(self._span(middle, high))
                high = middle
            else:
                path.append(self._span(low, middle))
                low, known = middle, False
        if not known:
            path.append(self._span(low, high))
        return tuple(reversed(path))

    def _size(self, size: int | None) -> int:
        if size is None:
            return self.size
        if not 0 <= size <= self.size:
            raise IndexError(f"the tree has {self.size} leaves, not {size}")
        return size

    def _at(self, depth: int, place: int) -> bytes:
        return bytes(self._levels[depth][HASH * place : HASH * (place + 1)])

    def _span(self, low: int, high: int) -> bytes:
        """The hash over leaves low..high; `low` is a multiple of the span's largest power of two, as in the RFC."""
        peaks = []
        while low < high:
            depth = (high - low).bit_length() - 1
            peaks.append(self._at(depth, low >> depth))
            low += 1 << depth
        if not peaks:
            return EMPTY
        node = peaks.pop()
        while peaks:
            node = node_hash(peaks.pop(), node)
        return node


def included(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether `proof` leads from a leaf hash at `index` to the root of `size` leaves (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size or not _hashes((leaf, root, *proof)):
        return False
    place, last, node = index, size - 1, leaf
    for other in proof:
        if last == 0:
            return False
        if place & 1 or place == last:
            node = node_hash(other, node)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            node = node_hash(node, other)
        place, last = place >> 1, last >> 1
    return last == 0 and node == root


def consistent(old: int, old_root: bytes, new: int, new_root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether `proof` shows that the tree of `old` leaves begins the tree of `new` (RFC 9162, 2.1.4.2)."""
    if not 0 <= old <= new or not _hashes((old_root, new_root, *proof)):
        return False
    if old == new:
        return not proof and old_root == new_root and (new > 0 or new_root == EMPTY)
    if old == 0:
        return not proof and old_root == EMPTY
    path = [old_root, *proof] if old & (old - 1) == 0 else list(proof)
    if not path:
        return False
    place, last = old - 1, new - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    before = after = path[0]
    for other in path[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            before, after = node_hash(other, before), node_hash(other, after)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            after = node_hash(after, other)
        place, last = place >> 1, last >> 1
    return last == 0 and before == old_root and after == new_root


def pack(proof: Sequence[bytes]) -> bytes:
    """A proof as one byte string, 32 bytes a hash."""
    return b"".join(proof)


def unpack(data: bytes) -> Proof:
    """What `pack` gave.

    Raises:
        Refusal: MALFORMED for a length that is no number of hashes, TOO_LARGE for more than `LONGEST`.
    """
    if len(data) % HASH:
        raise Refusal(RefusalCode.MALFORMED)
    if len(data) > HASH * LONGEST:
        raise Refusal(RefusalCode.TOO_LARGE)
    return tuple(data[at : at + HASH] for at in range(0, len(data), HASH))


def _split(size: int) -> int:
    """The largest power of two below `size` (which is 2 or more)."""
    return 1 << ((size - 1).bit_length() - 1)


def _hashes(values: Sequence[bytes]) -> bool:
    return len(values) <= LONGEST + 2 and all(len(value) == HASH for value in values)
