"""Which studies are compared, so that the comparison is fair? One draft for each arm, from one draft.

Every arm has the same network, first weights, optimiser, batch size, rounds and schedule. Equal compute: a hospital
alone takes as many steps as it takes in the federation, and the pooled model as many as all hospitals together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from privacy.errors import ConsiliumError
from privacy.study import Study

_NAME = 32
DEAL_SEED = 7
"""Which patients go to which hospital, unless another seed is asked for."""


def together(draft: Study, sites: Sequence[str]) -> Study:
    """The study itself, at these sites."""
    least = min(draft.aggregation.minimum_sites, len(sites))
    return _changed(draft, sites, draft.study.name, aggregation={"minimum_sites": least})


def without(draft: Study, sites: Sequence[str], left_out: str) -> Study:
    """The study at all sites but one.

    Raises:
        ConsiliumError: no site is left, or there is none of that name.
    """
    rest = [site for site in sites if site != left_out]
    if left_out not in sites or not rest:
        raise ConsiliumError(
            "This hospital cannot be left out", left_out, f"The hospitals are {', '.join(sites)}; one must remain."
        )
    least = min(draft.aggregation.minimum_sites, len(rest))
    name = f"{draft.study.name[:_NAME]}-less-{sites.index(left_out) + 1}"
    return _changed(draft, rest, name, aggregation={"minimum_sites": least})


def alone(draft: Study, sites: Sequence[str], site: str) -> Study:
    """One hospital by itself, for as many steps as it takes in the federation."""
    name = f"{draft.study.name[:_NAME]}-one-{sites.index(site) + 1}"
    return _changed(draft, [site], name, aggregation=_plain(draft))


def pooled(draft: Study, site: str, hospitals: int) -> Study:
    """The hospital `site` that holds the images of all, for as many steps as all of them take together."""
    steps = draft.rounds.local_steps * hospitals
    name = f"{draft.study.name[:_NAME]}-all"
    return _changed(draft, [site], name, aggregation=_plain(draft), rounds={"local_steps": steps})


def _plain(draft: Study) -> dict[str, Any]:
    """Where there is one hospital nothing is combined: no server rule acts."""
    return {"strategy": "fedavg", "minimum_sites": 1, "server_learning_rate": "1", "proximal_mu": "0"}


def _changed(draft: Study, sites: Sequence[str], name: str, **changes: dict[str, Any]) -> Study:
    body = draft.body()
    body["sites"], body["study"]["name"] = sorted(sites), name
    body["initial"]["sha256"] = ""
    if len(sites) == 1:
        body["secagg"] = {"mode": "off"}  # of one hospital there is no sum
    elif draft.secagg.mode == "on" and len(sites) != len(draft.sites):
        body["secagg"]["threshold"] = 0  # the smallest one for so many sites
    for section, values in changes.items():
        body[section] |= values
    try:
        return Study.model_validate(body)
    except ValidationError as error:
        why = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise ConsiliumError(
            "The study cannot be run at these hospitals",
            f"{name} at {', '.join(sorted(sites))}: {why}",
            "Correct the draft, or simulate another number of hospitals.",
        ) from error
