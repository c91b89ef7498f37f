"""What runs if someone starts the study's bundle with Flower's stock node? Nothing: every message is refused.

The bundle Flower needs for a run names this app and carries no code. A hospital takes part through its connector
and its agent, which decide by the study's hash that the site approved.
"""

from __future__ import annotations

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

REFUSED = 1000


class RefusingApp(ClientApp):
    """Answers every message, of whatever type, with an error."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Refuse `message`."""
        reason = "This site takes part through its Consilium connector only; nothing was run."
        return Message(Error(REFUSED, reason), reply_to=message)


app = RefusingApp()
