"""What does a hospital do in a secure sum? Seven steps, each a function from a state and messages to the next.

    begin → Keyed → share → Shared → receive → Ready → mask … (survive) … open_

Every argument but the state, the identity and the stored choices came from a coordinator that may lie. Nothing here
remembers: before a document leaves, the caller has stored the state or the `Choice` that came with it (RULES S2–S4);
`header` is always the hash of the one request that the slot is durably bound to.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from privacy.canonical import sha256
from privacy.errors import Refusal, RefusalCode
from privacy.identity import Document, Identity
from privacy.secagg import masks, shamir
from privacy.secagg.checks import check_keys, check_shares, check_submissions, check_survivors
from privacy.secagg.fixed import Random, Words
from privacy.secagg.keys import (
    Secrets,
    about_deposit,
    deposit_key,
    derive,
    encapsulate,
    expand,
    info,
    seal,
    self_mask_key,
    unseal,
)
from privacy.secagg.messages import (
    Choice,
    Keys,
    Opening,
    Parcel,
    Shares,
    Survivors,
    binding,
    keys_digest,
    seed_digest,
    share_digest,
    transcript,
)
from privacy.secagg.plan import Plan
from privacy.secagg.states import Keyed, Place, Ready, Shared


def begin(
    plan: Plan,
    session: int,
    first_slot: int,
    last_slot: int,
    site: str,
    identity: Identity,
    roster: Mapping[str, str],
    random: Random = os.urandom,
) -> tuple[Keyed, Document]:
    """Make a session's keys.

    Args:
        roster: pinned identity key of each site; those outside the study are ignored.

    Raises:
        Refusal: NOT_IN_STUDY, RING when the roster lacks a site, SLOT_LIMIT, SLOT_SESSION.
    """
    plan.check_slots(first_slot, last_slot)
    pinned = {name: roster[name] for name in plan.sites if name in roster}
    if site not in plan.sites or pinned.get(site) != identity.public:
        raise Refusal(RefusalCode.NOT_IN_STUDY, site)
    if len(set(pinned.values())) != len(plan.sites):
        raise Refusal(RefusalCode.RING)
    place = Place(plan, session, first_slot, last_slot, site, pinned)
    secrets = Secrets.generate(random)
    x25519, kem = secrets.public
    message = Keys(**place.fields(), first_slot=first_slot, last_slot=last_slot, x25519=x25519.hex(), kem=kem.hex())
    document = message.signed(identity)
    return Keyed(place, secrets, document), document


def share(
    keyed: Keyed, keys: Mapping[str, Document], identity: Identity, random: Random = os.urandom
) -> tuple[Shared, Document, dict[str, bytes]]:
    """Deal this site's self-mask seeds to everybody who brought keys.

    Args:
        keys: the signed `Keys` of each site that takes part, this one's included.

    Returns:
        The state, the signed `Shares`, and the parcels by recipient; the one under this site's own name is for the
        coordinator.

    Raises:
        Refusal: RING, PEER_KEYS, OUT_OF_ORDER, MALFORMED or BAD_SIGNATURE.
    """
    place, plan = keyed.place, keyed.place.plan
    group = plan.check_group(sorted(keys), plan.sites, RefusalCode.RING)
    if place.site not in keys or keys[place.site].digest != keyed.document.digest:
        raise Refusal(RefusalCode.OUT_OF_ORDER, place.site)
    public = {name: check_keys(place, name, keys[name]) for name in group}
    ring = keys_digest(keys)
    seeds = [random(shamir.SECRET_BYTES) for _ in range(place.slots)]
    positions = [plan.position(name) for name in group]
    dealt = [shamir.split(seed, plan.threshold, positions, random) for seed in seeds]
    sent: dict[str, tuple[bytes, bytes]] = {}
    parcels: dict[str, bytes] = {}
    own = b""
    for at, name in enumerate(group):
        shares = [row[at] for row in dealt]
        digests = _share_digests(place, place.site, name, shares)
        if name == place.site:
            own = b"".join(shares)
            of_seeds = [seed_digest(name, place.first_slot + index, seed) for index, seed in enumerate(seeds)]
            parcels[name] = Parcel(b"", digests, b"".join(of_seeds)).encode()
            continue
        secret, ciphertext = encapsulate(bytes.fromhex(public[name].kem))
        agreed = keyed.secrets.agree(bytes.fromhex(public[name].x25519))
        key = _transport(place, agreed + secret, place.site, name, ring, ciphertext)
        sealed = seal(key, b"".join(shares), _about(place, place.site, name))
        parcels[name] = Parcel(ciphertext, digests, sealed).encode()
        sent[name] = secret, ciphertext
    message = Shares(
        **place.fields(), keys=ring, parcels={name: sha256(data) for name, data in sorted(parcels.items())}
    )
    document = message.signed(identity)
    return Shared(keyed, dict(keys), sent, b"".join(seeds), own, document), document, parcels


def receive(shared: Shared, shares: Mapping[str, Document], bundles: Mapping[str, bytes]) -> Ready:
    """Take the others' shares; the ring is who dealt.

    Args:
        shares: the signed `Shares` of each site of the ring, this one's included.
        bundles: the parcel of each other site of the ring for this one.

    Raises:
        Refusal: RING, PEER_SHARES, PEER_KEYS, OUT_OF_ORDER, MALFORMED or BAD_SIGNATURE.
    """
    keyed, place = shared.keyed, shared.keyed.place
    plan = place.plan
    ring = plan.check_group(sorted(shares), sorted(shared.keys), RefusalCode.RING)
    if place.site not in shares or shares[place.site].digest != shared.document.digest:
        raise Refusal(RefusalCode.OUT_OF_ORDER, place.site)
    everyone = keys_digest(shared.keys)
    pairs: dict[str, bytes] = {}
    held = {place.site: shared.own}
    for name in ring:
        message = check_shares(place, name, shares[name], shared.keys, everyone)
        if name == place.site:
            continue
        data = bundles.get(name, b"")
        if sha256(data) != message.parcels[place.site]:
            raise Refusal(RefusalCode.PEER_SHARES, name)
        parcel = Parcel.decode(data, place.slots, own=False)
        agreed = keyed.secrets.agree(bytes.fromhex(shared.keys[name].body["x25519"]))
        secret = keyed.secrets.decapsulate(parcel.ciphertext)
        key = _transport(place, agreed + secret, name, place.site, everyone, parcel.ciphertext)
        try:
            held[name] = unseal(key, parcel.sealed, _about(place, name, place.site))
        except Refusal as refusal:
            raise Refusal(refusal.code, name) from refusal
        width = shamir.SHARE_BYTES
        rows = [held[name][width * index : width * (index + 1)] for index in range(place.slots)]
        if _share_digests(place, name, place.site, rows) != parcel.digests:
            raise Refusal(RefusalCode.PEER_SHARES, name)
        low, high = (shared.sent[name], (secret, parcel.ciphertext))[:: 1 if place.site < name else -1]
        first, second = sorted((place.site, name))
        pairs[name] = derive(
            agreed + low[0] + high[0], "pair", place.context, first.encode(), second.encode(),
            bytes.fromhex(everyone), low[1], high[1],
        )  # fmt: skip
    return Ready(place, ring, transcript(shared.keys, shares), pairs, shared.seeds, held)


def mask(ready: Ready, slot: int, header: str, cohort: Sequence[str], vector: Words) -> None:
    """Hide a vector in place: plus the self mask, plus or minus one mask for each other site of the cohort.

    Args:
        header: hash of the whole request, 64 hex digits.
        cohort: the sites asked, sorted, this one among them.
        vector: uint32 [d + m] or [m], from `fixed.encode`; changed.

    Raises:
        Refusal: SLOT_SESSION, COHORT or MODEL_SHAPE; then the vector is as it was.
    """
    place = ready.place
    index = ready.index(slot)
    group = _cohort(ready, cohort)
    place.plan.length(len(vector))
    bound = _binding(ready, slot, header, group)
    own = self_mask_key(ready.seeds[32 * index : 32 * (index + 1)], bound)
    seeds = {name: _slot_seed(ready, name, bound) for name in group if name != place.site}
    add = [own, *(seed for name, seed in seeds.items() if place.site < name)]
    masks.apply(vector, add, [seed for name, seed in seeds.items() if name < place.site])


def survive(
    ready: Ready,
    slot: int,
    header: str,
    cohort: Sequence[str],
    survivors: Sequence[str],
    choices: Mapping[int, Choice],
    identity: Identity,
) -> tuple[Choice, Document]:
    """Agree to a smaller set, once for ever. The caller stores the choice before the document leaves.

    Args:
        survivors: sorted, within the cohort and smaller, this site among them, at least n_min.
        choices: every stored choice of the study, by slot.

    Raises:
        Refusal: SLOT_SESSION, COHORT, SURVIVORS, or CHOICE_BOUND when another set was chosen.
    """
    place = ready.place
    index = ready.index(slot)
    group = _cohort(ready, cohort)
    chosen = _survivors(ready, group, survivors)
    if chosen == group:  # when nobody dropped, the submissions themselves are the proof
        raise Refusal(RefusalCode.SURVIVORS)
    choice = _choose(choices, slot, header, chosen)
    bound = _binding(ready, slot, header, group)
    key = deposit_key(ready.seeds[32 * index : 32 * (index + 1)], bound, chosen)
    seeds = b"".join(_slot_seed(ready, name, bound) for name in group if name not in chosen)
    deposit = seal(key, seeds, about_deposit(place.context, place.site)).hex()
    message = Survivors(**place.fields(), slot=slot, header=header, survivors=chosen, deposit=deposit)
    return choice, message.signed(identity)


def open_(
    ready: Ready,
    slot: int,
    header: str,
    cohort: Sequence[str],
    survivors: Sequence[str],
    proof: Mapping[str, Document],
    choices: Mapping[int, Choice],
    identity: Identity,
) -> tuple[Choice, Document]:
    """Release what opens the sum of the survivors, and nothing else. The caller stores the choice before it leaves.

    Args:
        proof: when nobody dropped, the signed answer of every site of the cohort; otherwise the signed `Survivors` of
            at least w of the survivors, all over this very set.
        choices: every stored choice of the study, by slot.

    Raises:
        Refusal: SLOT_SESSION, COHORT, SURVIVORS, TOO_FEW, CHOICE_BOUND, OUT_OF_ORDER, MALFORMED, MODEL_SHAPE or
            BAD_SIGNATURE.
    """
    place = ready.place
    index = ready.index(slot)
    group = _cohort(ready, cohort)
    chosen = _survivors(ready, group, survivors)
    choice = _choose(choices, slot, header, chosen)
    if chosen == group:
        check_submissions(place, slot, header, group, proof)
    else:
        check_survivors(place, slot, header, chosen, proof)
    bound = _binding(ready, slot, header, group)
    width = shamir.SHARE_BYTES
    message = Opening(
        **place.fields(),
        slot=slot,
        header=header,
        survivors=chosen,
        shares={name: ready.held[name][width * index : width * (index + 1)].hex() for name in chosen},
        seeds={name: _slot_seed(ready, name, bound).hex() for name in group if name not in chosen},
    )
    released = Choice(choice.slot, choice.header, choice.survivors, released=True)
    return released, message.signed(identity)


def check_attempt(attempts: Mapping[int, str], choices: Mapping[int, Choice], slot: int, attempt: str) -> None:
    """Refuse a second attempt at what this site has already helped to open (RULES S4). Call it before computing.

    Args:
        attempts: for each slot that was bound, what it was an attempt at, such as "train/7".
        choices: every stored choice of the study, by slot.

    Raises:
        Refusal: ROUND_OPENED.
    """
    opened: Iterable[int] = (other for other, choice in choices.items() if choice.released and other != slot)
    if any(attempts.get(other) == attempt for other in opened):
        raise Refusal(RefusalCode.ROUND_OPENED, attempt)


def _cohort(ready: Ready, cohort: Sequence[str]) -> tuple[str, ...]:
    group = ready.place.plan.check_group(cohort, ready.ring, RefusalCode.COHORT)
    if ready.place.site not in group:
        raise Refusal(RefusalCode.COHORT, ready.place.site)
    return group


def _survivors(ready: Ready, cohort: tuple[str, ...], survivors: Sequence[str]) -> tuple[str, ...]:
    chosen = ready.place.plan.check_group(survivors, cohort, RefusalCode.SURVIVORS)
    if ready.place.site not in chosen:
        raise Refusal(RefusalCode.SURVIVORS, ready.place.site)
    return chosen


def _choose(choices: Mapping[int, Choice], slot: int, header: str, chosen: tuple[str, ...]) -> Choice:
    stored = choices.get(slot)
    if stored is None:
        return Choice(slot, header, chosen)
    if (stored.header, stored.survivors) != (header, chosen):
        raise Refusal(RefusalCode.CHOICE_BOUND, str(slot))
    return stored


def _binding(ready: Ready, slot: int, header: str, cohort: tuple[str, ...]) -> bytes:
    return binding(ready.place.plan.study, ready.place.session, ready.transcript, slot, header, cohort)


def _slot_seed(ready: Ready, peer: str, bound: bytes) -> bytes:
    return expand(ready.pairs[peer], "slot-seed", bound)


def _share_digests(place: Place, dealer: str, holder: str, shares: Sequence[bytes]) -> bytes:
    return b"".join(share_digest(dealer, holder, place.first_slot + index, data) for index, data in enumerate(shares))


def _about(place: Place, sender: str, recipient: str) -> bytes:
    return info("parcel", place.context, sender.encode(), recipient.encode())


def _transport(place: Place, secret: bytes, sender: str, recipient: str, keys: str, ciphertext: bytes) -> bytes:
    parts = (sender.encode(), recipient.encode(), bytes.fromhex(keys), ciphertext)
    return derive(secret, "transport", place.context, *parts)
