"""How fast is the ledger, how small are its proofs, and how fast does a hospital charge its patients' budgets?

    make bench-ledger                            # 200,000 entries in the tree, 20,000 in the database, 2,000 charges
    .venv/bin/python -m tests.bench.ledger --postgres  # on a PostgreSQL of its own too

In memory: leaf hash and tree. In the database: entries already encoded and verified, in one transaction, and one by
one, each on the disk (fsync) before the next. Encoding, signing and reading are given apart, as sites and the wire
carry them. A hospital's own ledger charges slots one by one, each durable, with 2,000 of the same study behind them.
Times are medians of several runs but for the batches, which are run once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from client.agent.store import Store
from privacy.accounting import Role
from privacy.identity import Identity
from privacy.ledger import Leaf
from privacy.ledger_check import verify_file
from privacy.merkle import Tree, consistent, included, leaf_hash, pack
from privacy.report import Report
from server.ledger import Ledger
from tests.bench.table import Line, show
from tests.privacy import grant_kit
from tests.privacy.ledger_kit import (
    CONSORTIUM,
    COORDINATOR,
    NAMES,
    NOW,
    ROSTER,
    SITES,
    approved,
    reserve,
    step,
    witness,
)
from tests.server import postgres_kit

TREE, BATCH, SINGLE, RUNS, CHARGES, PATIENTS = 200_000, 20_000, 300, 200, 2_000, 1_000


class Taken(NamedTuple):
    """Seconds on the clock, and of processor time."""

    clock: float
    processor: float


def taken(call: Callable[[], object]) -> Taken:
    """What one call took."""
    start, busy = time.perf_counter(), time.process_time()
    call()
    return Taken(time.perf_counter() - start, time.process_time() - busy)


def median_us(call: Callable[[int], object], runs: int = RUNS) -> float:
    """The median of several calls, in microseconds; each is given its number."""
    return 1e6 * statistics.median(taken(lambda i=i: call(i)).clock for i in range(runs))


def rate(what: str, each: Taken, least: float | None = None, **beside: float) -> Line:
    """A rate, shown as the time of one entry, so that less is better and a goal can be met."""
    goal, rule = (1e6 / least, f"{least:,.0f} a second") if least else (None, "")
    beside = {"processor": 1e6 * each.processor, "a second": 1 / each.clock, **beside}
    return Line(what, "µs", 1e6 * each.clock, beside, goal, rule)


def shared(whole: Taken, among: int) -> Taken:
    """One entry's part of what many took."""
    return Taken(whole.clock / among, whole.processor / among)


def median(times: list[Taken]) -> Taken:
    """The median of what several calls took."""
    return Taken(statistics.median(t.clock for t in times), statistics.median(t.processor for t in times))


def bare_fsync(folder: Path) -> float:
    """Seconds that this disk takes to write 4 KiB for good, the median."""
    with open(folder / "fsync", "wb") as file:

        def once() -> None:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())

        return statistics.median(taken(once).clock for _ in range(RUNS))


def tree_lines() -> list[Line]:
    """The tree alone."""
    data = [b"%0400d" % i for i in range(TREE)]
    tree = Tree()
    took = taken(lambda: tree.extend(map(leaf_hash, data)))
    root, old = tree.root(), TREE // 3
    before, grown = tree.root(old), tree.consistency(old)
    paths = [tree.inclusion(i * 997 % TREE) for i in range(RUNS)]
    longest = max(len(pack(path)) for path in (*paths, grown))

    def check(i: int) -> None:
        place = i * 997 % TREE
        assert included(tree.leaf(place), place, TREE, paths[i], root)

    def grew(_: int) -> None:
        assert consistent(old, before, TREE, root, grown)

    return [
        rate(f"append in memory, {TREE:,} entries", shared(took, TREE), 100_000),
        Line("  longest proof", "bytes", longest, {}, 1000.0, "under a kilobyte"),
        Line("  inclusion proof, made", "µs", median_us(lambda i: tree.inclusion(i * 997 % TREE))),
        Line("  inclusion proof, verified", "µs", median_us(check)),
        Line("  consistency proof, made", "µs", median_us(lambda _: tree.consistency(old))),
        Line("  consistency proof, verified", "µs", median_us(grew)),
    ]


