"""What has left this site, by its journal? The agent's records must know it, lest a restored backup repeats it.

The journal is written after the records and before the bytes leave. So records that do not know something of it are
older than it, and whatever they have forgotten counts as used (RULES S3).
"""

from __future__ import annotations

import re
from pathlib import Path

from client.agent.rings import StageLeft
from client.agent.store import Store
from privacy.journal import read
from privacy.messages import OPENING, SETTING_UP

REFUSAL = "refusal"
STAGE = re.compile(rf"answer to ({'|'.join(sorted(SETTING_UP | OPENING))})(?: of (train|validate|test) (\d+))?\Z")


class History:
    """One reading of the journal. `slots`: the highest slot of each study that an answer left under."""

    def __init__(self, journal: Path) -> None:
        self.slots: dict[str, int] = {}
        self._stages: dict[str, dict[str, StageLeft]] = {}
        for entry in read(journal):
            if entry["what"] == REFUSAL:  # which may name any slot
                continue
            study, slot = entry["study"], entry["slot"]
            self.slots[study] = max(self.slots.get(study, 0), slot)
            if match := STAGE.match(entry["what"]):
                kind, round_ = match[2] or "", int(match[3] or 0)
                self._stages.setdefault(study, {})[entry["sha256"]] = StageLeft(entry["sha256"], slot, kind, round_)

    def hold_against(self, store: Store, study: str) -> None:
        """Let the records of a study be no older than what left."""
        store.never_below(study, self.slots.get(study, 0))
        store.remember(study, self._stages.get(study, {}).values())
