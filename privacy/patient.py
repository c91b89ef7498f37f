"""What does a study promise each patient? The section `[privacy]`, and what must hold for the promise to be kept.

Unit: the patient, at one site (RULES N7). Adjacency: all images of one patient added or removed. Sensitivity: one
release changes by at most Δ = C + γ√d in L2 norm (`privacy.mechanisms`). All numbers here are public constants of the
signed study; none is read off a hospital's images.
"""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from privacy.entries import Fraction, NonNegative, Positive, Section

if TYPE_CHECKING:
    from privacy.study import Study

EVALUATION_TRIES = 2
"""An evaluation under noise is asked at most so often, and each time is charged (RULES N6)."""
MOST_NOISE = Decimal(10_000)


class Privacy(Section):
    """[privacy]: the mechanism. `none` gives no differential privacy, and every report says so.

    `shared`: one secure sum for each optimiser step, every hospital adding its share of the noise. `per-site`: every
    hospital adds all of the noise to each of its own steps. With either: `clip` is C, the largest L2 norm of what one
    patient adds to a step; `noise_multiplier` is σ, the noise of an opened sum over Δ; `sampling_rate` is q, the chance
    of a patient to be in a step; `expected_patients` is what a step's sum is divided by, of all hospitals together
    with `shared` and of one with `per-site`; up to `images_per_patient` images of a patient and `augmentations` forms
    of each are averaged before clipping; `patients_bound` is N_max, a rounded-up bound on the patients of all
    hospitals, and `site_patients_bound` on those of one; `noise_floor` is the least noise of one hospital, over Δ;
    `evaluation_noise` is the noise of one evaluation's sum over the most that one patient adds to it.
    """

    mode: Literal["none", "shared", "per-site"] = "none"
    clip: Positive = "1"
    noise_multiplier: Positive = "1"
    sampling_rate: Fraction = "0.05"
    expected_patients: int = Field(default=50, ge=1, le=1_000_000)
    images_per_patient: int = Field(default=4, ge=1, le=64)
    augmentations: int = Field(default=1, ge=1, le=64)
    patients_bound: int = Field(default=10_000, ge=1, le=100_000_000)
    site_patients_bound: int = Field(default=2_000, ge=1, le=100_000_000)
    delta: Positive = "0.000001"
    noise_floor: NonNegative = "0"
    evaluation_noise: Positive = "4"

    @model_validator(mode="after")
    def _can_be_kept(self) -> Self:
        meant = sorted(self.model_fields_set - {"mode"})
        if self.mode == "none":
            if meant:
                raise ValueError(f'{meant[0]} belongs to mode = "shared" or "per-site"; leave it out, or name a mode')
            return self
        if Decimal(self.delta) * self.patients_bound >= 1:
            raise ValueError(
                f"delta is {self.delta}, which promises nothing to one of {self.patients_bound} patients: it must be "
                "below 1 / patients_bound (a tenth of that is usual)"
            )
        if self.site_patients_bound > self.patients_bound:
            raise ValueError("site_patients_bound is above patients_bound; one hospital has no more than all together")
        if Decimal(self.sampling_rate) == 0:
            raise ValueError("sampling_rate is 0, so nobody would ever train; 0.05 is a usual start")
        for name, value in (("noise_multiplier", self.noise_multiplier), ("evaluation_noise", self.evaluation_noise)):
            if not Decimal("0.1") <= Decimal(value) <= MOST_NOISE:
                raise ValueError(f"{name} is {value}; from 0.1 to {MOST_NOISE} can be accounted for")
        if self.mode == "per-site" and Decimal(self.noise_floor) != 0:
            raise ValueError('noise_floor belongs to mode = "shared": with per-site each hospital adds all the noise')
        return self

    @model_serializer(mode="wrap")
    def _only_what_holds(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"mode": "none"} if self.mode == "none" else dict(handler(self))


def problem(study: Study) -> str:
    """Why a study's other sections do not fit its noise; "" when they do (RULES N1 to N6, B2)."""
    privacy, shared = study.privacy, study.privacy.mode == "shared"
    if privacy.mode == "none":
        return ""
    if study.network.norm == "batch":
        return 'network.norm = "batch" lets the patients of a batch act on each other: write "group" with noise on'
    kept = {
        'aggregation.strategy = "scaffold"': study.aggregation.strategy == "scaffold",
        'local.norms = "local"': study.local.norms != "shared",
        f'local.personal = "{study.local.personal}"': study.local.personal != "none",
    }
    for entry, chosen in kept.items():
        if chosen:
            return f"{entry} keeps unnoised state of patients from round to round: not with noise on"
    if study.rounds.seed:
        return "rounds.seed would tell who was sampled: not with noise on; write 0"
    if study.aggregation.weights != "equal":
        return 'aggregation.weights = "examples" would tell how many images a hospital has: write "equal" with noise on'
    if study.publish.choose != "last":
        return 'publish.choose = "best-validation" would need a charged evaluation of every round: write "last"'
    forms = privacy.images_per_patient * privacy.augmentations
    if study.optimiser.batch_size < forms:
        return (
            f"optimiser.batch_size is {study.optimiser.batch_size}, and one patient has up to {forms} images "
            "(images_per_patient × augmentations), which go through the network together: write at least that"
        )
    if not shared:
        return ""
    if study.secagg.mode != "on":
        return 'privacy.mode = "shared" hides each share of the noise in a secure sum: write [secagg] mode = "on"'
    if study.rounds.local_steps != 1:
        return 'with privacy.mode = "shared" a round is one optimiser step: write rounds.local_steps = 1'
    optimiser = study.optimiser
    if optimiser.name != "sgd" or Decimal(optimiser.momentum) != 0 or Decimal(optimiser.weight_decay) != 0:
        return (
            'with privacy.mode = "shared" the coordinator takes the step: write [optimiser] name = "sgd", '
            "momentum = 0, weight_decay = 0, and choose fedavgm or fedadam under [aggregation] for momentum"
        )
    if study.aggregation.strategy == "fedprox":
        return "fedprox holds a hospital's local steps together, and with shared noise there is only one: take fedavg"
    return ""


def honest_shares(study: Study) -> int:
    """n_min − c: how many shares of noise are in an opened sum that nobody can take out again (RULES N2)."""
    return study.aggregation.minimum_sites - study.secagg.colluding


def plan_steps(study: Study) -> int:
    """How many noised steps one training patient is charged for at most (RULES B1, B2)."""
    if study.privacy.mode == "per-site":
        return study.rounds.count * study.rounds.local_steps
    return study.rounds.count + study.rounds.reserve
