"""What does a check say of one file? Facts that hold, doubts that stay open, or the first thing that is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from privacy.errors import ConsiliumError


@dataclass(frozen=True)
class Report:
    """What one file turned out to be: facts that hold, and doubts that this file alone cannot settle."""

    path: Path
    title: str
    facts: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    error: ConsiliumError | None = None
