"""What has everyone agreed to? The study contract: TOML in, canonical signed bytes out.

A study is data, never code. Its canonical body writes every default out and every real number as a decimal string,
so that the hash a hospital approves leaves nothing open. Structure is checked here; whether a network or a transform
exists is `models.validate`'s to say, because this floor knows nothing of models.
"""

from __future__ import annotations

import tomllib
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from privacy import patient
from privacy.canonical import canonical
from privacy.entries import Count, Fraction, Label, NonNegative, Parameters, Positive, Section, Text
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.identity import Document
from privacy.patient import Privacy
from privacy.roster import SiteName

SCHEMA = 1
KIND = "study"
APPROVAL = "approval"
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
    """[network]: a network of the model zoo by name."""

    name: Label
    norm: Literal["group", "instance", "none"] = "group"
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
    """[aggregation]: how updates are combined; `server.optimizers` gives each rule and its paper."""

    strategy: Literal["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "scaffold"] = "fedavg"
    weights: Literal["examples", "equal"] = "examples"
    minimum_sites: int = Field(default=2, ge=1, le=1000)
    server_learning_rate: Positive = "1"
    proximal_mu: NonNegative = "0"
    beta_1: Fraction = "0.9"
    beta_2: Fraction = "0.99"
    tau: Positive = "0.001"

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


class Study(Section):
    """The whole contract. `hash` is what a hospital approves."""

    version: Literal[1] = Field(default=1, alias="schema")
    study: About
    task: Task
    network: Network
    input: Input
    transfer: Transfer = Transfer()
    optimiser: Optimiser = Optimiser()
    rounds: Rounds = Rounds()
    aggregation: Aggregation = Aggregation()
    local: Local = Local()
    privacy: Privacy = Privacy()
    secagg: SecAgg = SecAgg()
    split: Split = Split()
    initial: Initial = Initial()
    publish: Publish = Publish()
    sites: tuple[SiteName, ...] = Field(min_length=1, max_length=1000)

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @model_validator(mode="after")
    def _sites_are_enough(self) -> Self:
        if len(set(self.sites)) != len(self.sites):
            raise ValueError("a site is named twice under sites")
        if tuple(sorted(self.sites)) != self.sites:
            object.__setattr__(self, "sites", tuple(sorted(self.sites)))
        if self.aggregation.minimum_sites > len(self.sites):
            raise ValueError(
                f"aggregation.minimum_sites is {self.aggregation.minimum_sites} but only {len(self.sites)} are named"
            )
        object.__setattr__(self, "secagg", self.secagg.checked(len(self.sites), self.aggregation.minimum_sites))
        return self

    @model_validator(mode="after")
    def _learning_fits(self) -> Self:
        """What the strategy and the local options may be combined with (RULES N1, N3)."""
        scaffold = self.aggregation.strategy == "scaffold"
        if scaffold and (self.optimiser.name != "sgd" or Decimal(self.optimiser.momentum) != 0):
            raise ValueError('scaffold corrects plain gradient steps: write [optimiser] name = "sgd", momentum = 0')
        if scaffold and str(self.secagg.mode) != "off":
            raise ValueError("scaffold sends a second vector that secure aggregation does not carry yet; take fedprox")
        if noise := patient.problem(self):
            raise ValueError(noise)
        return self

    @classmethod
    def from_toml(cls, text: str, source: str = "the study file") -> Study:
        """Read a draft.

        Raises:
            ConsiliumError: not TOML, or not a study; the message names the entry and the remedy.
        """
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConsiliumError(
                "The study is not valid TOML",
                f"{source}, {error}",
                "`consilium-coordinator study new` writes a good one.",
            ) from error
        return cls._validated(values, source)

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Study:
        """Read a signed body, which must be the canonical body of the study it describes.

        Raises:
            Refusal: MALFORMED when a default is missing or a value is written another way.
        """
        try:
            study = cls.model_validate(body)
        except ValidationError as error:
            raise Refusal(RefusalCode.MALFORMED, KIND) from error
        if canonical(study.body()) != canonical(body):
            raise Refusal(RefusalCode.MALFORMED, KIND)
        return study

    @classmethod
    def _validated(cls, values: dict[str, Any], source: str) -> Study:
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the study"
            more = f" ({error.error_count() - 1} more after this one)" if error.error_count() > 1 else ""
            raise ConsiliumError(
                "The study has an entry that cannot stand",
                f"{where} in {source}: {_words(first)}{more}",
                "Correct it; `consilium-coordinator study new` shows every entry with its meaning.",
            ) from error

    def body(self) -> dict[str, Any]:
        """The canonical body: every default written out, reals as decimal strings."""
        body: dict[str, Any] = self.model_dump(mode="json", by_alias=True)
        return body

    def document(self) -> Document:
        """The unsigned document."""
        return Document(KIND, self.body())

    @property
    def hash(self) -> str:
        """64 hex digits that name this study everywhere."""
        return self.document().digest

    @property
    def slots(self) -> int:
        """T_max: rounds, their reserve, one validation of the last model and one test (RULES S1)."""
        return self.rounds.count + self.rounds.reserve + 2

    def spec(self) -> dict[str, Any]:
        """What the models floor needs, with reals as floats."""
        body = self.body()
        spec: dict[str, Any] = {key: body[key] for key in ("task", "network", "input", "transfer", "split")}
        spec["optimiser"] = {
            key: float(value) if key in {"learning_rate", "momentum", "weight_decay"} else value
            for key, value in body["optimiser"].items()
        }
        spec["rounds"], spec["local"] = body["rounds"], body["local"]
        spec["privacy"], spec["secagg"] = body["privacy"], body["secagg"]
        spec["split"] = {key: float(value) for key, value in body["split"].items()}
        return spec


def approval(study: str, site: str, data: str) -> Document:
    """A site's yes to one study's hash, naming the data source it will use."""
    return Document(APPROVAL, {"study": study, "site": site, "data": data})


def read_signed(document: Document, coordinator: str) -> Study:
    """The study of a signed document.

    Raises:
        Refusal: BAD_SIGNATURE or MALFORMED.
    """
    document.verify(coordinator)
    return Study.from_body(document.body)


def _words(error: Any) -> str:
    if error["type"] == "missing":
        return "this entry is missing"
    if error["type"] == "extra_forbidden":
        return "there is no such entry"
    return str(error["msg"]).removeprefix("Value error, ")
