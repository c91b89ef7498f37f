"""Does a study still fit into a patient's lifetime? Histories of whole numbers, decided at one fixed order.

A history is a patient's reserved and spent Rényi divergence at each of `accounting.ORDERS`, in units of 10⁻¹², as
everyone who sees only aggregates has it (tier 1); the second tier is capped study by study, by the officer's grant.

Statement (docs/privacy.md). A study is admitted to a history only if history + plan ≤ capacity(ε, δ, α) at the one
whole order α that was fixed with the lifetime budget. Every plan is fixed before it starts and reserved whole. Then all
studies together, each chosen in the light of those before, are (ε, δ)-differentially private for that patient: this is
the Rényi filter at a fixed order, which loses nothing against composing studies that are known in advance (Feldman and
Zrnic 2021, arXiv 2008.11193). Other orders stand in the history for display only (RULES B3).

Private here: which patient has which history. Everything else is a public constant of signed documents.
"""

from __future__ import annotations

import decimal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction
from functools import cached_property

from privacy.accounting import ORDERS, Role, Tier, capacity, costs, events
from privacy.study import Study

History = tuple[int, ...]
NOTHING: History = (0,) * len(ORDERS)
"""The history of a patient who was never in a study."""
_DIGITS = 60
_UNIT = Decimal("1e-12")
_SHOWN = Decimal("0.0001")


@dataclass(frozen=True)
class Lifetime:
    """All that the studies of this site may ever cost one of its patients.

    Attributes:
        epsilon, delta: decimal strings; δ below 1.
        order: the one of `ORDERS` that decides.

    Raises:
        ValueError: an order that is not kept, or numbers that leave room for nothing at all.
    """

    epsilon: str
    delta: str
    order: int

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order} is not kept; it is one of {', '.join(map(str, ORDERS))}")
        if self.room == 0:
            raise ValueError(
                f"at order {self.order} an epsilon of {self.epsilon} leaves room for nothing; take a higher"
            )

    @cached_property
    def room(self) -> int:
        """The most that a history may hold at the order, in units of 10⁻¹²."""
        return capacity(self.epsilon, self.delta, self.order)

    @property
    def at(self) -> int:
        """Where the order stands in a history."""
        return ORDERS.index(self.order)


@dataclass(frozen=True)
class Part:
    """What a plan asks of the patients of one role: `count` releases at `unit` each."""

    unit: History
    count: int

    def of(self, count: int) -> History:
        """The cost of some of the releases."""
        return tuple(unit * count for unit in self.unit)

    @property
    def whole(self) -> History:
        """The cost of all of them."""
        return self.of(self.count)


def plan(study: Study, tier: Tier = 1) -> dict[Role, Part]:
    """What a study reserves of every patient, by role: all of its slots, whatever will be used (RULES B1).

    Raises:
        ConsiliumError: the study has no noise.
    """
    return {role: Part(costs(event), event.count) for role, event in events(study, tier).items()}


def add(history: History, cost: History) -> History:
    """A history with a cost on top."""
    return tuple(old + new for old, new in zip(history, cost, strict=True))


def refund(history: History, unused: History) -> History:
    """A history without what was reserved and will never be used.

    Raises:
        ValueError: more than was reserved.
    """
    left = tuple(old - new for old, new in zip(history, unused, strict=True))
    if min(left) < 0 or min(unused) < 0:
        raise ValueError("a refund is never more than what was reserved")
    return left


def fits(history: History, cost: History, lifetime: Lifetime) -> bool:
    """Whether a patient with this history can bear the cost; the fixed order decides alone (RULES B3)."""
    return history[lifetime.at] + cost[lifetime.at] <= lifetime.room


def compose(
    held: Iterable[tuple[History, Role]], asked: Mapping[Role, Part], lifetime: Lifetime
) -> dict[tuple[History, Role], History | None]:
    """For each distinct (history, role): the history with the plan reserved, or None where it does not fit.

    Patients with the same history and role are composed once, however many they are. Each answer depends on that one
    history alone, so who else is at the site changes nothing (RULES B1).
    """
    whole = {role: part.whole for role, part in asked.items()}
    return {
        (history, role): add(history, whole[role]) if fits(history, whole[role], lifetime) else None
        for history, role in set(held)
    }


def spent(history: History, lifetime: Lifetime) -> Fraction:
    """The share of a lifetime that is reserved or spent: 0 untouched, 1 nothing left, above 1 after a cut."""
    return Fraction(history[lifetime.at], lifetime.room)


def epsilon(cost: History, delta: str, order: int | None = None) -> Decimal:
    """ε at δ of a cost, rounded up to four digits after the point; at one order, or at the best of `ORDERS`.

    For display of histories; what a study claims is `privacy.claims`', at many more orders.

    The conversion is that of `accounting.capacity` (Canonne, Kamath and Steinke 2020, arXiv 2004.00010, Proposition
    12). A cost of nothing is ε = 0.
    """
    if not any(cost):
        return Decimal(0)
    orders = ORDERS if order is None else (order,)
    with decimal.localcontext(decimal.Context(prec=_DIGITS)):
        chance = Decimal(delta)
        found = min(
            cost[ORDERS.index(a)] * _UNIT + (Decimal(a - 1) / a).ln() - (chance * a).ln() / (a - 1) for a in orders
        )
        return max(Decimal(0), found).quantize(_SHOWN, ROUND_CEILING)
