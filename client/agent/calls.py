"""Who is still inside? Calls under way, so that an agent that stops lets them end and takes no new ones."""

from __future__ import annotations

import threading
from types import TracebackType

from privacy.errors import Refusal, RefusalCode

PATIENCE_SECONDS = 30.0


class Calls:
    """A context manager around every call."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside, self._closed = 0, False

    def __enter__(self) -> None:
        """Begin a call.

        Raises:
            Refusal: BUSY once `close` was called.
        """
        with self._condition:
            if self._closed:
                raise Refusal(RefusalCode.BUSY)
            self._inside += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._condition:
            self._inside -= 1
            self._condition.notify_all()

    def close(self) -> None:
        """Take no new calls and wait until those under way have ended; a stuck sender is not waited for for ever."""
        with self._condition:
            self._closed = True
            self._condition.wait_for(lambda: self._inside == 0, PATIENCE_SECONDS)
