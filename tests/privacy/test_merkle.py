"""The hash tree of RFC 9162: the vectors of Certificate Transparency, every proof of small trees, and no forged one."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import Refusal, RefusalCode
from privacy.merkle import EMPTY, Tree, consistent, included, leaf_hash, node_hash, pack, unpack

CT_LEAVES = [bytes.fromhex(text) for text in (
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
)]  # fmt: skip
CT_ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
"""Roots of the first 0 to 8 leaves: the reference data of Certificate Transparency's own tests."""
LARGEST = 130
TREE = Tree(leaf_hash(bytes([i])) for i in range(LARGEST))


def plain_root(hashes: list[bytes]) -> bytes:
    """The definition of RFC 9162, 2.1.1, word for word: a check of the tree that shares no code with it."""
    if not hashes:
        return hashlib.sha256().digest()
    if len(hashes) == 1:
        return hashes[0]
    half = 1
    while half * 2 < len(hashes):
        half *= 2
    return node_hash(plain_root(hashes[:half]), plain_root(hashes[half:]))


def turns(index: int, size: int) -> str:
    """How an audit path climbs from the leaf to the root: on which side its siblings stand."""
    if size == 1:
        return ""
    half = 1
    while half * 2 < size:
        half *= 2
    return turns(index, half) + "R" if index < half else turns(index - half, size - half) + "L"


@pytest.mark.parametrize("size", range(9))
def test_the_roots_of_certificate_transparency(size):
    tree = Tree(leaf_hash(data) for data in CT_LEAVES[:size])
    assert tree.root().hex() == CT_ROOTS[size]
    assert Tree(leaf_hash(data) for data in CT_LEAVES).root(size).hex() == CT_ROOTS[size]


def test_leaf_and_node_never_share_a_hash():
    left, right = bytes(32), bytes([1]) * 32
    assert leaf_hash(left + right) != node_hash(left, right)
    assert leaf_hash(b"") != EMPTY


def test_every_root_of_small_trees_is_the_one_of_the_definition():
    hashes = [TREE.leaf(i) for i in range(LARGEST)]
    assert [TREE.root(n) for n in range(LARGEST + 1)] == [plain_root(hashes[:n]) for n in range(LARGEST + 1)]


def test_every_inclusion_proof_of_small_trees_holds_for_its_leaf_only():
    for size in range(1, LARGEST):
        root = TREE.root(size)
        for index in range(size):
            proof = TREE.inclusion(index, size)
            assert included(TREE.leaf(index), index, size, proof, root)
            assert not included(TREE.leaf(index), (index + 1) % size, size, proof, root) or size == 1
            assert not included(TREE.leaf((index + 1) % size), index, size, proof, root) or size == 1


def test_every_consistency_proof_of_small_trees_holds():
    for new in range(LARGEST):
        for old in range(new + 1):
            assert consistent(old, TREE.root(old), new, TREE.root(new), TREE.consistency(old, new))


def test_no_consistency_proof_joins_a_tree_that_differs_in_one_historic_leaf():
    for changed in (0, 17, 63, 64):
        other = Tree(TREE.leaf(i) if i != changed else leaf_hash(b"changed") for i in range(LARGEST))
        for old in range(changed + 1, LARGEST):
            assert not consistent(old, TREE.root(old), LARGEST, other.root(), other.consistency(old))
            assert not consistent(old, TREE.root(old), LARGEST, other.root(), TREE.consistency(old))


sizes = st.integers(1, LARGEST)


@settings(max_examples=150)
@given(st.data())
def test_one_flipped_bit_in_leaf_proof_or_root_fails(data):
    size = data.draw(sizes)
    index = data.draw(st.integers(0, size - 1))
    parts = [TREE.leaf(index), TREE.root(size), *TREE.inclusion(index, size)]
    at, bit = data.draw(st.integers(0, len(parts) - 1)), data.draw(st.integers(0, 255))
    parts[at] = (int.from_bytes(parts[at], "big") ^ 1 << bit).to_bytes(32, "big")
    assert not included(parts[0], index, size, parts[2:], parts[1])


