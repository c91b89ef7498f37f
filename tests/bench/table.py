"""How is a measurement shown and kept? One table on the terminal, and the same lines as JSON under build/bench/.

A line says what was measured, in which unit, ours and what stands beside it, and, where there is one, the goal and
whether it is met. A goal is a number that the value must not exceed, worked out by the caller.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FOLDER = Path("build/bench")


@dataclass(frozen=True)
class Line:
    """One measurement.

    Attributes:
        what: what was measured, for people.
        unit: "s", "MiB" or "".
        ours: our value; None when it was not measured.
        beside: the values of others, or of ours under other circumstances, by name.
        goal: the most that `ours` may be; None when there is no goal.
        rule: the goal in words, such as "at most 0.25 of stock Flower".
    """

    what: str
    unit: str
    ours: float | None
    beside: Mapping[str, float] = field(default_factory=dict)
    goal: float | None = None
    rule: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None when there is no goal or no value."""
        return None if self.goal is None or self.ours is None else self.ours <= self.goal

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "what": self.what,
            "unit": self.unit,
            "ours": self.ours,
            "beside": dict(self.beside),
            "goal": self.goal,
            "rule": self.rule,
            "met": self.met,
        }


def show(name: str, title: str, lines: Sequence[Line], notes: Sequence[str] = ()) -> Path:
    """Print the table and write build/bench/<name>.json; returns the file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps([line.record() for line in lines], indent=1) + "\n", encoding="utf-8")
    names = list(dict.fromkeys(other for line in lines for other in line.beside))
    table = Table("", "unit", "ours", *names, "goal", "", title=title, title_justify="left", header_style="bold")
    for line in lines:
        goal = "" if line.goal is None else f"≤ {_number(line.goal)} ({line.rule})"
        met = {True: "[green]met[/]", False: "[bold red]missed[/]", None: ""}[line.met]
        others = (_number(line.beside.get(other)) for other in names)
        table.add_row(line.what, line.unit, _number(line.ours), *others, goal, met)
    console = Console()
    console.print(table)
    for note in notes:
        console.print(f"  {note}", highlight=False)
    console.print(f"  {path}")
    return path


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
