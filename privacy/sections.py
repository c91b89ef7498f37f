"""What may each section of a study say? One class a section, with its defaults; `privacy.study` puts them together.

What two sections must agree on is the study's to check, and `[privacy]` has a file of its own (`privacy.patient`).
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    field_validator,
    model_serializer,
    model_validator,
)

from privacy.entries import Count, Fraction, Label, NonNegative, Parameters, Positive, Section, Text
from privacy.roster import SiteName

FEWEST_SITES, MOST_SITES = 3, 50
ROBUST = frozenset({"median", "geometric_median", "trimmed_mean", "krum", "multi_krum", "bulyan", "fltrust"})
"""Rules against hostile updates that compare single ones (Yin 2018, Blanchard 2017, and others)."""
STATISTICS_GRID = 256
"""Under secure aggregation a statistic travels in steps of 1 / STATISTICS_GRID."""


class About(Section):
    """[study]: what it is called and why it is done."""

    name: SiteName
    title: Text
    purpose: Text
    contact: str = Field(default="", max_length=200)


class Task(Section):
    """[task]: what the model answers."""

    kind: Label = "classification"
    classes: tuple[Label, ...] = Field(min_length=1, max_length=1000)


class Network(Section):
    """[network]: a network of the model zoo by name; `weight_standardisation` as `models.standardised` has it."""

    name: Label
    norm: Literal["group", "instance", "batch", "frozen", "none"] = "group"
    weight_standardisation: StrictBool = False
    parameters: Parameters = Field(default_factory=dict)


class Step(Section):
    """One transform by name."""

    name: Label
    parameters: Parameters = Field(default_factory=dict)


class Input(Section):
    """[input]: what an image is before the network sees it."""

    channels: int = Field(default=1, ge=1, le=16)
    size: tuple[Count, ...] = Field(min_length=2, max_length=3)
    transforms: tuple[Step, ...] = ()
    augmentation: tuple[Step, ...] = ()


class Transfer(Section):
    """[transfer]: which part of the network is trained (`models.transfer`)."""

    train: Literal["all", "head", "adapters", "lora"] = "all"
    rank: int = Field(default=4, ge=1, le=64)


class Optimiser(Section):
    """[optimiser]: how a hospital trains between two messages."""

    name: Literal["sgd", "adam", "adamw"] = "adamw"
    learning_rate: Positive = "0.001"
    momentum: Fraction = "0"
    weight_decay: NonNegative = "0"
    batch_size: int = Field(default=32, ge=1, le=4096)
    schedule: Literal["constant", "cosine"] = "constant"


class Rounds(Section):
    """[rounds]: how often, how long, how many tries; `seed` above 0 makes training repeatable, and never with noise."""

    count: int = Field(default=10, ge=1, le=100_000)
    local_steps: int = Field(default=20, ge=1, le=1_000_000)
    deadline_seconds: int = Field(default=600, ge=1, le=604_800)
    reserve: int = Field(default=5, ge=0, le=100_000)
    seed: int = Field(default=0, ge=0, le=2**31 - 1)


class Aggregation(Section):
    """[aggregation]: how updates are combined; `server.optimizers` gives each rule and its paper.

    `ema` is β, the decay of a moving average of the models over the rounds, which is what is published; "0": none.
    """

    strategy: Literal["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "scaffold"] = "fedavg"
    weights: Literal["examples", "equal"] = "examples"
    minimum_sites: int = Field(default=2, ge=1, le=1000)
    server_learning_rate: Positive = "1"
    proximal_mu: NonNegative = "0"
    beta_1: Fraction = "0.9"
    beta_2: Fraction = "0.99"
    tau: Positive = "0.001"
    ema: Fraction = "0"

    @field_validator("strategy", mode="before")
    @classmethod
    def _no_single_updates(cls, value: Any) -> Any:
        """Refuse, with the reason, the rules that compare hospitals' updates with each other."""
        if isinstance(value, str) and value.lower().replace("-", "_") in ROBUST:
            raise ValueError(
                f"`{value}` needs every hospital's single update, and secure aggregation opens only their sum; each "
                "hospital's part is bounded instead by secagg.norm_bound, and a round that looks wrong can be taken "
                "back. Choose fedavg, for example"
            )
        return value

    @model_validator(mode="after")
    def _proximal(self) -> Self:
        if self.strategy == "fedprox" and Decimal(self.proximal_mu) == 0:
            raise ValueError("fedprox needs proximal_mu above 0; 0.01 is a usual start")
        if self.strategy != "fedprox" and Decimal(self.proximal_mu) != 0:
            raise ValueError('proximal_mu belongs to strategy = "fedprox"')
        return self

    @field_validator("ema")
    @classmethod
    def _moves(cls, value: str) -> str:
        if Decimal(value) == 1:
            raise ValueError("an average with decay 1 would stay the initial weights for ever; 0.9 is a usual start")
        return value


