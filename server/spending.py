"""How much of what a study promised has it used up? Slots and ε so far, beside what was reserved at the start.

So far means: charged, whether a patient was sampled or not (RULES B1). The slots are those that this coordinator has
opened, which are no fewer than the sites have answered. All figures are the ones that bind (`privacy.claims`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from privacy.accounting import ROLES, Role, Tier, events
from privacy.checkpoint import witnesses_of
from privacy.claims import TIERS, epsilon_rdp, rounded
from privacy.errors import ConsiliumError
from privacy.files import replacing
from privacy.ledger import Abort, Account
from privacy.roster import Roster
from privacy.study import Study
from privacy.terminal import table
from server.ledger import Ledger
from server.records import SlotRecord

TIER_NAMES: dict[Tier, str] = {1: "1: sums only", 2: "2: sums broken open"}
_KINDS: dict[str, Role] = {"train": "train", "validate": "validation", "test": "test"}
_POINTS = 60


def has_noise(study: Study) -> bool:
    """Whether the study keeps a budget at all."""
    return study.privacy.mode != "none"


@dataclass(frozen=True)
class Spending:
    """Where one study stands.

    Attributes:
        slots: T_max, those of the evaluations with them.
        used: slots that were opened, whatever became of them.
        releases: role → (charged so far, charged at T_max), in releases.
        training: slots of training so far; with `per-site` noise a slot is a round, and a round asked again is free.
        training_slots: the most slots of training there can be.
    """

    study: Study
    slots: int
    used: int
    releases: dict[Role, tuple[int, int]]
    training: int
    training_slots: int

    @classmethod
    def of(cls, study: Study, opened: Sequence[SlotRecord], signed: int = 0) -> Spending:
        """Count what a study has used.

        Args:
            study: one with noise.
            opened: its slots at this coordinator.
            signed: the highest slot that the ledger holds a release of.

        Raises:
            ConsiliumError: the study has no noise.
        """
        plan = events(study, 1)
        rounds = [slot.round for slot in opened if slot.kind == "train"]
        shared = study.privacy.mode == "shared"
        each = 1 if shared else study.rounds.local_steps
        most = plan["train"].count // each
        training = min(most, len(rounds) if shared else len(set(rounds)))
        counts: dict[Role, int] = dict.fromkeys(ROLES, 0)
        for slot in opened:
            counts[_KINDS[slot.kind]] += 1
        counts["train"] = training * each
        releases = {role: (min(counts[role], plan[role].count), plan[role].count) for role in ROLES}
        used = max(len(opened), signed)
        return cls(study, study.slots, used, releases, training, most)

    def epsilon(self, role: Role, tier: Tier, *, whole: bool = False) -> str:
        """ε of a patient of one role in one tier, so far or (`whole`) at T_max; rounded up."""
        return rounded(
            epsilon_rdp(events(self.study, tier)[role], self.study.privacy.delta, self.releases[role][whole])
        )

    def curve(self, tier: Tier) -> tuple[list[int], list[float]]:
        """ε of a training patient over the slots of training, from 0 to the last there can be."""
        event = events(self.study, tier)["train"]
        each, most = event.count // self.training_slots, self.training_slots
        marks = sorted({0, *(max(1, most * point // _POINTS) for point in range(1, _POINTS + 1)), self.training})
        return marks, [epsilon_rdp(event, self.study.privacy.delta, mark * each) for mark in marks]

    def draw(self, path: Path) -> None:
        """Both tiers over the slots of training, and where the study stands, as a PNG file.

        Raises:
            ConsiliumError: there is no such folder.
        """
        if not path.absolute().parent.is_dir():
            raise ConsiliumError("There is no such folder", str(path.absolute().parent), "Make it, or name another.")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 3.9), layout="constrained")
        axes = figure.subplots()
        for tier, colour, dashes in zip(TIERS, ("#0072B2", "#D55E00"), ("-", "--"), strict=True):
            marks, values = self.curve(tier)
            axes.plot(marks, values, dashes, color=colour, linewidth=2.2, label=f"tier {TIER_NAMES[tier]}")
            at = values[marks.index(self.training)]
            axes.plot([self.training], [at], "o", color=colour, markersize=8, clip_on=False, zorder=3)
            axes.annotate(
                self.epsilon("train", tier),
                (self.training, at),
                xytext=(6, 8),
                textcoords="offset points",
                color=colour,
            )
        axes.axvline(self.training, color="#888888", linewidth=0.8, linestyle=":")
        axes.set_xlabel(f"slots of training, {self.training} of {self.training_slots} used")
        axes.set_ylabel(f"ε of a training patient at δ = {self.study.privacy.delta}")
        axes.set_title(f"{self.study.study.name}: ε so far, and what was reserved", loc="left", fontsize=11)
        axes.set(xlim=(0, self.training_slots * 1.02), ylim=(0, None))
        axes.grid(color="#D8D8D8", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", frameon=False)
        FigureCanvasAgg(figure)
        with replacing(path) as part:
            figure.savefig(part, format="png", dpi=160)


def aborted(account: Account | None) -> bool:
    """Whether the ledger says that the study was given up for good."""
    return account is not None and isinstance(account.final, Abort)


def standing(account: Account | None) -> str:
    """What the ledger says of a study, in words."""
    if account is None:
        return "nothing reserved yet"
    if account.final is None:
        return "open"
    return f"aborted: {account.final.reason}" if isinstance(account.final, Abort) else "committed"


def entries(account: Account) -> int:
    """How many entries of the ledger are about a study."""
    return 1 + sum(counter for counter, _ in account.steps.values()) + (account.final is not None)


def believed(ledger: Ledger, roster: Roster, colluding: int) -> int | None:
    """The size of the newest head that enough sites have cosigned (RULES B7); None when there is none yet."""
    note = ledger.valid_note(roster.coordinator, witnesses_of(roster), colluding)
    return note.checkpoint.size if note is not None else None


def section(
    study: Study, hash_: str, opened: Sequence[SlotRecord], ledger: Ledger, roster: Roster
) -> list[RenderableType]:
    """The part of `study status` about the budget of a study with noise."""
    account = ledger.account(hash_)
    spending = Spending.of(study, opened, account.slots_used if account else 0)
    rows = [
        (
            TIER_NAMES[tier] if role == ROLES[0] else "",
            role,
            "{} of {}".format(*spending.releases[role]),
            spending.epsilon(role, tier),
            spending.epsilon(role, tier, whole=True),
        )
        for tier in TIERS
        for role in ROLES
    ]
    head = believed(ledger, roster, study.secagg.colluding)
    seen = "no head is believed yet" if head is None else f"the newest believed head holds {head} of {ledger.size}"
    noted = f"{entries(account)} entries of this study, " if account else ""
    over = account is not None and not account.open
    left = "no more will be" if over else f"{spending.slots - spending.used} left"
    return [
        Text(f"budget: {spending.used} of T_max {spending.slots} slots used, {left}; δ {study.privacy.delta}"),
        table("tier", "patients for", "releases", "ε so far", "ε at T_max", rows=rows),
        Text(f"ledger: {standing(account)}; {noted}{seen}", style="dim"),
    ]
