"""How does a privacy officer keep a key and sign papers? One folder: the identity, and a copy of every paper issued.

The copies are the memory: the next serial for a site is one above its last copy, and a copy is on the disk before its
paper is handed out, so that no serial is ever used twice. Nothing here needs a network or a hospital's node.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path

from pydantic import ValidationError

from privacy import budget
from privacy.accounting import events
from privacy.budget import Lifetime
from privacy.claims import epsilon_rdp, rounded
from privacy.errors import ConsiliumError
from privacy.files import write_atomically, write_once
from privacy.grants import Allowance, Claims, Grant, shortfalls
from privacy.identity import Document, Identity, fingerprint
from privacy.roster import NAME, parse_timestamp
from privacy.study import KIND, Study

DAY = re.compile(r"\d{4}-\d\d-\d\d\Z")


@dataclass(frozen=True)
class Issued:
    """A signed paper, and where its copy lies."""

    document: Document
    serial: int
    copy: Path


@dataclass(frozen=True)
class Office:
    """An officer's folder."""

    root: Path

    @property
    def key(self) -> Path:
        """The identity; to be backed up, and never handed out."""
        return self.root / "officer.key"

    @property
    def public(self) -> Path:
        """The public key in one line of 64 hex digits; for the sites."""
        return self.root / "officer.pub"

    @property
    def issued(self) -> Path:
        """Copies of all papers."""
        return self.root / "issued"

    def create(self) -> str:
        """Make the folder and the identity; returns the public key.

        Raises:
            ConsiliumError: there is one already.
        """
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        identity = Identity.create(self.key)
        write_atomically(self.public, f"{identity.public}\n".encode(), 0o644)
        return identity.public

    def allow(self, site: str, epsilon: str, delta: str, order: int, settles: str = "") -> Issued:
        """Sign the lifetime budget of every patient at a site.

        Args:
            settles: the code of a doubt about the site's ledger that this settles; "" for none.

        Raises:
            ConsiliumError: numbers that cannot stand, or no identity here.
        """
        return self._issue(
            site,
            lambda serial: Allowance(
                site=site, serial=serial, epsilon=epsilon, delta=delta, order=order, settles=settles
            ),
        )

    def grant(self, study: Study, site: str, epsilon: str, cap: str, expires: str, now: datetime) -> Issued:
        """Sign the leave for one study at one site, when its plan claims no more than that.

        Args:
            epsilon, cap: decimal strings; the most against everyone who sees aggregates, and against one who breaks
                secure aggregation wholly.
            expires: a day (its end, UTC) or a moment such as 2030-01-31T12:00:00Z; the study may begin until then.

        Raises:
            ConsiliumError: the plan claims more, the study does not name the site, or a number cannot stand.
        """
        if site not in study.sites:
            raise ConsiliumError(
                "The study does not name this site", site, f"It names {', '.join(study.sites)}; compare the spelling."
            )
        moment = f"{expires}T23:59:59Z" if DAY.match(expires) else expires
        try:
            parse_timestamp(moment)
        except ValueError as error:
            raise ConsiliumError(
                "This is neither a day nor a moment",
                f"--expires {expires}",
                "Write a day, such as 2030-01-31 (until its end, UTC), or a moment, such as 2030-01-31T12:00:00Z.",
            ) from error
        claims = Claims.of(study)

        def paper(serial: int) -> Grant:
            made = Grant(
                site=site,
                serial=serial,
                delta=study.privacy.delta,
                study=study.hash,
                slots=study.slots,
                epsilon=epsilon,
                cap=cap,
                expires=moment,
            )
            if missing := shortfalls(made, claims):
                raise ConsiliumError(
                    "The study asks for more than you grant",
                    "; ".join(missing),
                    "Grant that much if you find it right, or ask the coordinator for a study with more noise.",
                )
            if made.expired(now):
                raise ConsiliumError("The grant would have expired already", moment, "Name a later --expires.")
            lifetime = self.lifetime(site)
            if lifetime is not None and (trouble := unfit(study, lifetime)):
                raise ConsiliumError(
                    f"The study does not fit the allowance of {site}",
                    trouble,
                    "Write a larger allowance first, or ask the coordinator for a study that fits.",
                )
            return made

        return self._issue(site, paper)

    def lifetime(self, site: str) -> Lifetime | None:
        """The lifetime budget last issued to a site."""
        papers = [path for _, path in self._copies(site) if path.name.endswith(f".{Allowance.KIND}.json")]
        return Allowance.of(Document.read(papers[-1], Allowance.KIND)).lifetime if papers else None

    def _issue(self, site: str, make: Callable[[int], Allowance | Grant]) -> Issued:
        if not NAME.match(site):
            raise ConsiliumError("This cannot be a site's name", site, "Small letters, digits and hyphens.")
        if not self.key.exists():
            raise ConsiliumError(
                "There is no officer's identity here",
                str(self.root),
                "Make one: `consilium-officer init FOLDER`, or name its folder with --home.",
            )
        identity = Identity.load(self.key)
        serial = max((number for number, _ in self._copies(site)), default=0) + 1
        try:
            paper = make(serial)
        except ValidationError as error:
            first = error.errors()[0]
            raise ConsiliumError(
                "An entry cannot stand",
                f"{'.'.join(map(str, first['loc'])) or 'the paper'}: {first['msg'].removeprefix('Value error, ')}",
                "Correct it and run the command again.",
            ) from error
        document = paper.signed(identity)
        self.issued.mkdir(exist_ok=True, mode=0o700)
        copy = self.issued / f"{site}.{serial:06d}.{paper.KIND}.json"
        write_once(copy, document.encode() + b"\n")
        return Issued(document, serial, copy)

    def _copies(self, site: str) -> list[tuple[int, Path]]:
        return sorted((int(path.name.split(".")[1]), path) for path in self.issued.glob(f"{site}.*.*.json"))


