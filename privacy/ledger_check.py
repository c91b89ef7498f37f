"""Is this ledger whole? A privacy officer's check of an exported log, with nothing but the file and the rosters.

Everything is worked out again: each leaf's bytes and hash, the tree up to the head, the log's signature, the sites'
cosignatures, each release's signature, every rule of `privacy.ledger`, and what was reserved for each study that is
given with it. What a file alone cannot settle is a doubt, said and never passed over: entries behind the head, grants
whose text is not at hand, studies that were not given, sites that signed different requests.

The file has JSON lines: first {"ledger":1,"note":…,"size":…}, the head with its cosignatures and the number of
entries, then each entry's own bytes, oldest first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from privacy.canonical import canonical, parse
from privacy.checkpoint import NOTE_LIMIT, Checkpoint, Note, needed, origin, valid_head, witnesses_of
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.ledger import LEAF_LIMIT, Abort, Account, Leaf, Step, admit
from privacy.ledger_codes import LedgerRefusal
from privacy.merkle import Tree
from privacy.report import Report
from privacy.reservation import differences
from privacy.roster import Roster, timestamp
from privacy.study import Study

FORMAT = 1
HEAD_LIMIT = 2 * NOTE_LIMIT


class _Check:
    """The books while the entries are walked through."""

    def __init__(self, rosters: Sequence[Roster]) -> None:
        self.tree, self.books = Tree(), dict[str, Account]()
        self.kinds: Counter[str] = Counter()
        self.releases: Counter[tuple[str, str]] = Counter()
        self.requests: dict[tuple[str, int], str] = {}
        self.different: dict[tuple[str, int], str] = {}
        self.keys: dict[str, set[str]] = {}
        for roster in rosters:
            for site in roster.sites:
                self.keys.setdefault(site.name, set()).add(site.identity)

    def take(self, data: bytes) -> None:
        """One entry: its form, its signature, its place.

        Raises:
            ConsiliumError: it cannot stand there.
        """
        leaf = Leaf.read(data)
        entry = leaf.entry
        if isinstance(entry, Step):
            leaf.verify(self.keys.get(entry.site, set()))
            self.releases[entry.study, entry.site] += 1
            slot = (entry.study, entry.slot)
            if self.requests.setdefault(slot, entry.request) != entry.request:
                self.different[slot] = entry.site
        self.books[entry.study] = admit(self.books.get(entry.study), entry)
        self.tree.append(leaf.hash)
        self.kinds[entry.KIND.removeprefix("ledger-").upper()] += 1


def verify_ledger(
    leaves: Iterable[bytes],
    note: bytes,
    rosters: Sequence[Roster],
    colluding: int,
    studies: Mapping[str, Study] | None = None,
    path: Path = Path("ledger"),
) -> Report:
    """Check a whole ledger against the coordinator's and the sites' pinned keys.

    Args:
        leaves: every entry's bytes, oldest first.
        note: the head: a checkpoint with the log's signature and the sites' cosignatures.
        rosters: verified rosters of one consortium, any number of versions; the newest says who the n witnesses are,
            and all of them together which keys a site's older releases may be signed with.
        colluding: c, how many sites may lie together.
        studies: by hash; the log must have reserved for them what they say.
        path: what the report calls the ledger.

    Returns:
        Facts and doubts, or in `error` the first thing that is wrong, with the number of the entry.
    """
    if not rosters:
        raise ValueError("a ledger is checked against at least one roster")
    newest = max(rosters, key=lambda roster: roster.version)
    report = Report(path, f"ledger of `{newest.consortium}`")
    check = _Check(rosters)
    try:
        if len({(roster.consortium, roster.coordinator) for roster in rosters}) > 1:
            raise ConsiliumError("The rosters are of different consortia", str(path), "Give those of one consortium.")
        head = _head(Note.decode(note), newest, colluding, report)
        _walk(leaves, check, path)
        _under(head, check, path)
        held = _held(studies or {}, check.books, path)
    except ConsiliumError as error:
        return Report(path, "cannot be trusted", error=error)
    _tell(report, check, head, held)
    return report


def verify_file(
    path: Path, rosters: Sequence[Roster], colluding: int, studies: Mapping[str, Study] | None = None
) -> Report:
    """Check an exported ledger file; the arguments are those of `verify_ledger`."""
    try:
        with open(path, "rb") as file:
            note, size = _first(file.readline(HEAD_LIMIT + 1))
            counted = _Counted(file)
            report = verify_ledger(counted, note, rosters, colluding, studies, path)
    except OSError as error:
        words = f"{path}: {error.strerror}"
        fault = ConsiliumError("The file cannot be read", words, "Check the path and its permissions.")
        return Report(path, "cannot be trusted", error=fault)
    except Refusal as error:
        return Report(path, "cannot be trusted", error=error)
    if report.error is None and counted.count != size:
        fault = ConsiliumError(
            "The file does not hold as many entries as it says",
            f"{path}: {counted.count} of {size}",
            "It was cut off or added to; ask for a fresh export.",
        )
        return Report(path, "cannot be trusted", error=fault)
    return report


def first_line(note: Note, size: int) -> bytes:
    """The first line of an exported file, its end included."""
    return canonical({"ledger": FORMAT, "note": note.encode().decode(), "size": size}) + b"\n"


class _Counted:
    """The lines of a file behind its first, without their ends, and how many there were."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.count = file, 0

    def __iter__(self) -> Iterator[bytes]:
        while line := self._file.readline(LEAF_LIMIT + 2):
            self.count += 1
            yield line.removesuffix(b"\n")


