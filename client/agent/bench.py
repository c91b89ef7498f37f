"""What happens to one request at a site? Load, measure, train, and keep what is the site's own.

A training request of round r measures the received model, the one of round r − 1, and trains on from it. What the site
keeps (`client.agent.keepsakes`) is read as it stood before round r and written for round r, so that a round asked for
again begins where the first try did.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from client import training
from client.agent.keepsakes import Keepsakes
from client.agent.policy import Sizes
from client.feed import place
from client.imaging import Cohort, Membership
from client.private.bench import PrivateBench
from models import additive, tasks, transforms, weights
from privacy.errors import Refusal, RefusalCode
from privacy.messages import Kind, Vector
from privacy.study import Study

if TYPE_CHECKING:
    from torch import nn

NORMS, PERSONAL, CONTROL = "norms", "personal", "control"
MODEL, WITH_NORMS, PERSONAL_MODEL = "model.safetensors", "site-model.safetensors", "personal-model.safetensors"
COUNTED = "counted"
"""Parameter of a training request: "site:round,…", the last round of each site that is in the model."""

COMPUTING = threading.Lock()
"""Torch draws from one generator for the whole process: agents that share a process (a simulation) take turns."""


class Bench:
    """One warm study: its network with the initial weights, its task, its images.

    Args:
        kept: what the site keeps of the study from round to round.
        site: the site's name.
    """

    def __init__(self, study: Study, cohort: Cohort, source: str, initial: Path, kept: Keepsakes, site: str) -> None:
        from models import networks

        spec = study.spec()
        self.source, self.cohort = source, cohort
        self.task = tasks.get(spec)
        self.plan = training.Plan.of(study)
        self._study, self.kept, self._site = study, kept, site
        self._augment = transforms.augmentation(spec) if study.input.augmentation else None
        with COMPUTING:
            network: nn.Module = networks.build(spec)
        weights.load_state(network, initial)
        self._first_norms = weights.local_vector(network)
        self._personal: dict[str, float] = {}
        self.network = place(network, device())
        self.private = None
        if study.privacy.mode != "none":
            self.private = PrivateBench(study, cohort, self.task, self.network, self._augment)

    def work(
        self,
        kind: Kind,
        round_number: int,
        vector: Vector,
        sizes: Sizes,
        check: training.Check,
        parameters: Mapping[str, str] | None = None,
    ) -> Vector:
        """Serve one computation.

        Args:
            vector: float32 [received + m], the received numbers and room; written over.
            parameters: of the request.

        Returns:
            float32 [received + m] for train (update, what travels beside it, statistics), float32 [m] otherwise: views
            of `vector`.

        Raises:
            Refusal: NO_DATA, NON_FINITE, DISK_FULL; whatever `check` raises.
        """
        with COMPUTING:
            if kind == "train":
                return self._train(round_number, vector, sizes, check, parameters or {})
            return self._evaluate(kind, round_number, vector, sizes, check)

    def result(self, statistics: Vector) -> str:
        """This site's own figures of a test, as JSON for the operator; "personal" holds those of its own model."""
        figures: dict[str, object] = dict(self.task.metrics(additive.task_sums(statistics)))
        return json.dumps(figures | ({"personal": self._personal} if self._personal else {}), sort_keys=True)

    def _evaluate(self, kind: Kind, round_number: int, vector: Vector, sizes: Sizes, check: training.Check) -> Vector:
        statistics = vector[sizes.trainable :]
        side = Membership.TEST if kind == "test" else Membership.VALIDATION
        self._load(vector[: sizes.trainable], round_number)
        additive.fill(statistics, training.evaluate(self.network, self.task, self.cohort, side, check=check))
        own = self.kept.newest(PERSONAL, self.plan.rounds, sizes.trainable + len(self._first_norms))
        if kind == "test" and self._study.local.personal != "none" and own is not None:
            self._load_personal(own, sizes.trainable)
            sums = training.evaluate(self.network, self.task, self.cohort, side, check=check)
            self._personal = self.task.metrics(sums)
        return statistics

    def _train(
        self,
        round_number: int,
        vector: Vector,
        sizes: Sizes,
        check: training.Check,
        parameters: Mapping[str, str],
    ) -> Vector:
        d, received = sizes.trainable, sizes.received("train")
        update, beside, statistics = vector[:d], vector[d:received], vector[received:]
        model = update.copy() if self._study.local.personal != "none" else None
        self._load(update, round_number - 1)
        sums = training.evaluate(self.network, self.task, self.cohort, Membership.VALIDATION, check=check)
        own = self._control(parameters, d) if len(beside) else None
        trained = training.train(
            self.network, self.task, self.cohort, self.plan, round_number, update,
            augment=self._augment, check=check, chance=self.plan.chance(self._site, "train", round_number),
            shift=beside - own if own is not None else None,
        )  # fmt: skip
        if len(self._first_norms):
            self.kept.keep(NORMS, round_number, weights.local_vector(self.network))
        if own is not None:
            self._next_control(own, update, beside, round_number, _counted(parameters, self._site))
        if model is not None:
            self._train_personal(model, round_number, check)
        additive.fill(
            statistics, sums,
            train_examples=trained.examples, train_loss_sum=trained.loss_sum, train_steps=trained.steps,
        )  # fmt: skip
        return vector

    def _load(self, parameters: Vector, round_: int) -> None:
        """The common model of a round, with the site's own normalisation as it stood then."""
        weights.load_trainable(self.network, parameters)
        if size := len(self._first_norms):
            own = self.kept.newest(NORMS, round_, size)
            weights.load_local(self.network, self._first_norms if own is None else own)

    # ---- SCAFFOLD --------------------------------------------------------------------------------------------

    def _control(self, parameters: Mapping[str, str], size: int) -> Vector:
        """c_i as the coordinator counts it: after the last round of ours that is in the model; zero before any."""
        found = self.kept.newest(CONTROL, _counted(parameters, self._site), size)
        return np.zeros(size, np.float32) if found is None else found

    def _next_control(self, own: Vector, update: Vector, beside: Vector, round_number: int, counted: int) -> None:
        """Option II (Karimireddy 2020, arXiv 1910.06378, eq. 4): c_i ← c_i − c + (x − y) / Σ η.

        `beside` holds c; the change of c_i is written over it.
        """
        np.negative(beside, out=beside)
        beside -= update / np.float32(self.plan.travelled(round_number))
        self.kept.keep(CONTROL, round_number, own + beside, oldest=counted)

    # ---- Ditto -----------------------------------------------------------------------------------------------

    def _train_personal(self, model: Vector, round_number: int, check: training.Check) -> None:
        """As many steps of the site's own model, held to the received one by λ/2 |v − w|² (Li 2021, 2012.04221)."""
        d = len(model)
        own = self.kept.newest(PERSONAL, round_number - 1, d + len(self._first_norms))
        start = np.concatenate([model, self._first_norms]) if own is None else own
        self._load_personal(start, d)
        vector = start[:d].copy()
        training.train(
            self.network, self.task, self.cohort,
            replace(self.plan, proximal_mu=float(self._study.local.personal_weight)), round_number, vector,
            augment=self._augment, check=check, chance=self.plan.chance(self._site, "personal", round_number),
            anchor=model,
        )  # fmt: skip
        now = np.concatenate([weights.trainable_vector(self.network), weights.local_vector(self.network)])
        if not np.isfinite(now).all():
            raise Refusal(RefusalCode.NON_FINITE)
        self.kept.keep(PERSONAL, round_number, now, oldest=round_number - 1)

    def _load_personal(self, vector: Vector, d: int) -> None:
        weights.load_trainable(self.network, vector[:d])
        weights.load_local(self.network, vector[d:])


