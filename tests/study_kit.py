"""A small study as a draft: what a test leaves open is the smallest that stands, so a test names what it is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w

from privacy.study import Study

Sections = Mapping[str, Mapping[str, Any]]

FIVE = ("st-anna", "st-bona", "st-cara", "st-dora", "st-emma")
SMALLEST: Sections = {
    "study": {"title": "A tiny study", "purpose": "To test."},
    "task": {"classes": ["normal", "finding"]},
    "network": {"name": "resnet-small"},
    "input": {"size": [8, 8]},
    "optimiser": {"name": "sgd"},
}


def merged(*layers: Sections) -> dict[str, dict[str, Any]]:
    """Sections laid over each other: of an entry that several give, the last stands."""
    found: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, entries in layer.items():
            found[section] = {**found.get(section, {}), **entries}
    return found


def draft(name: str = "tiny", sites: Sequence[str] = ("st-anna", "st-bona"), **sections: Mapping[str, Any]) -> str:
    """A study in TOML: draft("noisy", FIVE, rounds={"count": 3}, secagg={"mode": "on"})."""
    own = merged(SMALLEST, {"study": {"name": name}}, sections)
    return tomli_w.dumps({"sites": list(sites), **own})


def study(name: str = "tiny", sites: Sequence[str] = ("st-anna", "st-bona"), **sections: Mapping[str, Any]) -> Study:
    """The same, read."""
    return Study.from_toml(draft(name, sites, **sections))