def _first(line: bytes) -> tuple[bytes, int]:
    value = parse(line.removesuffix(b"\n"), HEAD_LIMIT)
    note, size = value.get("note"), value.get("size")
    if set(value) != {"ledger", "note", "size"} or value["ledger"] != FORMAT or isinstance(size, bool):
        raise Refusal(RefusalCode.MALFORMED, "ledger file")
    if not isinstance(note, str) or not isinstance(size, int):
        raise Refusal(RefusalCode.MALFORMED, "ledger file")
    return note.encode(), size


def _head(note: Note, roster: Roster, colluding: int, report: Report) -> Checkpoint:
    log, witnesses = origin(roster.consortium), witnesses_of(roster)
    head, times = valid_head(note, log, roster.coordinator, witnesses, colluding)
    report.facts.append(f"its head is signed by the coordinator's key in roster version {roster.version}")
    signed = ", ".join(
        f"{name.rpartition('/')[2]} at {timestamp(datetime.fromtimestamp(at, UTC))}"
        for name, at in sorted(times.items())
    )
    report.facts.append(
        f"{len(times)} of {len(witnesses)} sites cosigned it, {needed(len(witnesses), colluding)} are needed against "
        f"{colluding} that collude: {signed}"
    )
    silent = sorted(name.rpartition("/")[2] for name in witnesses if name not in times)
    if silent:
        report.doubts.append(f"why these sites have not cosigned this head: {', '.join(silent)}")
    return head


def _walk(leaves: Iterable[bytes], check: _Check, path: Path) -> None:
    for number, data in enumerate(leaves, 1):
        try:
            check.take(data)
        except (Refusal, LedgerRefusal) as error:
            raise ConsiliumError(
                f"Entry {number} of the ledger cannot stand there: {error.what[0].lower()}{error.what[1:]}",
                f"{error.subject} ({path})" if error.subject else str(path),
                "Keep the file as evidence, and ask the coordinator and the site named how it came about.",
            ) from error


def _under(head: Checkpoint, check: _Check, path: Path) -> None:
    if check.tree.size < head.size:
        raise ConsiliumError(
            "Entries are missing from the ledger",
            f"{path}: {check.tree.size} of the {head.size} under the head",
            "Ask for the whole export.",
        )
    if check.tree.root(head.size) != head.root:
        raise ConsiliumError(
            "The entries are not those that were signed",
            f"{path}: root {check.tree.root(head.size).hex()[:16]} instead of {head.root.hex()[:16]}",
            "An entry was changed, removed or put in between. Keep the file as evidence; ask a site for its copy.",
        )


def _held(studies: Mapping[str, Study], books: Mapping[str, Account], path: Path) -> dict[str, str]:
    """The names, by hash, of the given studies whose RESERVE is the one that follows from them.

    Raises:
        ConsiliumError: for one of them something else was reserved.
    """
    names = {}
    for hash_, study in studies.items():
        if hash_ not in books:
            continue
        if wrong := differences(study, books[hash_].reserve):
            raise ConsiliumError(
                "What was reserved in the ledger is not what the study says",
                f"study {study.study.name} ({hash_[:16]}), {path}: {'; '.join(wrong)}",
                "Keep the file as evidence, and ask the coordinator how it came about; count what the study says.",
            )
        names[hash_] = study.study.name
    return names


def _tell(report: Report, check: _Check, head: Checkpoint, held: Mapping[str, str]) -> None:
    kinds = ", ".join(f"{count} {kind}" for kind, count in check.kinds.items())
    report.facts.append(f"all {head.size} entries are under that head, none changed, removed or put in between")
    report.facts.append(f"entries: {kinds or 'none'}; every release is signed by its site, without a gap")
    if check.tree.size > head.size:
        report.doubts.append(f"the last {check.tree.size - head.size} entries: no head over them is in this file")
    for study, account in check.books.items():
        _tell_study(report, check, study, account, held.get(study, ""))
    for (study, slot), site in check.different.items():
        report.doubts.append(
            f"slot {slot} of study {study[:16]}: {site} signed another request than a site before it; the coordinator "
            "sent sites different requests"
        )


def _tell_study(report: Report, check: _Check, study: str, account: Account, name: str) -> None:
    reserve, final = account.reserve, account.final
    end = "still open" if final is None else f"aborted: {final.reason}" if isinstance(final, Abort) else (
        f"committed with {final.slots_used} slots"
    )  # fmt: skip
    report.facts.append(
        f"study {study[:16]}: ε {reserve.epsilon_aggregate} against who sees aggregates, {reserve.epsilon_broken} if "
        f"secure aggregation were broken, δ {reserve.delta}"
    )
    report.facts.append(f"  {account.slots_used} of {reserve.slots} slots signed; it is {end}")
    counts = ", ".join(f"{site} {check.releases[study, site]}" for site in sorted(reserve.grants))
    report.facts.append(f"  releases: {counts}")
    missing = "what each officer granted: compare the grants' digests with the files"
    if name:
        report.facts.append(f"  its plan, slots, ε and δ are those that follow from `{name}`, the study given")
    else:
        missing = f"whether ε follows from its plan ({reserve.plan[:16]}): add the study's file; and {missing}"
    report.doubts.append(f"study {study[:16]}: {missing}")
