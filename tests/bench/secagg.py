"""How fast is a secure sum, beside Flower's own SecAgg+ functions and beside a bare keystream?

    make bench-secagg                             # 1e5 and 1e6 numbers at 5, 10 and 50 sites, 1e7 at 10
    .venv/bin/python -m tests.bench.secagg --full # 1e7 at 5 and 50 too

Medians of several runs in one process, the sides taking turns. Client: quantise, mask and serialise one site's vector.
Server: add the masked vectors of all sites, then take the masks off. Flower: `_collect_masked_vectors` as its SecAgg+
client runs it (full graph, its default ranges), and its server's additions and unmasking. Key agreement is left out on
our side as it happens once in a session of slots; Flower agrees on keys anew in every round and inside that function.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from privacy.canonical import sha256
from privacy.secagg import masks, site
from privacy.secagg.coordinator import SecureSum
from privacy.secagg.fixed import encode
from privacy.secagg.keys import self_mask_key
from tests.bench.table import Line, show
from tests.privacy.secagg.secagg_kit import HEADER, World, plan

STATISTICS, DISTINCT = 100, 10
QUICK = [(100_000, 5), (100_000, 10), (100_000, 50), (1_000_000, 5), (1_000_000, 10), (1_000_000, 50), (10_000_000, 10)]
FULL = sorted([*QUICK, (10_000_000, 5), (10_000_000, 50)])
GOAL = (10_000_000, 10)


@dataclass(frozen=True)
class Part:
    """Something to be timed; `before` is not."""

    call: Callable[[], object]
    before: Callable[[], object] = lambda: None


class Taken(NamedTuple):
    """Milliseconds on the clock, and of processor time over all threads."""

    clock: float
    processor: float


def medians(parts: Mapping[str, Part], runs: int) -> dict[str, Taken]:
    """What each part took, the median of several runs; the parts take turns, so that all meet the same load."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    processor: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(runs):
        for name, part in parts.items():
            part.before()
            gc.collect()
            start, busy = time.perf_counter(), time.process_time()
            part.call()
            seconds[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - busy)
    return {name: Taken(*(1000.0 * statistics.median(times[name]) for times in (seconds, processor))) for name in parts}


