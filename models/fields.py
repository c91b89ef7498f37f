"""What may a named parameter be? The kinds of value that networks and transforms declare, and their messages.

A study writes real numbers as decimal strings, so that its hash leaves nothing open; `Real` reads both. Every kind
answers two questions: `read` gives the value to compute with, and raises ValueError with words that finish the
sentence "... is not good: "; `words` says in a phrase what is expected.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a specification.

    Attributes:
        where: the entry, as it is written in a study: "network.parameters.growth".
        what: what is wrong with it.
        remedy: what to write instead.
    """

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.remedy}"


class Field(Protocol):
    """A kind of value with a default; `default` None means that the entry must be written."""

    @property
    def default(self) -> Any: ...
    @property
    def words(self) -> str: ...
    def read(self, value: Any) -> Any: ...


@dataclass(frozen=True)
class Real:
    """A finite real number in [low, high]; int, float or decimal string."""

    default: float | None
    low: float = -1e9
    high: float = 1e9
    above: bool = False

    @property
    def words(self) -> str:
        return f"a number {'above' if self.above else 'from'} {self.low:g}, up to {self.high:g}"

    def read(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(self.words)
        try:
            number = float(value)
        except ValueError:
            raise ValueError(self.words) from None
        if not math.isfinite(number) or not self.low <= number <= self.high or (self.above and number == self.low):
            raise ValueError(self.words)
        return number


@dataclass(frozen=True)
class Whole:
    """A whole number in [low, high]."""

    default: int | None
    low: int
    high: int

    @property
    def words(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def read(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise ValueError(self.words)
        return value


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    default: str | None
    among: tuple[str, ...]

    @property
    def words(self) -> str:
        return f"one of {', '.join(self.among)}"

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.among:
            raise ValueError(self.words)
        return value


def read(fields: Mapping[str, Field], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values to compute with: those given, and the defaults of the others.

    Raises:
        ValueError: an unknown name, a missing one, or a value that its kind does not allow.
    """
    problems = check(fields, given, "parameters")
    if problems:
        raise ValueError("; ".join(str(problem) for problem in problems))
    return {name: field.read(given[name]) if name in given else field.default for name, field in fields.items()}


def check(fields: Mapping[str, Field], given: Any, where: str) -> list[Problem]:
    """Everything that `read` would refuse, as problems that name the remedy."""
    if not isinstance(given, Mapping):
        return [Problem(where, "a table of named values is expected", "Write name = value entries, or leave it out.")]
    problems = []
    for name, value in given.items():
        if name not in fields:
            remedy = f"Known here: {', '.join(fields)}." if fields else "It takes no parameters; leave them out."
            problems.append(unknown(f"{where}.{name}", "parameter", str(name), fields, remedy))
            continue
        try:
            fields[name].read(value)
        except ValueError as error:
            default = fields[name].default
            usual = "" if default is None else f"; {default} is the default"
            problems.append(Problem(f"{where}.{name}", f"{value!r} cannot be used", f"Write {error}{usual}."))
    for name, field in fields.items():
        if field.default is None and name not in given:
            problems.append(Problem(f"{where}.{name}", "this parameter is missing", f"Write {field.words}."))
    return problems


def unknown(where: str, kind: str, name: str, known: Iterable[str], remedy: str = "") -> Problem:
    """The problem of a name that does not exist, with the closest that does."""
    names = list(known)
    closest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    guess = f"Did you mean {closest[0]}? " if closest else ""
    return Problem(where, f"there is no {kind} {name!r}", guess + (remedy or f"Known: {', '.join(sorted(names))}."))
