"""What has everyone agreed to? The study contract: TOML in, canonical signed bytes out.

A study is data, never code. Its canonical body writes every default out and every real number as a decimal string,
so that the hash a hospital approves leaves nothing open. Structure is checked here; whether a network or a transform
exists is `models.validate`'s to say, because this floor knows nothing of models.
"""

from __future__ import annotations

import tomllib
from decimal import Decimal
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from privacy import patient
from privacy.canonical import canonical
from privacy.entries import Section
from privacy.errors import ConsiliumError, Refusal, RefusalCode
from privacy.identity import Document
from privacy.patient import Privacy
from privacy.roster import SiteName
from privacy.sections import (
    About,
    Aggregation,
    Initial,
    Input,
    Local,
    Network,
    Optimiser,
    Publish,
    Rounds,
    SecAgg,
    Split,
    Task,
    Transfer,
)

KIND = "study"
APPROVAL = "approval"


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
        if self.network.norm == "batch" and self.local.norms == "shared":
            self._statistics_are_averaged()
        if self.averaged and self.publish.choose != "last":
            raise ValueError(
                'publish.choose = "best-validation" chooses among the models that were validated, and aggregation.ema '
                'publishes their average, which is validated at the end only: write choose = "last", or ema = 0'
            )
        if self.averaged and self.local.norms != "shared":
            raise ValueError(
                "aggregation.ema averages what travels, and the norms that stay at a hospital fit the newest model, "
                'not the average: write local.norms = "shared", or ema = 0'
            )
        if noise := patient.problem(self):
            raise ValueError(noise)
        return self

    def _statistics_are_averaged(self) -> None:
        """The statistics of a batch norm are averaged as they are, or they are of no images."""
        rule, other = self.aggregation, 'write local.norms = "local", or network.norm = "group"'
        if rule.strategy not in ("fedavg", "fedprox", "scaffold"):
            raise ValueError(f"{rule.strategy} takes steps, which the statistics of a batch norm may not take: {other}")
        if Decimal(rule.server_learning_rate) != 1:
            raise ValueError(
                f"server_learning_rate {rule.server_learning_rate} would stretch the statistics of a batch norm: "
                f"write 1, or {other.removeprefix('write ')}"
            )
        if str(self.secagg.mode) != "off":
            raise ValueError(
                "secure aggregation bounds what one number may move by, and the statistics of a batch norm move "
                f"further: {other}"
            )

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
    def averaged(self) -> bool:
        """Whether what is published is the moving average of the models, and not the last of them."""
        return Decimal(self.aggregation.ema) > 0

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


def approval(study: str, site: str, data: str, *, one_image_per_patient: bool = False) -> Document:
    """A site's yes to one study's hash.

    Args:
        study: the hash.
        site: who says yes.
        data: the data source it will use.
        one_image_per_patient: what the operator declared of that source; it becomes public with the model's card.
    """
    body = {"study": study, "site": site, "data": data, "one_image_per_patient": one_image_per_patient}
    return Document(APPROVAL, body)


def read_approval(document: Document) -> dict[str, Any]:
    """The body of an approval, whose signature the caller checks.

    Raises:
        Refusal: MALFORMED when it is not what `approval` writes.
    """
    body = document.body
    kinds = {"study": str, "site": str, "data": str, "one_image_per_patient": bool}
    if document.kind != APPROVAL or {name: type(value) for name, value in body.items()} != kinds:
        raise Refusal(RefusalCode.MALFORMED, APPROVAL)
    return body


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
