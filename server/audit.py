"""Who did what at the SuperLink, and who was turned away? A hash-chained log that an attacker cannot make grow.

Events that matter (a node came or went, a run started or ended) get a line each. Refusals are counted: the first
of a kind is written at once, its repeats within ten minutes become one line with their number, and so many
different strangers that there is no room for each are counted together. One thread writes, so no request waits
for the disk.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from privacy.errors import ConsiliumError
from privacy.journal import Journal

WINDOW = 600.0
PEERS = 64
_QUEUE = 10_000


class Audit:
    """The log at `path`. Methods are thread-safe and never block on the disk."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Open or create the log.

        Raises:
            ConsiliumError: the log on disk was changed.
        """
        self._journal = Journal(path)
        self._clock = clock
        self._lock = threading.Lock()
        self._refusals: dict[tuple[str, str, str], list[float | int | str]] = {}
        self._queue: queue.Queue[dict[str, object] | None] = queue.Queue(_QUEUE)
        self._thread = threading.Thread(target=self._write, name="audit", daemon=True)
        self._thread.start()

    def record(self, event: str, **facts: str | int) -> None:
        """Log one event with its facts."""
        moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        try:
            self._queue.put_nowait({"time": moment, "event": event, **facts})
        except queue.Full:
            print("The audit log cannot keep up: a line was dropped.", file=sys.stderr)

    def refused(self, listener: str, peer: str, reason: str, path: str) -> None:
        """Log or count one refusal on `listener` to `peer`. Repeats of (listener, peer, reason) are counted."""
        with self._lock:
            key = (listener, peer, reason)
            if key not in self._refusals and len(self._refusals) >= PEERS:
                key = (listener, "others", reason)
            known = self._refusals.get(key)
            if known is not None:
                known[1] = int(known[1]) + 1
                return
            self._refusals[key] = [self._clock(), 0]
        self.record("refused", listener=listener, peer=key[1], reason=reason, path=_printable(path))

    def settle(self, everything: bool = False) -> None:
        """Write the counts of refusals whose ten minutes are over. Called every second."""
        with self._lock:
            now = self._clock()
            over = [k for k, (since, _) in self._refusals.items() if everything or now - float(since) >= WINDOW]
            counts = [(key, int(self._refusals.pop(key)[1])) for key in over]
        for (listener, peer, reason), count in counts:
            if count:
                self.record("refused-repeats", listener=listener, peer=peer, reason=reason, times=count)

    def close(self) -> None:
        """Write what is pending and close the file."""
        self.settle(everything=True)
        self._queue.put(None)
        self._thread.join(10)
        self._journal.close()

    def _write(self) -> None:
        while (entry := self._queue.get()) is not None:
            try:
                self._journal.append(entry)
            except (OSError, ConsiliumError) as error:
                print(f"The audit log could not be written: {error}", file=sys.stderr)


def _printable(path: str) -> str:
    return "".join(c if " " < c < "\x7f" else "?" for c in path[:80])
