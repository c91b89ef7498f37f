"""Is this file what it says it is? Checks signed documents and journals with nothing but the files themselves.

A key is only as good as the way it was learnt. So every signature is checked against the key that it names, and each
report says whether that key is tied to something else at hand: the consortium file, the roster, or a fingerprint that
was read out over the telephone. What could not be tied is said, never passed over.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privacy import journal
from privacy.errors import ConsiliumError, Refusal
from privacy.identity import DOCUMENT_LIMIT, Document, fingerprint
from privacy.ledger_check import verify_file
from privacy.report import Report
from privacy.roster import Consortium, Enrolment, Roster
from privacy.study import APPROVAL, KIND, Study, read_approval

KINDS = ("consortium", "roster", "enrolment", KIND, APPROVAL)


@dataclass(frozen=True)
class Known:
    """What the files given together vouch for. `coordinator` is a key, or the beginning of one."""

    coordinator: str = ""
    source: str = ""
    rosters: tuple[Roster, ...] = ()
    studies: dict[str, Study] = field(default_factory=dict)

    @property
    def roster(self) -> Roster | None:
        """The newest roster."""
        return max(self.rosters, key=lambda roster: roster.version, default=None)


@dataclass(frozen=True)
class Ledger:
    """An exported ledger; it may be large, so it is read when its turn comes, line by line."""

    path: Path


Item = Document | list[dict[str, Any]] | Ledger | ConsiliumError


def verify(paths: Sequence[Path], coordinator: str = "") -> list[Report]:
    """Check each file, using the others to tie keys to names; the order does not matter.

    Args:
        paths: consortium, roster, enrolment, study or approval files, a site's journal, or an exported ledger.
        coordinator: the fingerprint learnt another way (32 hex digits, spaces allowed), or "".
    """
    loaded = [_load(path) for path in paths]
    known = _learn([item for item in loaded if isinstance(item, Document)], coordinator)
    return [_report(path, item, known) for path, item in zip(paths, loaded, strict=True)]


def _load(path: Path) -> Item:
    try:
        with open(path, "rb") as file:
            first = file.readline(DOCUMENT_LIMIT + 1)
        head = json.loads(first)
        if isinstance(head, dict) and {"seq", "prev", "hash"} <= set(head):
            return list(journal.read(path))
        if isinstance(head, dict) and "ledger" in head:
            return Ledger(path)
        kind = head.get("kind") if isinstance(head, dict) else None
        if kind in KINDS:
            return Document.read(path, str(kind))
    except OSError as error:
        return ConsiliumError(
            "The file cannot be read", f"{path}: {error.strerror}", "Check the path and its permissions."
        )
    except ConsiliumError as error:
        return error
    except ValueError:
        pass
    return ConsiliumError(
        "This is not a file that can be verified",
        str(path),
        f"Name a signed {', '.join(KINDS[:-1])} or {KINDS[-1]} file, a site's journal.jsonl, or an exported ledger.",
    )


def _learn(documents: Iterable[Document], pinned: str) -> Known:
    pinned = "".join(pinned.split()).lower()
    key, source = pinned, "the fingerprint you gave" if pinned else ""
    rosters, studies = list[Roster](), dict[str, Study]()
    ordered = sorted(documents, key=lambda document: KINDS.index(document.kind))
    for document in ordered:
        try:
            if document.kind == "consortium":
                consortium = Consortium.verified(document)
                if not key or consortium.coordinator.startswith(key):
                    key, source = consortium.coordinator, source or "the consortium file"
            elif document.kind == "roster":
                candidate = Roster.of(document)
                if not key or candidate.coordinator.startswith(key):
                    rosters.append(Roster.verified(document, candidate.coordinator))
            elif document.kind == KIND:
                studies[document.digest] = Study.from_body(document.body)
        except Refusal:
            continue  # said when that file's own turn comes
    return Known(key, source, tuple(rosters), studies)


def _report(path: Path, item: Item, known: Known) -> Report:
    if isinstance(item, ConsiliumError):
        return Report(path, "cannot be trusted", error=item)
    try:
        if isinstance(item, list):
            return _journal(path, item)
        if isinstance(item, Ledger):
            return _ledger(path, known)
        return {
            "consortium": _consortium,
            "roster": _roster,
            "enrolment": _enrolment,
            KIND: _study,
            APPROVAL: _approval,
        }[item.kind](path, item, known)
    except ConsiliumError as error:
        return Report(path, "cannot be trusted", error=error)


def _coordinator(key: str, known: Known, report: Report) -> None:
    """Say whether `key` is the coordinator's."""
    report.facts.append(f"the signature is whole; its key is {fingerprint(key)}")
    if not known.coordinator:
        report.doubts.append(
            "whose key that is, this file cannot tell: compare it by telephone, or add consortium.json"
        )
    elif key.startswith(known.coordinator):
        report.facts.append(f"that is the coordinator's key according to {known.source}")
    else:
        raise ConsiliumError(
            "Another key signed this",
            f"{report.path}: {fingerprint(key)} instead of {fingerprint(known.coordinator)}",
            "Do not use the file. Ask the coordinator, by telephone, which key is right.",
        )


def _consortium(path: Path, document: Document, known: Known) -> Report:
    consortium = Consortium.verified(document)
    report = Report(path, f"consortium `{consortium.name}`")
    _coordinator(consortium.coordinator, known if known.source == "the fingerprint you gave" else Known(), report)
    report.facts.append(f"its SuperLink is {consortium.superlink}")
    return report