def read_study(path: Path, coordinator: str = "") -> tuple[Study, str]:
    """A signed study from a file, and the key that signed it.

    Args:
        coordinator: its fingerprint as read out over the telephone; "" when it was not compared.

    Raises:
        ConsiliumError: unreadable, unsigned, changed, or signed by somebody else.
    """
    document = Document.read(path, KIND)
    if not document.signatures:
        raise ConsiliumError("Nobody signed this study", str(path), "Ask the coordinator for the signed file.")
    wanted = "".join(coordinator.split()).lower()
    for signature in document.signatures:
        document.verify(signature.key)
    keys = [signature.key for signature in document.signatures if signature.key.startswith(wanted)]
    if not keys:
        raise ConsiliumError(
            "Another key signed this",
            f"{path}: {fingerprint(document.signatures[0].key)} instead of {fingerprint(wanted)}",
            "Do not use the file. Ask the coordinator, by telephone, which key is right.",
        )
    return Study.from_body(document.body), keys[0]


def unfit(study: Study, lifetime: Lifetime) -> str:
    """Why not even a patient who was never in a study could bear the plan; "" when he can (RULES B3, B5)."""
    if Decimal(study.privacy.delta) > Decimal(lifetime.delta):
        return f"its delta {study.privacy.delta} is above the lifetime's {lifetime.delta}"
    if Decimal(lifetime.delta) * study.privacy.patients_bound >= 1:
        return f"delta {lifetime.delta} promises nothing to one of {study.privacy.patients_bound} patients"
    parts = budget.plan(study).values()
    if not all(budget.fits(budget.NOTHING, part.whole, lifetime) for part in parts):
        return f"it costs more than epsilon {lifetime.epsilon} at order {lifetime.order}"
    return ""


def asks(study: Study, lifetime: Lifetime | None) -> list[tuple[str, str]]:
    """What a study asks of each patient, as (heading, sentence) pairs for the person who decides."""
    privacy, claims = study.privacy, Claims.of(study)
    shared = privacy.mode == "shared"
    lines = [
        ("Study", f"{study.study.title} ({study.study.name}), hash {study.hash}"),
        ("Purpose", study.study.purpose),
        ("Sites", ", ".join(study.sites)),
        ("Unit", "the patient, at one site: all of a patient's images added or removed"),
        (
            "Mechanism",
            f"{privacy.mode}: {'each hospital adds a share of' if shared else 'this hospital adds all'} the noise. A "
            f"patient adds at most {privacy.clip} to a step and is in it with chance {privacy.sampling_rate}; the sum "
            f"has noise {privacy.noise_multiplier} times that",
        ),
        ("Slots", f"{claims.slots} at most, every one of them charged to every patient, used or not"),
        ("Epsilon", f"{claims.epsilon:f} at delta {claims.delta:f}, against everyone who sees only sums"),
        ("Cap", f"{claims.cap:f} if secure aggregation were wholly broken: this hospital's own noise alone"),
    ]
    for role, part in budget.plan(study).items():
        cost = rounded(epsilon_rdp(events(study, 1)[role], privacy.delta))
        lines.append((f"A {role} patient", f"{part.count} releases, epsilon {cost} in all"))
    if lifetime is not None:
        share = max(budget.spent(part.whole, lifetime) for part in budget.plan(study).values())
        lines.append(
            (
                "Lifetime",
                f"{float(share):.1%} of a patient's lifetime budget (epsilon {lifetime.epsilon} at delta "
                f"{lifetime.delta}, order {lifetime.order}); whoever has less left is left out, silently",
            )
        )
    return lines
