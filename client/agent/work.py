"""What is being computed, for whom, and until when? One request's work, which others may wait for or stop."""

from __future__ import annotations

import threading
import time

from privacy.errors import Refusal, RefusalCode
from privacy.messages import Request


class Work:
    """One computation. `check` is called between batches and raises when there is no use in going on.

    `stopped` is the reason once somebody has called `cancel`.

    Args:
        request: the bound request.
        deadline: moment on the monotonic clock, seconds.
    """

    def __init__(self, request: Request, deadline: float) -> None:
        header = request.header
        self.study, self.session, self.slot, self.kind = header.study, header.session, header.slot, header.kind
        self.request = request.hash
        self._deadline = deadline
        self._ended = threading.Event()
        self.stopped: RefusalCode | None = None
        self._answer, self._refusal = b"", Refusal(RefusalCode.INTERNAL)

    def check(self) -> None:
        """Go on?

        Raises:
            Refusal: LATE, or the reason given to `cancel`.
        """
        if self.stopped is not None:
            raise Refusal(self.stopped, str(self.slot))
        if time.monotonic() > self._deadline:
            raise Refusal(RefusalCode.LATE, str(self.slot))

    def cancel(self, code: RefusalCode) -> None:
        """Stop at the next check. Who waits hears `code` once the computing thread has let go."""
        self.stopped = code

    def finish(self, answer: bytes) -> None:
        """The answer is stored."""
        self._answer = answer
        self._ended.set()

    def fail(self, refusal: Refusal) -> None:
        """There will be no answer."""
        self._refusal = refusal
        self._ended.set()

    def result(self) -> bytes:
        """Wait for the stored answer.

        Raises:
            Refusal: why there is none.
        """
        self._ended.wait()
        if self._answer:
            return self._answer
        raise self._refusal