@dataclass
class Ours:
    """One study with all its sites, and one site's float update."""

    size: int
    sites: int

    def __post_init__(self) -> None:
        self.world = World(plan(self.sites, self.size, STATISTICS), slots=1)
        self.name = self.world.ring.sites[self.sites // 2]
        generator = np.random.default_rng(1)
        self.update = generator.normal(scale=0.01, size=self.size).astype(np.float32)
        self.numbers = np.full(STATISTICS, 100.0, np.float32)
        self.words = encode(self.world.plan, self.update, self.numbers)

    def client(self) -> memoryview:
        """Quantise, mask, serialise: the bytes that would leave."""
        words = encode(self.world.plan, self.update, self.numbers)
        site.mask(self.world[self.name].ready, 1, HEADER, self.world.ring.sites, words)
        return words.astype("<u4", copy=False).data.cast("B")

    def mask(self) -> None:
        """The masks only."""
        site.mask(self.world[self.name].ready, 1, HEADER, self.world.ring.sites, self.words)

    def extra(self) -> float:
        """Peak memory that a client takes beyond the float update it starts from, in vectors of 4 bytes a number."""
        gc.collect()
        tracemalloc.start()
        self.client()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak / self.words.nbytes

    def fresh(self) -> None:
        """An empty sum."""
        self.total = SecureSum(self.world.ring, 1, HEADER, self.world.ring.sites, len(self.words))

    def prepare(self) -> None:
        """Masked vectors of up to ten sites, used in turn: fifty of 40 MB would not fit a small machine."""
        self.vectors = []
        for name in self.world.ring.sites[:DISTINCT]:
            words = self.words.copy()
            site.mask(self.world[name].ready, 1, HEADER, self.world.ring.sites, words)
            self.vectors.append((words, sha256(words.data.cast("B"))))
        self.answers = {
            name: self.world[name].answer(1, HEADER, self.words, payload_sha256=self.vectors[at % DISTINCT][1])
            for at, name in enumerate(self.world.ring.sites)
        }
        ring = self.world.ring.sites
        self.openings = {n: self.world[n].open(1, HEADER, ring, ring, self.answers) for n in ring}

    def add(self) -> None:
        """All sites' vectors; the digest was taken while they arrived."""
        for at, (name, answer) in enumerate(self.answers.items()):
            words, digest = self.vectors[at % DISTINCT]
            self.total.add(name, answer, words, digest)

    def added(self) -> None:
        """A sum with all vectors in it."""
        self.fresh()
        self.add()

    def unmask(self) -> None:
        """Openings checked, seeds put together, masks removed."""
        self.total.open(self.openings)


def bare(numbers: int, keys: int) -> None:
    """The keystreams that a client needs and nothing else, in as many threads as the masks take."""
    threads = masks.threads_for(numbers, keys)
    seeds = [self_mask_key(bytes([at]) * 32, bytes(32)) for at in range(keys)]

    def half(start: int, stop: int) -> None:
        zeros, out = bytes(4 * masks.BLOCK), bytearray(4 * masks.BLOCK + 15)
        counter = modes.CTR((start // 4).to_bytes(16, "big"))
        for seed in seeds:
            stream = Cipher(algorithms.AES(seed), counter).encryptor()
            for position in range(start, stop, masks.BLOCK):
                stream.update_into(memoryview(zeros)[: 4 * min(masks.BLOCK, stop - position)], out)

    masks.in_halves(numbers, threads, half)


class Flower:
    """Flower's own functions, fed as its workflow feeds them, on a full graph."""

    def __init__(self, size: int, sites: int) -> None:
        from flwr.common import ndarrays_to_parameters
        from flwr.supercore.primitives.asymmetric import (
            generate_key_pairs,
            private_key_to_bytes,
            public_key_to_bytes,
        )

        # the package's name of it is the function
        mod = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
        self.mod, self.sites = mod, sites
        self.update = np.random.default_rng(1).normal(scale=0.01, size=size).astype(np.float32)
        self.parameters = ndarrays_to_parameters([self.update])
        pairs = {node: generate_key_pairs() for node in range(sites)}
        state: Any = mod.SecAggPlusState()
        state.nid, state.threshold, state.max_weight = sites // 2, 2, 1000.0
        state.clipping_range, state.target_range, state.mod_range = 8.0, 1 << 22, 1 << 32
        state.rd_seed = bytes(range(32))
        state.sk1 = private_key_to_bytes(pairs[state.nid][0])
        state.public_keys_dict = {node: (public_key_to_bytes(pair[1]), b"") for node, pair in pairs.items()}
        state.rd_seed_share_dict, state.sk1_share_dict, state.ss2_dict = {}, {}, {}
        self.state = state
        self.neighbours = [node for node in range(sites) if node != state.nid]

    def client(self) -> None:
        """Its stage 2: the shares of others are given as read already, so that only the vector's work is timed."""
        from flwr.common import ConfigRecord
        from flwr.common.secure_aggregation.secaggplus_constants import Key

        shares = [b"" for _ in self.neighbours]
        self.state.ss2_dict = dict.fromkeys(self.neighbours, b"")
        decrypt, separate = self.mod.decrypt, self.mod.share_keys_plaintext_separate
        given = iter(self.neighbours)
        self.mod.decrypt = lambda key, text: b""
        self.mod.share_keys_plaintext_separate = lambda text: (next(given), self.state.nid, b"", b"")
        try:
            configs = ConfigRecord({Key.CIPHERTEXT_LIST: shares, Key.SOURCE_LIST: self.neighbours})
            self.out = self.mod._collect_masked_vectors(self.state, configs, 100, self.parameters)
        finally:
            self.mod.decrypt, self.mod.share_keys_plaintext_separate = decrypt, separate

    def server(self) -> None:
        """Its additions of all sites' vectors and the removal of their self masks."""
        from flwr.common import bytes_to_ndarray
        from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic
        from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
        from flwr.common.secure_aggregation.secaggplus_constants import Key
        from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

        masked = [bytes_to_ndarray(data) for data in self.out[Key.MASKED_PARAMETERS]]
        total = [np.zeros_like(array) for array in masked]
        for _ in range(self.sites):
            total = arithmetic.parameters_addition(total, masked)
        total = arithmetic.parameters_mod(total, 1 << 32)
        shapes = [array.shape for array in total]
        needed = self.sites // 2 + 1
        shares = create_shares(bytes(range(32)), needed, self.sites)[:needed]
        for _ in range(self.sites):
            seed = combine_shares(shares)
            total = arithmetic.parameters_subtraction(total, pseudo_rand_gen(seed, 1 << 32, shapes))
        arithmetic.parameters_mod(total, 1 << 32)


def measure(size: int, sites: int, runs: int) -> list[Line]:
    """All lines of one size."""
    label, goal = f"{size:,} numbers, {sites} sites", (size, sites) == GOAL
    ours, flower = Ours(size, sites), Flower(size, sites)
    ours.prepare()
    ours.client()
    fast = medians({"client": Part(ours.client), "Flower": Part(flower.client)}, runs)
    fast |= medians({"masks": Part(ours.mask), "stream": Part(lambda: bare(len(ours.words), sites))}, runs)
    fast |= medians({"sum": Part(ours.add, ours.fresh), "unmask": Part(ours.unmask, ours.added)}, runs)
    fast |= medians({"Flower's server": Part(flower.server)}, max(1, runs // 3))
    client, masking, stream, adding, unmasking = (fast[n] for n in ("client", "masks", "stream", "sum", "unmask"))
    theirs, server = fast["Flower"].clock, fast["Flower's server"].clock
    return [
        Line(f"{label}: client", "ms", client.clock, {"Flower SecAgg+": theirs},
             theirs / 8 if goal else None, "8 times as fast" if goal else ""),
        Line("  of it, masks", "ms", masking.clock, {"bare AES-CTR": stream.clock},
             1.5 * stream.clock if goal else None, "1.5 times the keystream" if goal else ""),
        Line("  masks, processor", "ms", masking.processor, {"bare AES-CTR": stream.processor}),
        Line("  extra memory, vectors", "", ours.extra(), {},
             1.5 if goal else None, "of 4 bytes a number" if goal else ""),
        Line("  server, sum and unmask", "ms", adding.clock + unmasking.clock, {"Flower SecAgg+": server}),
        Line("  of it, unmask", "ms", unmasking.clock, {"sum": adding.clock},
             1.5 * adding.clock if goal else None, "1.5 times the sum" if goal else ""),
        Line("  unmask, processor", "ms", unmasking.processor, {"sum": adding.processor}),
    ]  # fmt: skip


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also 1e7 numbers at 5 and 50 sites")
    parser.add_argument("--only", default="", help="one size, such as 10000000x10")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    sizes = [tuple(int(part) for part in options.only.split("x"))] if options.only else FULL if options.full else QUICK
    lines = [line for size, sites in sizes for line in measure(size, sites, options.runs)]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    notes = [f"AES-256; Flower's keystream is numpy's Mersenne twister. Load of the machine: {load}"]
    show("secagg", "A secure sum, medians", lines, notes)


if __name__ == "__main__":
    main()