class Local(Section):
    """[local]: what stays at a hospital and is its own; no message carries or sets it.

    `norms = "local"` keeps the parameters of normalisation layers there (FedBN: Li 2021, arXiv 2102.07623);
    `personal = "ditto"` trains a second model there, held to the common one by `personal_weight` (Ditto: Li 2021,
    arXiv 2012.04221).
    """

    norms: Literal["shared", "local"] = "shared"
    personal: Literal["none", "ditto"] = "none"
    personal_weight: Positive = "0.1"


class SecAgg(Section):
    """[secagg]: secure aggregation. `off` lets the coordinator see single updates, and every report says so.

    With `on`: `colluding` is c, the sites that may work together with the coordinator; `threshold` is w, the sites it
    takes to open a sum (left out: the smallest one of RULES S4); `session_slots`, slots that one set of keys serves;
    `update_bound` is L, the largest change of one parameter by one site; `norm_bound` is C, the largest L2 norm of one
    site's update; `examples_bound`, the most training images of one site, which is public.
    """

    mode: Literal["off", "on"] = "off"
    colluding: int = Field(default=1, ge=1, le=48)
    threshold: int = Field(default=0, ge=0, le=50)  # 0 stands only until the study fills it in
    session_slots: int = Field(default=100, ge=1, le=1000)
    update_bound: Positive = "1"
    norm_bound: Positive = "100"
    examples_bound: int = Field(default=100_000, ge=1, le=1_000_000_000)
    rounding: Literal["nearest", "stochastic"] = "nearest"

    @model_validator(mode="after")
    def _off_is_off(self) -> Self:
        meant = sorted(self.model_fields_set - {"mode"})
        if self.mode == "off" and meant:
            raise ValueError(f'{meant[0]} belongs to mode = "on"; leave it out, or switch secure aggregation on')
        return self

    @model_serializer(mode="wrap")
    def _only_what_holds(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"mode": "off"} if self.mode == "off" else dict(handler(self))

    def checked(self, sites: int, minimum: int) -> SecAgg:
        """The section with its threshold written out, after the checks of RULES S4 and of the fixed-point sum.

        Args:
            sites: n, the sites of the study.
            minimum: n_min, the fewest answers that count.

        Raises:
            ValueError: naming the entry to change.
        """
        if self.mode == "off":
            return self
        if not MOST_SITES >= sites >= FEWEST_SITES:
            raise ValueError(
                f"secagg needs {FEWEST_SITES} to {MOST_SITES} sites, and the study names {sites}: with fewer, "
                'a sum tells one site the other\'s update; name more sites or set secagg.mode = "off"'
            )
        least = (sites + self.colluding) // 2 + 1
        if self.colluding > sites - 2:
            raise ValueError(
                f"secagg.colluding is {self.colluding}, too many for {sites} sites; set it to {sites - 2} or less"
            )
        threshold = self.threshold or least
        if threshold < least or threshold > sites:
            raise ValueError(
                f"secagg.threshold is {threshold}; with {sites} sites and {self.colluding} colluding it must be from "
                f"{least} to {sites} (more than (sites + colluding) / 2); leave it out for {least}"
            )
        fewest = max(threshold, self.colluding + 2)
        if minimum < fewest:
            raise ValueError(
                f"aggregation.minimum_sites is {minimum}; under secure aggregation no sum over fewer than {fewest} "
                f"sites may be opened here: set it to {fewest} or more"
            )
        largest = (2**31 - 1) // sites // STATISTICS_GRID
        if self.examples_bound > largest:
            raise ValueError(
                f"secagg.examples_bound is {self.examples_bound}; with {sites} sites the sum could overflow: "
                f"set it to {largest} or less"
            )
        if "threshold" in self.model_fields_set and self.threshold:
            return self
        return self.model_copy(update={"threshold": threshold})


class Split(Section):
    """[split]: shares of patients kept aside, by a keyed hash of each, where the data bring no split of their own."""

    validation: Fraction = "0.15"
    test: Fraction = "0.2"

    @model_validator(mode="after")
    def _train_remains(self) -> Self:
        if Decimal(self.validation) + Decimal(self.test) >= Decimal("0.9"):
            raise ValueError("validation and test together must leave at least a tenth for training")
        return self


class Initial(Section):
    """[initial]: the weights every site starts from; filled in when the study is signed."""

    seed: int = Field(default=1, ge=0, le=2**31 - 1)
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""


class Publish(Section):
    """[publish]: which round becomes the model. Never chosen on test data."""

    choose: Literal["last", "best-validation"] = "last"