def entry_lines(leaves: list[Leaf]) -> list[Line]:
    """What an entry costs before it is written."""
    key = {SITES[NAMES[0]].public}
    return [
        Line("a release, encoded and signed", "µs", median_us(lambda i: step(NAMES[0], i + 1))),
        Line("  read strictly", "µs", median_us(lambda i: Leaf.read(leaves[1 + i].data))),
        Line("  its signature verified", "µs", median_us(lambda i: leaves[1 + len(NAMES) * i].verify(key))),
        Line("  its size", "bytes", max(len(leaf.data) for leaf in leaves[1:])),
    ]


@contextlib.contextmanager
def closing(url: str) -> Iterator[Ledger]:
    """A ledger that is let go of at the end."""
    ledger = Ledger(url, CONSORTIUM)
    try:
        yield ledger
    finally:
        ledger.close()


def store_lines(name: str, url: str, leaves: list[Leaf], folder: Path, least: tuple[float, float]) -> list[Line]:
    """The database: batch, single, head, opening, export and the officer's check."""
    batch, single = leaves[:-SINGLE], leaves[-SINGLE:]
    with closing(url) as ledger:
        together = taken(lambda: ledger.append(batch))
        disk = bare_fsync(folder)
        each = median([taken(lambda leaf=leaf: ledger.append([leaf])) for leaf in single])
        head = taken(lambda: ledger.checkpoint(COORDINATOR))
        size = ledger.size
        for site in NAMES:
            fresh = witness(site)
            line = fresh.cosign(SITES[site], ledger.proposal(site, 0), NOW, approved)[1]
            ledger.add_cosignature(size, site, line, SITES[site].public)
        path = folder / f"{name}.jsonl"
        out = taken(lambda: ledger.export(path))
    with contextlib.ExitStack() as stack:
        opened = taken(lambda: stack.enter_context(closing(url)))
    reports: list[Report] = []
    checked = taken(lambda: reports.append(verify_file(path, [ROSTER], 1)))
    assert reports[0].error is None
    return [
        rate(f"{name}: append, {len(batch):,} together", shared(together, len(batch)), least[0]),
        rate(f"{name}: append, each durable", each, least[1], **{"bare fsync": 1e6 * disk}),
        Line(f"{name}: head signed and kept", "ms", 1e3 * head.clock),
        rate(f"{name}: opened, of each entry", shared(opened, size)),
        rate(f"{name}: exported, of each entry", shared(out, size)),
        rate(f"{name}: checked by the officer", shared(checked, size)),
    ]


def charge_lines(folder: Path) -> list[Line]:
    """A hospital's own ledger: slots charged with none and with many of the same study behind them."""
    study = grant_kit.study(noise="20", rounds=CHARGES + SINGLE)
    officer, store = Identity.generate(), Store(folder / "agent.db")
    with contextlib.closing(store):
        purse = store.purse(grant_kit.SITE)
        purse.verify_whole(bytes(32))
        purse.trust(officer.public)
        purse.take(grant_kit.allowance(officer, epsilon="1000"))
        purse.take(grant_kit.grant(officer, study, epsilon="1000", cap="1000"))
        roles: tuple[Role, ...] = ("train", "train", "train", "validation", "test")
        members = {f"{number:064x}": roles[number % len(roles)] for number in range(PATIENTS)}
        purse.reserve(study, members)
        slots = range(1, CHARGES + SINGLE + 1)
        took = [taken(lambda slot=slot: purse.charge(study, slot, "train", slot, f"{slot:064x}")) for slot in slots]
        disk = bare_fsync(folder)
    first, last = median(took[:SINGLE]), median(took[-SINGLE:])
    return [
        rate("A hospital's ledger: charge, each durable", first, 200),
        rate(f"A hospital's ledger: charge, {CHARGES:,} behind", last, 200, **{"bare fsync": 1e6 * disk}),
    ]


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--postgres", action="store_true", help="also on a PostgreSQL started for it")
    options = parser.parse_args()
    lines = tree_lines()
    count = (BATCH + SINGLE) // len(NAMES)
    leaves = [reserve(slots=count), *(step(s, slot) for slot in range(1, count + 1) for s in NAMES)]
    lines += entry_lines(leaves)
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-ledger-") as name:
        folder = Path(name).resolve()
        lines += store_lines("SQLite", f"sqlite:///{folder / 'ledger.db'}", leaves, folder, (20_000, 200))
        if options.postgres:
            with postgres_kit.running(fsync=True) as socket:
                lines += store_lines("PostgreSQL", postgres_kit.url(socket), leaves, folder, (2_000, 50))
        lines += charge_lines(folder)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    show("ledger", "The ledger", lines, [f"Load of the machine: {load}"])


if __name__ == "__main__":
    main()
