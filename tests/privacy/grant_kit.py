"""Studies with noise, an officer, and papers that are right unless a test changes them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from privacy.canonical import sha256
from privacy.grants import Allowance, Grant
from privacy.identity import Identity
from privacy.roster import expiry
from privacy.study import Study
from tests import study_kit
from tests.study_kit import FIVE

SITE = "st-anna"
NOW = datetime.now(UTC)


def study(name: str = "tiny", mode: str = "shared", noise: str = "2", steps: int = 1, rounds: int = 4) -> Study:
    """A study that every test site is in; with noise, 2 more slots of training than rounds, 2 tries of evaluations."""
    noised = {"noise_multiplier": noise, "evaluation_noise": 8}
    made = study_kit.study(
        name,
        FIVE[:4],
        optimiser={"batch_size": 8},
        rounds={"count": rounds, "local_steps": steps, "reserve": 2},
        aggregation={"weights": "examples" if mode == "none" else "equal", "minimum_sites": 3},
        secagg={"mode": "on"},
        privacy={"mode": mode, **({} if mode == "none" else noised)},
    )
    return made.model_copy(update={"initial": made.initial.model_copy(update={"sha256": sha256(b"initial")})})


def allowance(officer: Identity, **changes: Any) -> bytes:
    """Epsilon 8 at order 4 for every patient of the site."""
    values: dict[str, Any] = {"site": SITE, "serial": 1, "epsilon": "8", "delta": "0.000001", "order": 4}
    return Allowance(**{**values, **changes}).signed(officer).encode()


def grant(officer: Identity, granted: Study, **changes: Any) -> bytes:
    """Leave for a study, with room to spare."""
    values: dict[str, Any] = {
        "site": SITE, "serial": 1, "study": granted.hash, "slots": granted.slots, "epsilon": "20", "cap": "40",
        "delta": "0.000001", "expires": expiry(NOW),
    }  # fmt: skip
    return Grant(**{**values, **changes}).signed(officer).encode()