def write_own(study: Study, kept: Keepsakes, round_: int, folder: Path) -> None:
    """Beside the delivered `model.safetensors` of a round, write the site's own forms of it: with its own
    normalisation, and its personal model.
    """
    from models import networks

    with COMPUTING:
        network = networks.build(study.spec())
    weights.load_state(network, folder / MODEL)
    d, norms = weights.Layout.of(network).count, len(weights.local_vector(network))
    own = kept.newest(NORMS, round_, norms) if norms else None
    if own is not None:
        weights.load_local(network, own)
        (folder / WITH_NORMS).write_bytes(weights.state_bytes(network))
    personal = kept.newest(PERSONAL, study.rounds.count, d + norms)
    if personal is not None:
        weights.load_trainable(network, personal[:d])
        weights.load_local(network, personal[d:])
        (folder / PERSONAL_MODEL).write_bytes(weights.state_bytes(network))


def device() -> str:
    """Where to compute: the first GPU, or the processor."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _counted(parameters: Mapping[str, str], site: str) -> int:
    """The last round of a site that is in the model, as a training request says; 0 for none.

    Raises:
        Refusal: MALFORMED.
    """
    for line in parameters.get(COUNTED, "").split(","):
        name, _, number = line.partition(":")
        if name == site:
            if not number.isdecimal():
                raise Refusal(RefusalCode.MALFORMED)
            return int(number)
    return 0
