"""In whose name does an agent answer? The site's, with its signature under every word."""

from __future__ import annotations

from privacy.canonical import sha256 as digest
from privacy.errors import RefusalCode
from privacy.identity import Identity
from privacy.messages import Answer, Request, refused

NOBODY = "0" * 64


class Voice:
    """Makes answers, signed by the site's identity."""

    def __init__(self, identity: Identity, site: str) -> None:
        self._identity, self._site = identity, site

    def done(
        self, request: Request, detail: dict[str, str], *, sha256: str = "", size: int = 0, statistics: int = 0
    ) -> bytes:
        """The encoded answer to a request that was served; `sha256`, `size` and `statistics` describe its payload."""
        header = request.header
        answer = Answer(
            study=header.study,
            session=header.session,
            slot=header.slot,
            site=self._site,
            request=request.hash,
            status="done",
            detail=detail,
            payload_sha256=sha256,
            payload_bytes=size,
            statistics=statistics,
        )
        return answer.signed(self._identity).encode()

    def refused(self, request: Request, code: RefusalCode, about: str = "") -> bytes:
        """The encoded answer that says no; `about` names the site whose message was the reason, if one was."""
        return refused(request.header, request.hash, self._site, code, about).signed(self._identity).encode()

    def unread(self, document: bytes, code: RefusalCode) -> bytes:
        """The answer to something that is no request of our coordinator."""
        answer = Answer(
            study=NOBODY,
            session=0,
            slot=0,
            site=self._site,
            request=digest(document),
            status="refused",
            code=code.value,
        )
        return answer.signed(self._identity).encode()
