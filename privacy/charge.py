"""What shows that a release was paid for? A charge, which only a site's purse makes, once it is on the disk."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Charge:
    """A release that every eligible patient has paid for, durably (RULES B1, S3).

    Attributes:
        study: its hash.
        slot: whose release it pays for.
        kind: train, validate or test.
        round: of the request.
        paid: the slot that paid for the noise of the round. Where it is another than `slot`, what that one stored may
            be sent again, and nothing is noised anew (RULES B2).
        counter: the site's own number of this charge, without gaps (RULES B7).
        fresh: whether it was made now; False when it was found: compute again, or send again, under the same charge.
    """

    study: str
    slot: int
    kind: str
    round: int
    paid: int
    counter: int
    fresh: bool
