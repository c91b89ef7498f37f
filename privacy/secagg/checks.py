"""Is what a site sent for a secure sum its own, for this very session and request? One answer for both sides.

Every site checks what the coordinator hands on; the coordinator checks the same before it does, so that a bad message
is blamed on whoever sent it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from privacy.errors import Refusal, RefusalCode
from privacy.identity import Document
from privacy.messages import Answer
from privacy.secagg.messages import Keys, Opening, Shares, Survivors, keys_digest
from privacy.secagg.states import Place


def check_keys(place: Place, name: str, document: Document) -> Keys:
    """One site's keys for this very session.

    Raises:
        Refusal: MALFORMED, BAD_SIGNATURE, OUT_OF_ORDER.
    """
    message = Keys.verified(document, place.roster[name])
    _same(place, message, name)
    if (message.first_slot, message.last_slot) != (place.first_slot, place.last_slot):
        raise Refusal(RefusalCode.OUT_OF_ORDER, name)
    return message


def check_shares(
    place: Place, name: str, document: Document, keys: Mapping[str, Document], everyone: str | None = None
) -> Shares:
    """One site's shares, dealt to exactly the sites that brought keys.

    Args:
        keys: every signed `Keys`, by site.
        everyone: their `keys_digest`, when the caller has it: over many sites it is the costly part.

    Raises:
        Refusal: MALFORMED, BAD_SIGNATURE, OUT_OF_ORDER, PEER_SHARES.
    """
    message = Shares.verified(document, place.roster[name])
    _same(place, message, name)
    if message.keys != (everyone or keys_digest(keys)):
        raise Refusal(RefusalCode.OUT_OF_ORDER, name)
    if set(message.parcels) != set(keys):
        raise Refusal(RefusalCode.PEER_SHARES, name)
    return message


def check_submission(place: Place, slot: int, header: str, name: str, document: Document) -> Answer:
    """The signed answer that came with one site's masked vector, for this very request.

    Raises:
        Refusal: MALFORMED, BAD_SIGNATURE, OUT_OF_ORDER for another request or a refused one, MODEL_SHAPE.
    """
    if document.kind != "answer":
        raise Refusal(RefusalCode.MALFORMED, name)
    answer = Answer.read(document.body)
    if answer.body() != document.body:
        raise Refusal(RefusalCode.MALFORMED, name)
    document.verify(place.roster[name])
    found = (answer.study, answer.session, answer.site, answer.slot, answer.request, answer.status)
    if found != (place.plan.study, place.session, name, slot, header, "done"):
        raise Refusal(RefusalCode.OUT_OF_ORDER, name)
    if answer.payload_bytes % 4 or answer.statistics != place.plan.statistics:
        raise Refusal(RefusalCode.MODEL_SHAPE, name)
    place.plan.length(answer.payload_bytes // 4)
    return answer


def check_submissions(
    place: Place, slot: int, header: str, cohort: Sequence[str], proof: Mapping[str, Document]
) -> None:
    """That every site of the cohort signed an answer to this very request.

    Raises:
        Refusal: TOO_FEW when one is missing, SURVIVORS for a stranger, else as `check_submission`.
    """
    _within(proof, cohort)
    if len(proof) != len(cohort):
        raise Refusal(RefusalCode.TOO_FEW)
    found = {check_submission(place, slot, header, name, proof[name]).payload_bytes for name in cohort}
    if len(found) != 1:
        raise Refusal(RefusalCode.MODEL_SHAPE)


def check_survivors(
    place: Place, slot: int, header: str, survivors: Sequence[str], proof: Mapping[str, Document]
) -> None:
    """That at least w of the survivors signed this very set.

    Raises:
        Refusal: TOO_FEW, SURVIVORS for a stranger or another set, OUT_OF_ORDER, MALFORMED, BAD_SIGNATURE.
    """
    _within(proof, survivors)
    for name, document in proof.items():
        check_survivor(place, slot, header, survivors, name, document)
    if len(proof) < place.plan.threshold:
        raise Refusal(RefusalCode.TOO_FEW)


def check_survivor(
    place: Place, slot: int, header: str, survivors: Sequence[str], name: str, document: Document
) -> None:
    """That one site signed this very set.

    Raises:
        Refusal: SURVIVORS for another set, OUT_OF_ORDER, MALFORMED, BAD_SIGNATURE.
    """
    message = Survivors.verified(document, place.roster[name])
    _same(place, message, name)
    if (message.slot, message.header) != (slot, header):
        raise Refusal(RefusalCode.OUT_OF_ORDER, name)
    if message.survivors != tuple(survivors):
        raise Refusal(RefusalCode.SURVIVORS, name)


def check_opening(
    place: Place, slot: int, header: str, cohort: Sequence[str], survivors: Sequence[str], name: str, document: Document
) -> Opening:
    """One survivor's opening, with exactly a share for each survivor and a seed for each that dropped.

    Raises:
        Refusal: SURVIVORS, OUT_OF_ORDER, OPENING, MALFORMED, BAD_SIGNATURE.
    """
    _within({name: document}, survivors)
    message = Opening.verified(document, place.roster[name])
    _same(place, message, name)
    if (message.slot, message.header) != (slot, header):
        raise Refusal(RefusalCode.OUT_OF_ORDER, name)
    if message.survivors != tuple(survivors):
        raise Refusal(RefusalCode.SURVIVORS, name)
    if set(message.shares) != set(survivors) or set(message.seeds) != set(cohort) - set(survivors):
        raise Refusal(RefusalCode.OPENING, name)
    return message


def _same(place: Place, message: Keys | Shares | Survivors | Opening, name: str) -> None:
    if (message.study, message.session, message.site) != (place.plan.study, place.session, name):
        raise Refusal(RefusalCode.OUT_OF_ORDER, name)


def _within(proof: Mapping[str, Document], sites: Sequence[str]) -> None:
    if not set(proof) <= set(sites):
        raise Refusal(RefusalCode.SURVIVORS)