@settings(max_examples=150)
@given(st.data())
def test_one_flipped_bit_in_a_consistency_proof_fails(data):
    new = data.draw(st.integers(2, LARGEST))
    old = data.draw(st.integers(1, new - 1))
    parts = [TREE.root(old), TREE.root(new), *TREE.consistency(old, new)]
    at, bit = data.draw(st.integers(0, len(parts) - 1)), data.draw(st.integers(0, 255))
    parts[at] = (int.from_bytes(parts[at], "big") ^ 1 << bit).to_bytes(32, "big")
    assert not consistent(old, parts[0], new, parts[1], parts[2:])


@settings(max_examples=150)
@given(st.data())
def test_another_index_or_size_holds_only_where_the_path_is_the_same(data):
    """A root does not bind its size (the signed head does); whatever else is flipped fails."""
    size = data.draw(sizes)
    index = data.draw(st.integers(0, size - 1))
    flipped_index, flipped_size = data.draw(
        st.tuples(st.just(index), st.integers(0, 12).map(lambda b: size ^ 1 << b))
        | st.tuples(st.integers(0, 12).map(lambda b: index ^ 1 << b), st.just(size))
    )
    same = flipped_index < flipped_size and turns(flipped_index, flipped_size) == turns(index, size)
    assert same <= (flipped_index == index)
    assert included(TREE.leaf(index), flipped_index, flipped_size, TREE.inclusion(index, size), TREE.root(size)) == same


@settings(max_examples=150)
@given(st.data())
def test_a_proof_with_a_hash_more_or_less_fails(data):
    new = data.draw(st.integers(2, LARGEST))
    old = data.draw(st.integers(1, new - 1))
    path, grown = TREE.inclusion(old, new), TREE.consistency(old, new)
    extra = data.draw(st.binary(min_size=32, max_size=32))
    assert not included(TREE.leaf(old), old, new, path[:-1], TREE.root(new))
    assert not included(TREE.leaf(old), old, new, (*path, extra), TREE.root(new))
    assert not consistent(old, TREE.root(old), new, TREE.root(new), grown[:-1])
    assert not consistent(old, TREE.root(old), new, TREE.root(new), (*grown, extra))


@given(sizes, sizes)
def test_a_tree_that_shrank_or_has_another_root_at_one_size_is_never_consistent(one, two):
    if one < two:
        assert not consistent(two, TREE.root(two), one, TREE.root(one), TREE.consistency(one, two))
    assert not consistent(one, TREE.root(one), one, leaf_hash(b"other"), ())
    assert not consistent(0, leaf_hash(b"other"), one, TREE.root(one), ())
    assert consistent(0, EMPTY, one, TREE.root(one), ())
    assert not consistent(0, EMPTY, one, TREE.root(one), (bytes(32),))


@pytest.mark.parametrize("short", [b"", bytes(31), bytes(33)])
def test_only_hashes_of_32_bytes_are_hashes(short):
    with pytest.raises(ValueError, match="32 bytes"):
        Tree([short])
    assert not included(short, 0, 1, (), short)
    assert not consistent(1, TREE.root(1), 2, TREE.root(2), (short,))


def test_what_the_tree_does_not_have_is_an_error_not_a_proof():
    for call in (
        lambda: TREE.root(LARGEST + 1),
        lambda: TREE.inclusion(5, 5),
        lambda: TREE.inclusion(-1, 5),
        lambda: TREE.inclusion(0, LARGEST + 1),
        lambda: TREE.consistency(6, 5),
        lambda: TREE.consistency(0, LARGEST + 1),
        lambda: TREE.leaf(LARGEST),
        lambda: TREE.root(-1),
    ):
        with pytest.raises(IndexError):
            call()


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=64))
def test_a_packed_proof_reads_back(hashes):
    assert unpack(pack(hashes)) == tuple(hashes)


@pytest.mark.parametrize(("data", "code"), [(bytes(33), "malformed"), (bytes(32 * 65), "too-large")])
def test_a_packed_proof_of_another_length_is_refused(data, code):
    with pytest.raises(Refusal) as caught:
        unpack(data)
    assert caught.value.code is RefusalCode(code)
