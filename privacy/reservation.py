"""What must RESERVE say of a study? Worked out from the signed study alone, by who writes it and by who doubts it.

The coordinator writes it (`server.books`); each site holds it against the study that it approved before it cosigns a
head over it (`privacy.witness`), and an officer against the study's file (`privacy.ledger_check`).
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

from privacy.accounting import events
from privacy.canonical import digest
from privacy.grants import Claims
from privacy.ledger import Reserve
from privacy.study import Study

LAST_DIGIT = Decimal("0.001")
"""ε is worked out in floating point and rounded up to this; two machines may stand on two sides of a digit."""


def reserve(study: Study, grants: Mapping[str, str]) -> Reserve:
    """The entry that reserves a study's whole plan.

    Args:
        grants: site → digest of its officer's grant, 64 hex digits.

    Raises:
        ConsiliumError: the study has no noise.
    """
    claims = Claims.of(study)
    plan = {
        role: [str(event.noise_multiplier), str(event.sampling_rate), event.count]
        for role, event in events(study, 1).items()
    }
    return Reserve(
        study=study.hash,
        plan=digest("ledger/plan", plan),
        slots=study.slots,
        grants=dict(grants),
        epsilon_aggregate=_plain(claims.epsilon),
        epsilon_broken=_plain(claims.cap),
        delta=study.privacy.delta,
    )


def differences(study: Study, found: Reserve) -> list[str]:
    """What an entry says otherwise than the study does, in words; nothing when it is the study's own.

    Args:
        found: what the log holds for this study's hash. Its grants are not looked at, but for whom they name.

    Raises:
        ConsiliumError: the study has no noise, so that nothing can be reserved for it.
    """
    due = reserve(study, found.grants)
    wrong = []
    if found.study != due.study:
        wrong.append("the study")
    if found.plan != due.plan:
        wrong.append("the digest of the plan")
    if found.slots != due.slots:
        wrong.append(f"slots: {found.slots}, not {due.slots}")
    for words, said, right in (
        ("ε against who sees aggregates", found.epsilon_aggregate, due.epsilon_aggregate),
        ("ε if secure aggregation were broken", found.epsilon_broken, due.epsilon_broken),
    ):
        if abs(Decimal(said) - Decimal(right)) > LAST_DIGIT:
            wrong.append(f"{words}: {said}, not {right}")
    if Decimal(found.delta) != Decimal(due.delta):
        wrong.append(f"δ: {found.delta}, not {due.delta}")
    if strangers := sorted(set(found.grants) - set(study.sites)):
        wrong.append(f"grants of sites that the study does not name: {', '.join(strangers)}")
    return wrong


def _plain(number: Decimal) -> str:
    return format(number.normalize(), "f")
