"""Does another accountant agree? Opacus' PRV accountant recomputes ε before a study with noise is signed (RULES B4).

Two programs by two groups, two algorithms: privacy loss distributions (`privacy.claims`, Google's dp_accounting) and
privacy random variables (Gopi, Lee and Wutschitz 2021, arXiv 2106.02848, as Opacus has it). Both account for the
continuous idealisation of the same events, so both must come to the same ε. It is compared where a figure means
something, in tier one when RDP or PLD says ε ≤ 20, and at signing only: who verifies a study needs no torch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from fractions import Fraction

from privacy import claims
from privacy.accounting import Event, events
from privacy.claims import HOPELESS, epsilon_rdp
from privacy.errors import ConsiliumError
from privacy.study import Study

MOST_EPSILON = 20.0
MOST_APART = 0.02
ERROR = 0.005
"""What the second accountant may be wrong by, as it says itself; the ε it gives is above the true one by about that."""

Opinion = Callable[[Event, str], float]
"""From an event and δ to ε."""


def prv(event: Event, delta: str) -> float:
    """ε of an event by Opacus' PRV accountant: its upper bound.

    Raises:
        ValueError, ArithmeticError, RuntimeError: it cannot tell.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opacus and torch speak to programmers, at import and at every call
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(float(event.noise_multiplier), float(event.sampling_rate), event.count)]
        return float(accountant.get_epsilon(float(Fraction(delta)), eps_error=ERROR))


def check(study: Study, opinion: Opinion = prv) -> None:
    """Make sure that a study's tier-one ε is no accountant's error.

    Args:
        study: any; one without noise has nothing to check.
        opinion: the second accountant.

    Raises:
        ConsiliumError: the two differ by more than 0.02, or the second cannot tell.
    """
    if study.privacy.mode == "none":
        return
    delta = study.privacy.delta
    for role, event in _distinct(study).items():
        binding = epsilon_rdp(event, delta)
        if event.sampling_rate == 0 or binding > HOPELESS:  # nothing is claimed but RDP
            continue
        first = _pld(event, delta, binding)
        if min(first, binding) > MOST_EPSILON:
            continue
        try:
            second = opinion(event, delta)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            raise ConsiliumError(
                "The second accountant cannot confirm the study's epsilon",
                f"{study.study.name}, {role} patients: {error}",
                "Change noise_multiplier, sampling_rate or the number of rounds a little; "
                "`consilium-coordinator study plan` shows what each gives.",
            ) from error
        if not math.isfinite(second) or abs(first - second) > MOST_APART:
            raise ConsiliumError(
                "Two accountants disagree about the study's epsilon, so it is not signed",
                f"{study.study.name}, {role} patients: PLD says {first:.3f}, PRV says {second:.3f}",
                "Make sure that dp-accounting and opacus are the releases that Consilium names; if they are, change "
                "noise_multiplier a little and report the study, for one of the two is wrong.",
            )


def _pld(event: Event, delta: str, binding: float) -> float:
    """ε by PLD as it is, not the lower of it and the binding one, which would hide a distribution that is too high; on
    a grid that is fine enough where it is compared.
    """
    found = claims.losses(event, min(binding, MOST_EPSILON))
    return float(found.get_epsilon_for_delta(float(Fraction(delta))))


def _distinct(study: Study) -> dict[str, Event]:
    """The events to compare, each once, by the role that has it."""
    roles: dict[Event, str] = {}
    for role, event in events(study, 1).items():
        roles.setdefault(event, role)
    return {role: event for event, role in roles.items()}
