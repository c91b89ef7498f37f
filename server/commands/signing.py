"""What happens when a study is signed? Its hospitals and its promise are checked, its first weights fixed and kept."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from models import bounds, tasks
from privacy import mechanisms
from privacy.errors import ConsiliumError
from privacy.identity import Identity
from privacy.roster import Roster
from privacy.study import Study
from privacy.terminal import out
from server.records import StudyRecord
from server.registry import Registry
from server.second_opinion import check


def active(roster: Roster) -> list[str]:
    """The sites that may take part now, by name."""
    now = datetime.now(UTC)
    return [site.name for site in roster.sites if site.active(now)]


def check_sites(study: Study, roster: Roster) -> None:
    """Make sure that every hospital the study names can take part.

    Raises:
        ConsiliumError: one is not enrolled, revoked, or expired.
    """
    lines = {site.name: site for site in roster.sites}
    now = datetime.now(UTC)
    for name in study.sites:
        if name not in lines:
            known = ", ".join(active(roster)) or "none yet"
            raise ConsiliumError(
                "The study names a hospital that is not enrolled",
                name,
                f"Enrolled sites: {known}. `consilium-coordinator sites invite` says how one joins.",
            )
        if not lines[name].active(now):
            why = "revoked" if lines[name].revoked else "no longer valid: its enrolment has expired"
            raise ConsiliumError(
                "The study names a hospital that cannot take part",
                f"{name} is {why}",
                "Take it out of `sites`. Expired: `consilium-site enrol --renew`. Revoked: that is for good.",
            )


def sign_study(registry: Registry, identity: Identity, draft: Study, initial: Path | None) -> StudyRecord:
    """Fix the weights a draft starts from, sign it, and keep it.

    Args:
        initial: the weights to start from (safetensors); None makes fresh ones from the draft's seed. What a draft
            with [transfer] adds to them, and last layers for another question, start fresh from the seed.

    Raises:
        ConsiliumError: the weights do not fit, a study of that name is going on, two accountants disagree about what
            the draft promises its patients, or no grid holds its noise.
    """
    from models import weights  # torch: seconds to load, and needed here only

    if initial is None and draft.network.norm == "frozen":
        raise ConsiliumError(
            'A study with norm = "frozen" goes on from weights that were learned elsewhere',
            f"{draft.study.name} has none",
            'Name them with --initial, or write [network] norm = "group".',
        )
    spec = draft.spec()
    if draft.privacy.mode != "none":
        with out().status("Asking a second accountant what it promises (a minute, for 100 000 steps) …"):
            check(draft)
    with out().status("Making the weights it starts from …"):
        if initial is None:
            state = registry.blobs.put(weights.initial_state(spec, draft.initial.seed))
        else:
            state = registry.blobs.put(_given(spec, initial, draft.initial.seed))
        path = registry.blobs.path(state)
        flat = registry.blobs.put(weights.state_vector(path).astype("<f4", copy=False).tobytes())
    if draft.initial.sha256 not in ("", state):
        raise ConsiliumError(
            "The draft names other initial weights than these",
            f"{draft.initial.sha256[:16]} in the draft, {state[:16]} here",
            "Leave `sha256` out of [initial], or name the right file with --initial.",
        )
    if draft.privacy.mode != "none":
        reach = bounds.of(task := tasks.get(spec)).reach
        mechanisms.training(draft, registry.blobs.size(flat) // 4)
        mechanisms.evaluation(draft, task.size, reach)
    study = draft.model_copy(update={"initial": draft.initial.model_copy(update={"sha256": state})})
    return registry.add_study(study.document().signed_by(identity), state, flat)


def _given(spec: dict[str, object], path: Path, seed: int) -> bytes:
    from models import pretrained

    try:
        return pretrained.initial_state(spec, path, seed)
    except OSError as error:
        raise ConsiliumError(
            "The initial weights cannot be read", f"{path} ({error.strerror})", "Check the path."
        ) from error
    except ValueError as error:
        raise ConsiliumError(
            "The initial weights do not fit the study's network",
            f"{path}: {error}",
            "Change the draft as it says, or name weights of the same [network].",
        ) from error