def _roster(path: Path, document: Document, known: Known) -> Report:
    roster = Roster.verified(document, Roster.of(document).coordinator)
    report = Report(path, f"roster of `{roster.consortium}`, version {roster.version}")
    _coordinator(roster.coordinator, known, report)
    for site in roster.sites:
        state = "revoked" if site.revoked else f"until {site.not_after[:10]}"
        report.facts.append(f"site {site.name}, {state}, key {fingerprint(site.identity)}")
    return report


def _enrolment(path: Path, document: Document, known: Known) -> Report:
    enrolment = Enrolment.verified(document)
    report = Report(path, f"enrolment of site `{enrolment.site}` in `{enrolment.consortium}`")
    report.facts.append(f"the signature is whole; its key is {fingerprint(enrolment.identity)}")
    report.facts.append(f"valid until {enrolment.not_after[:10]}")
    if enrolment.previous:
        report.facts.append(f"also signed with the key it replaces, {fingerprint(enrolment.previous)}")
    listed = next((s for s in known.roster.sites if s.name == enrolment.site), None) if known.roster else None
    if listed is not None and listed.identity == enrolment.identity and listed.node_key == enrolment.node_key:
        report.facts.append("the roster lists these very keys")
    else:
        report.doubts.append("whether the coordinator lists these keys: add its roster, or ask the site by telephone")
    return report


def _study(path: Path, document: Document, known: Known) -> Report:
    study = Study.from_body(document.body)
    report = Report(path, f"study `{study.study.name}`: {study.study.title}")
    report.facts.append(f"its hash is {document.digest}")
    if not document.signatures:
        raise ConsiliumError("Nobody signed this study", str(path), "Ask the coordinator for the signed file.")
    for signature in document.signatures:
        document.verify(signature.key)
    keys = [s.key for s in document.signatures]
    mine = [key for key in keys if known.coordinator and key.startswith(known.coordinator)]
    _coordinator(mine[0] if mine else keys[0], known, report)
    report.facts.append(f"every entry is written out; sites: {', '.join(study.sites)}")
    if study.privacy.mode == "none":
        report.facts.append("it grants NO differential privacy: for public data only")
    if study.secagg.mode == "off":
        report.facts.append("secure aggregation is OFF: the coordinator sees each hospital's update")
    return report


def _approval(path: Path, document: Document, known: Known) -> Report:
    try:
        body = read_approval(document)
    except Refusal:
        body = {}
    if not body or not document.signatures:
        raise ConsiliumError(
            "The approval is not complete", str(path), "Ask the site for it again: `consilium-site study approve`."
        )
    report = Report(path, f"approval by site `{body['site']}`")
    if known.roster is not None:
        key = known.roster.site(body["site"]).identity
        document.verify(key)
        report.facts.append(f"signed with the key the roster lists for {body['site']}: {fingerprint(key)}")
    else:
        key = document.signatures[0].key
        document.verify(key)
        report.facts.append(f"the signature is whole; its key is {fingerprint(key)}")
        report.doubts.append(f"whether that is {body['site']}'s key: add the roster")
    if body["one_image_per_patient"]:
        report.facts.append("its operator declared that one image is one patient, which the model's card repeats")
    study = known.studies.get(body["study"])
    if study is None:
        report.facts.append(f"it approves the study with hash {body['study']}")
        report.doubts.append("what that study says: add the study's file")
    elif body["site"] in study.sites:
        report.facts.append(f"it approves `{study.study.name}`, the study given, by its hash {body['study']}")
    else:
        raise ConsiliumError(
            "The approval is by a site that the study does not name", f"{body['site']}, {path}", "Do not count it."
        )
    return report


def _ledger(path: Path, known: Known) -> Report:
    newest = known.roster
    if newest is None:
        raise ConsiliumError(
            "A ledger is checked against the keys of its consortium",
            str(path),
            "Give the coordinator's roster with it; older ones too, if a site has changed its key.",
        )
    names = [site.name for site in newest.sites if not site.revoked]
    if len({newest.site(name).identity for name in names}) < len(names):
        raise ConsiliumError(
            "The roster lists one key for two sites",
            f"version {newest.version}",
            "One key counts for one witness. Ask the coordinator, by telephone, how that came about.",
        )
    assumed = [study.secagg.colluding for study in known.studies.values() if study.secagg.mode == "on"]
    report = verify_file(path, known.rosters, max(assumed, default=1), known.studies)
    if report.error is not None:
        return report
    _coordinator(newest.coordinator, known, report)
    if not assumed:
        report.doubts.append(
            "how many sites may collude: 1 is assumed; the study says it (secagg.colluding), so add its file"
        )
    return report


def _journal(path: Path, entries: list[dict[str, Any]]) -> Report:
    report = Report(path, f"journal of what left a site, {len(entries)} entries")
    report.facts.append("the chain is whole: no entry was changed, removed or put in between")
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for entry in entries:
        what = str(entry.get("what", "?"))
        counts[what] += 1
        sizes[what] += int(entry.get("size", 0)) if isinstance(entry.get("size"), int) else 0
    if entries:
        report.facts.append(f"from {entries[0].get('at', '?')} to {entries[-1].get('at', '?')}")
        report.facts.append(f"its head is {entries[-1]['hash']}")
    for what, count in counts.most_common():
        report.facts.append(f"{what}: {count} times, {sizes[what]:,} bytes")
    report.doubts.append("whether later entries were cut off: compare the head with one noted elsewhere")
    return report
