"""What does a slot add up to when nobody may see a part of it? A masked sum, opened once, with the face of a plain one.

Memory is the sum and one scratch vector, four bytes a number each, at any number of sites. A payload streams into the
scratch and is judged whole before it is added; the step reads the opened sum block by block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from privacy.errors import Refusal, RefusalCode
from privacy.identity import Document
from privacy.messages import Answer
from privacy.secagg.coordinator import SecureSum
from privacy.secagg.fixed import Opened
from privacy.secagg.plan import Plan
from privacy.secagg.ring import Bad, Ring
from server.aggregate import Doubles, receive
from server.noised import Noised
from server.records import SlotRecord

NORM_ROOM = 1e-5
"""How far, as a share, rounding in float32 may carry an honest update over its bound."""


class Masked:
    """The sum of one slot after the other. `size`: numbers of the update, 0 for statistics only.

    Args:
        noised: how the sum is read when noise is shared; None for a study without.
    """

    def __init__(self, plan: Plan, size: int, noised: Noised | None = None) -> None:
        self.plan, self.size, self._noised = plan, size, noised
        self._round = 0
        self._numbers = size + plan.statistics
        self._scratch = np.empty(4 * self._numbers, np.uint8)
        self._sum: SecureSum | None = None
        self._opened: Opened | None = None

    def reset(self) -> None:
        """Forget everything."""
        self._sum = self._opened = None

    def begin(self, slot: SlotRecord, ring: Ring) -> None:
        """Start the sum of a slot at zero.

        Raises:
            Refusal: the slot's cohort is not of this ring.
        """
        self._opened, self._round = None, slot.round
        self._sum = SecureSum(ring, slot.slot, slot.hash, slot.cohort, self._numbers)

    @property
    def sum(self) -> SecureSum:
        """The slot's sum under its masks."""
        assert self._sum is not None
        return self._sum

    def add(self, answer: Answer, document: Document, chunks: Iterable[bytes]) -> None:
        """Take one site's masked vector.

        Args:
            answer: verified: signed by its site, for this very request.
            document: the same, as it was signed.
            chunks: the payload's bytes in order.

        Raises:
            Refusal: MODEL_SHAPE, MODEL_HASH, MALFORMED, or as `SecureSum.add`; then nothing has changed.
        """
        if answer.payload_bytes != len(self._scratch):
            raise Refusal(RefusalCode.MODEL_SHAPE)
        receive(self._scratch, answer, chunks)
        self.sum.add(answer.site, document, self._scratch.view("<u4"), answer.payload_sha256)

    def open(self, openings: Mapping[str, Document], agreed: Mapping[str, Document]) -> Bad:
        """Remove the masks; returns what was wrong with the openings that were left out.

        Args:
            agreed: the signed `Survivors`, when somebody dropped.

        Raises:
            Refusal: TOO_FEW or OPENING; nothing has changed, and more openings may come.
        """
        self._opened, bad = self.sum.open(openings, agreed)
        return bad

    # ---- the opened sum --------------------------------------------------------------------------------------

    @property
    def weight(self) -> float:
        """What the summed update is divided by; 0 before the sum is opened."""
        if self._noised is not None:
            return float(self.answered)
        return self._opened.weight if self._opened is not None else 0.0

    @property
    def answered(self) -> int:
        """How many sites it is of; 0 before the sum is opened."""
        return self._opened.sites if self._opened is not None else 0

    @property
    def statistics(self) -> Doubles:
        """The summed statistics, float64 [m]."""
        assert self._opened is not None
        return self._noised.statistics(self._opened) if self._noised is not None else self._opened.statistics

    def mean(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """The weighted mean update, float64 [stop - start], as a copy; of a noised sum, the step that it is for.

        Raises:
            ValueError: no weight came in.
        """
        assert self._opened is not None
        if self._noised is not None:
            return self._noised.step(self._opened, start, stop, self._round)
        return self._opened.mean(start, stop)

    def excess(self) -> str:
        """Why the opened update cannot come from sites that keep to the study; "" when it can.

        Every site cuts its update to norm C before it is weighed and rounded, so the sum has at most norm C·Σa and the
        grid's error.
        """
        assert self._opened is not None
        if not self.size:
            return ""
        if self._noised is not None:
            return self._noised.excess(self._opened)
        plan, norm = self.plan, self._opened.norm()
        most = float(plan.norm_bound) * self.weight * (1 + NORM_ROOM)
        most += self._opened.sites * plan.grid * math.sqrt(self.size)
        if norm <= most:
            return ""
        return (
            f"the sum of the updates has norm {norm:.4g}, and sites that keep to the study cannot exceed {most:.4g}; "
            "one of them runs something else"
        )
