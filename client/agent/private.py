"""How does a site answer with noise? Freeze who takes part, charge, compute, and let the airlock put the noise on.

    reserve the whole plan → charge the slot, durably → clip and sum → airlock: round, noise → mask → keep → hand over

With `shared` noise an answer is one noised sum on the grid, masked. With `per-site` a round is `local_steps` steps,
each with all of the noise; the update that they lead to is kept for its round, so that a round asked for again sends
the same noised numbers and costs nothing more (RULES B2). What is computed without noise is never kept, never leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client.agent.bench import Bench
from client.agent.policy import Sizes
from client.agent.purse import Purse
from client.imaging import Cohort, Membership
from client.private.bench import PrivateBench
from models import additive
from privacy.accounting import Role
from privacy.airlock import Airlock
from privacy.charge import Charge
from privacy.errors import Refusal, RefusalCode
from privacy.mechanisms import Mechanism, evaluation, training
from privacy.messages import Request, Vector
from privacy.study import Study

ROLES: dict[Membership, Role] = {
    Membership.TRAIN: "train",
    Membership.VALIDATION: "validation",
    Membership.TEST: "test",
}
SIDES = {"train": Membership.TRAIN, "validate": Membership.VALIDATION, "test": Membership.TEST}
Doubles = npt.NDArray[np.float64]
NOISED = "noised"


@dataclass(frozen=True)
class Produced:
    """A noised answer before it is masked.

    Attributes:
        charge: what paid for it.
        words: uint32 [d + m] or [m], on the study's grid, for a sum with shared noise; None otherwise.
        vector: float32 of the same length, for one with noise of its own; None otherwise.
        own: what the site itself may know of a test, JSON; it stays here.
    """

    charge: Charge
    words: npt.NDArray[np.uint32] | None
    vector: Vector | None
    own: str = ""


class Private:
    """The noised answers of one agent."""

    def __init__(self, airlock: Airlock, purse: Purse) -> None:
        self._airlock, self._purse = airlock, purse

    def produce(
        self, request: Request, study: Study, bench: Bench, vector: Vector, sizes: Sizes, check: Callable[[], None]
    ) -> Produced:
        """Serve one computation of a study with noise.

        Args:
            vector: float32 [d + m], the received parameters and room; written over.

        Raises:
            Refusal: NO_GRANT, GRANT_REVOKED, BUDGET_SPENT, SLOT_BOUND, SLOT_SPENT, DISK_FULL; whatever `check` raises.
                Never for what the images hold (RULES N4).
            ConsiliumError: the study's public numbers do not fit; before anything is charged.
        """
        header = request.header
        assert bench.private is not None
        if header.kind == "train":
            mechanism = training(study, sizes.trainable)
        else:
            mechanism = evaluation(study, bench.task.size, bench.private.bounds.reach)
        self._purse.reserve(study, members(bench.cohort))
        charge = self._purse.charge(study, header.slot, header.kind, header.round, request.hash)
        patients = groups(bench.cohort, SIDES[header.kind], self._purse.eligible(study.hash))

        def noise(sums: Doubles) -> npt.NDArray[np.uint32]:
            return self._airlock.noise(charge, mechanism, sums)

        job = _Job(study, bench, bench.private, mechanism, charge, patients, noise, check)
        if header.kind != "train":
            return job.evaluated(vector, sizes)
        if study.privacy.mode == "shared":
            return job.shared_step(vector, sizes)
        return job.own_steps(vector, sizes, lost=self._purse.answered(study.hash, charge.round))


@dataclass(frozen=True)
class _Job:
    """One paid computation: the frozen cohort's images of one side, and `noise`, which puts the noise on a sum."""

    study: Study
    bench: Bench
    private: PrivateBench
    mechanism: Mechanism
    charge: Charge
    patients: list[npt.NDArray[np.int64]]
    noise: Callable[[Doubles], npt.NDArray[np.uint32]]
    check: Callable[[], None]

    def shared_step(self, vector: Vector, sizes: Sizes) -> Produced:
        """One optimiser step's sum, with this site's share of the noise."""
        d = sizes.trainable
        noised = self.noise(self.private.gradient_sum(vector[:d], self.patients, self.check))
        words = np.zeros(d + sizes.statistics, np.uint32)
        words[:d], words[d + additive.LOSS] = noised[:-1], noised[-1]
        return Produced(self.charge, words, None)

    def own_steps(self, vector: Vector, sizes: Sizes, *, lost: bool) -> Produced:
        """A round of steps with all of the noise; one that was computed before is sent again.

        Args:
            lost: noised numbers of this round have left already, so that nothing may be noised anew.

        Raises:
            Refusal: SLOT_SPENT when they have, and what was kept of them is gone.
        """
        kept, d = self.bench.kept, sizes.trainable
        found = kept.of_round(NOISED, self.charge.round, d + sizes.statistics)
        if found is not None:
            return Produced(self.charge, None, found)
        if lost or self.charge.paid != self.charge.slot:
            raise Refusal(RefusalCode.SLOT_SPENT, str(self.charge.slot))
        loss = self.private.trained(
            self.charge.round, vector[:d], self.patients, lambda sums: self.mechanism.read(self.noise(sums)), self.check
        )
        vector[d:] = 0.0
        vector[d : d + len(additive.LEADING)] = 1.0, loss, self.study.rounds.local_steps
        kept.keep(NOISED, self.charge.round, vector)
        return Produced(self.charge, None, vector)

    def evaluated(self, vector: Vector, sizes: Sizes) -> Produced:
        """An evaluation's sum over patients; of a test, the plain figures stay here for the site itself."""
        bounded, figures = self.private.evaluated(vector[: sizes.trainable], self.patients, self.check)
        noised, own = self.noise(bounded), figures if self.charge.kind == "test" else ""
        if self.study.privacy.mode == "shared":
            words = np.zeros(sizes.statistics, np.uint32)
            words[len(additive.LEADING) :] = noised
            return Produced(self.charge, words, None, own)
        statistics = vector[sizes.trainable :]
        additive.fill(statistics, self.mechanism.read(noised) * self.private.bounds.caps)
        return Produced(self.charge, None, statistics, own)


def members(cohort: Cohort) -> dict[str, Role]:
    """Every patient of a cohort by pseudonym, with the one role that the split gives."""
    return {name: ROLES[side] for name, side in zip(cohort.patients, cohort.membership, strict=True)}


def groups(cohort: Cohort, side: Membership, eligible: dict[str, Role]) -> list[npt.NDArray[np.int64]]:
    """The images of each eligible patient of one side, patients by pseudonym."""
    found = cohort.groups(side)
    return [found[name] for name in sorted(found) if eligible.get(name) == ROLES[side]]
