"""How much noise does a study need, and how many such studies fit a patient's lifetime? For the person who plans."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from privacy.accounting import ORDERS, Number, Role, capacity, costs, events
from privacy.claims import HOPELESS, epsilon_rdp, losses
from privacy.errors import ConsiliumError
from privacy.patient import MOST_NOISE
from privacy.study import Study

LIFETIME_EPSILON, LIFETIME_DELTA = "8", "0.000001"
LIFETIME_ORDERS = (4, 5)
LEAST_NOISE = Decimal("0.1")
MOST_REPEATS = 1000
_STEP = Decimal("0.001")


def find_noise(study: Study, epsilon: Number, delta: Number | None = None, role: Role = "train") -> Decimal:
    """The least noise, in thousandths, with which the tier-one ε of a role that binds is at most the wanted one.

    Args:
        study: a draft with noise; what it says about its own noise plays no part, a noise floor does.
        delta: δ; left out, the study's.
        role: "train" finds noise_multiplier, the two others evaluation_noise.

    Raises:
        ConsiliumError: no noise that a study may name is enough.
    """
    entry = "noise_multiplier" if role == "train" else "evaluation_noise"
    wanted, chance = float(Fraction(epsilon)), Fraction(study.privacy.delta if delta is None else delta)

    def enough(thousandths: int) -> bool:
        privacy = study.privacy.model_copy(update={entry: format(Decimal(thousandths) * _STEP, "f")})
        return epsilon_rdp(events(study.model_copy(update={"privacy": privacy}), 1)[role], chance) <= wanted

    least, most = int(LEAST_NOISE / _STEP), int(MOST_NOISE / _STEP)
    low, high = least - 1, max(least, int(Decimal(getattr(study.privacy, entry)) / _STEP))
    while not enough(high):  # low is never enough; high at last is
        if high >= most:
            raise ConsiliumError(
                "No noise is enough for so small an epsilon",
                f"epsilon {float(Fraction(epsilon)):g} at delta {float(chance):g} for {role} patients",
                "Ask for a larger epsilon, or plan fewer rounds or a smaller sampling_rate.",
            )
        low, high = high, min(most, 2 * high)
    while high - low > 1:
        middle = max(low + 1, high // 2) if low < least else (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return Decimal(high) * _STEP


@dataclass(frozen=True)
class Repeats:
    """How many studies like one fit a patient's lifetime budget.

    Attributes:
        filtered: (order, studies) of the filter that adds Rényi costs at one whole order (RULES B3).
        summed: studies if epsilons were added up instead, each at its part of δ: what we do not do.
    """

    filtered: tuple[tuple[int, int], ...]
    summed: int


def repeats(study: Study, epsilon: Number = LIFETIME_EPSILON, delta: Number = LIFETIME_DELTA) -> Repeats:
    """How many such studies a patient of the costliest role can be in, in tier 1.

    Raises:
        ConsiliumError: the study has no noise.
    """
    asked = list(dict.fromkeys(events(study, 1).values()))
    filtered = []
    for order in LIFETIME_ORDERS:
        worst = max(costs(event)[ORDERS.index(order)] * event.count for event in asked)
        filtered.append((order, capacity(epsilon, delta, order) // max(1, worst)))
    chance, whole = Fraction(delta), float(Fraction(epsilon))
    if any(epsilon_rdp(event, chance) > HOPELESS for event in asked):
        return Repeats(tuple(filtered), 0)
    found = [losses(event, epsilon_rdp(event, chance)) for event in asked]

    def over(studies: int) -> bool:
        return bool(studies * max(each.get_epsilon_for_delta(float(chance / studies)) for each in found) > whole)

    return Repeats(tuple(filtered), bisect_left(range(1, MOST_REPEATS), True, key=over))
