"""What does the signed study fix about its secure sums? Sites, thresholds, the vector's layout and its grid.

Everything here follows from the study that every site approved and from the network it names, so nothing that arrives
at run time can weaken it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from privacy.canonical import digest
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.sections import STATISTICS_GRID
from privacy.study import Study


@dataclass(frozen=True)
class Plan:
    """Public constants of every secure sum of one study.

    Attributes:
        study: the study's hash, 64 hex digits.
        sites: all sites of the signed study, sorted; n of them.
        colluding: c.
        threshold: w, openings needed.
        minimum: n_min, fewest sites whose sum may be opened.
        slots: T_max.
        session_slots: most slots of one set of keys.
        size: d, numbers of the update.
        statistics: m, numbers that ride behind it; the first is the site's training images.
        update_bound: L, decimal.
        norm_bound: C, decimal.
        examples_bound: most training images of one site.
        by_examples: whether a site's update is weighted by its training images.
        stochastic: whether rounding to the grid is stochastic, else to nearest.
    """

    study: str
    sites: tuple[str, ...]
    colluding: int
    threshold: int
    minimum: int
    slots: int
    session_slots: int
    size: int
    statistics: int
    update_bound: str
    norm_bound: str
    examples_bound: int
    by_examples: bool
    stochastic: bool

    @classmethod
    def of(cls, study: Study, size: int, statistics: int) -> Plan:
        """The plan of a study whose network has `size` numbers and whose task sums `statistics` of them.

        Raises:
            ConsiliumError: the study has no secure aggregation, or a size that cannot be.
        """
        secagg = study.secagg
        if secagg.mode != "on":
            raise ConsiliumError(
                "The study has no secure aggregation", study.study.name, 'Draft one with secagg.mode = "on".'
            )
        if size < 1 or statistics < 1:
            raise ConsiliumError(
                "A secure sum needs an update and statistics",
                f"{size} and {statistics} numbers",
                "Name a network with trainable parameters.",
            )
        return cls(
            study=study.hash,
            sites=study.sites,
            colluding=secagg.colluding,
            threshold=secagg.threshold,
            minimum=study.aggregation.minimum_sites,
            slots=study.slots,
            session_slots=secagg.session_slots,
            size=size,
            statistics=statistics,
            update_bound=secagg.update_bound,
            norm_bound=secagg.norm_bound,
            examples_bound=secagg.examples_bound,
            by_examples=study.aggregation.weights == "examples",
            stochastic=secagg.rounding == "stochastic",
        )

    @property
    def levels(self) -> int:
        """Most grid steps of one site in either direction: n of them stay below 2^31, so the sum never wraps."""
        return (2**31 - 1) // len(self.sites)

    @property
    def grid(self) -> float:
        """γ, one grid step of the update."""
        return float(self.update_bound) / self.levels

    @property
    def statistics_grid(self) -> float:
        """One grid step of a statistic."""
        return 1.0 / STATISTICS_GRID

    @cached_property
    def digest(self) -> str:
        """64 hex digits that name this plan in every key derivation."""
        return digest("secagg/plan", self.body())

    def position(self, site: str) -> int:
        """Where a site's polynomial is evaluated: 1..n, by its place in the signed study."""
        return self.sites.index(site) + 1

    def length(self, numbers: int) -> int:
        """`numbers`, if a vector of this plan can have that length: d + m, or m without an update.

        Raises:
            Refusal: MODEL_SHAPE.
        """
        if numbers not in {self.size + self.statistics, self.statistics}:
            raise Refusal(RefusalCode.MODEL_SHAPE)
        return numbers

    def check_group(self, sites: Sequence[str], inside: Sequence[str], code: RefusalCode) -> tuple[str, ...]:
        """`sites` as a tuple: sorted, distinct, all of `inside`, at least n_min, with two honest ones left (RULES S4).

        Raises:
            Refusal: `code`.
        """
        group, known = tuple(sites), set(inside)
        if list(group) != sorted(set(group)) or not known.issuperset(group):
            raise Refusal(code)
        honest_enough = 2 * self.threshold > len(self.sites) + self.colluding
        if len(group) < max(self.minimum, self.threshold, self.colluding + 2) or not honest_enough:
            raise Refusal(code)
        return group

    def check_slots(self, first: int, last: int) -> None:
        """Whether one set of keys may serve the slots first..last.

        Raises:
            Refusal: SLOT_LIMIT beyond T_max, SLOT_SESSION for an empty or too long range.
        """
        if last > self.slots:
            raise Refusal(RefusalCode.SLOT_LIMIT)
        if not 1 <= first <= last or last - first >= self.session_slots:
            raise Refusal(RefusalCode.SLOT_SESSION)

    def body(self) -> dict[str, Any]:
        """As JSON without floats."""
        return {**asdict(self), "sites": list(self.sites)}

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Plan:
        """Back from `body`."""
        return cls(**{**body, "sites": tuple(body["sites"])})
