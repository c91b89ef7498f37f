"""What does a site keep of a study from round to round, that never leaves it?

Its control variate (SCAFFOLD), its own normalisation (FedBN), its personal model (Ditto): float32 vectors, one file
for each round that changed them, because a round may be asked for again: it then begins once more from what there was
before it. A study with noise keeps none of these (RULES N3), only the noised update of a round, to send it again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from privacy.errors import Refusal, RefusalCode
from privacy.files import replacing
from privacy.messages import Vector


class Keepsakes:
    """The vectors of one study in `folder`, which is made when the first is kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def newest(self, what: str, upto: int, size: int) -> Vector | None:
        """The vector float32 [size] of the last round up to `upto`; None when there is none of that length."""
        rounds = [number for number in self._rounds(what) if number <= upto]
        if not rounds:
            return None
        vector = np.fromfile(self._path(what, max(rounds)), dtype="<f4")
        return vector if vector.shape == (size,) else None

    def of_round(self, what: str, round_: int, size: int) -> Vector | None:
        """The vector float32 [size] of exactly this round, or None."""
        return self.newest(what, round_, size) if round_ in self._rounds(what) else None

    def keep(self, what: str, round_: int, vector: Vector, oldest: int = 0) -> None:
        """Make a vector durable for a round, and let those of rounds before `oldest` go.

        Raises:
            Refusal: DISK_FULL.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with replacing(self._path(what, round_), 0o600) as part, open(part, "wb") as file:
                file.write(np.ascontiguousarray(vector, dtype="<f4").data.cast("B"))
        except OSError as error:
            raise Refusal(RefusalCode.DISK_FULL) from error
        for old in self._rounds(what):
            if old < oldest:
                self._path(what, old).unlink(missing_ok=True)

    def discard(self) -> None:
        """Forget everything: the study is over."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _rounds(self, what: str) -> list[int]:
        found = self._folder.glob(f"{what}-*.f32") if self._folder.is_dir() else ()
        return sorted(int(path.stem.rpartition("-")[2]) for path in found)

    def _path(self, what: str, round_: int) -> Path:
        return self._folder / f"{what}-{round_:06d}.f32"
