"""How is a vector hidden? A keystream of AES-256 in counter mode per key, added to it modulo 2³².

Each 32-byte key serves one keystream of one vector, so the counter starts at zero. The vector is walked in blocks that
stay in the processor's cache: all keys' streams are added to one block before the next is touched, so the vector passes
through memory once, however many masks there are. OpenSSL and numpy let go of the interpreter while they work, so two
threads each take a half.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from privacy.secagg.fixed import Words

BLOCK = 1 << 16
"""Numbers in a block: 256 KiB of keystream."""
WORTH = 1 << 18
"""Numbers times keys from which a second thread pays."""
THREADS = 2
_ZEROS = bytes(4 * BLOCK)


def apply(vector: Words, add: Sequence[bytes], subtract: Sequence[bytes] = (), threads: int | None = None) -> None:
    """Add and subtract keystreams in place, modulo 2^32.

    Args:
        vector: uint32, contiguous; changed.
        add: 32-byte keys whose streams are added.
        subtract: 32-byte keys whose streams are subtracted.
        threads: how many; None for two where the vector is long and the machine has them.
    """
    keys = len(add) + len(subtract)
    if keys:
        count = threads_for(len(vector), keys) if threads is None else threads
        in_halves(len(vector), count, lambda start, stop: _stretch(vector, start, stop, add, subtract))


def threads_for(numbers: int, keys: int) -> int:
    """How many threads pay for so many numbers and keys on this machine."""
    return THREADS if numbers * keys >= WORTH and len(os.sched_getaffinity(0)) >= THREADS else 1


def in_halves(numbers: int, threads: int, work: Callable[[int, int], None]) -> None:
    """Do `work(start, stop)` on as many stretches of whole blocks as there are threads."""
    per = max(1, -(-numbers // BLOCK // threads)) * BLOCK
    stretches = [(start, min(start + per, numbers)) for start in range(0, max(numbers, 1), per)]
    if len(stretches) == 1:
        work(*stretches[0])
        return
    with ThreadPoolExecutor(len(stretches)) as pool:
        for done in [pool.submit(work, *stretch) for stretch in stretches]:
            done.result()


def _stretch(vector: Words, start: int, stop: int, add: Sequence[bytes], subtract: Sequence[bytes]) -> None:
    counter = modes.CTR((start // 4).to_bytes(16, "big"))  # four numbers to a cipher block; `start` is a whole block
    streams = [
        (operation, Cipher(algorithms.AES(key), counter).encryptor())
        for operation, keys in ((np.add, add), (np.subtract, subtract))
        for key in keys
    ]
    buffer = bytearray(4 * BLOCK + 15)  # update_into asks for a block less one to spare
    stream = np.frombuffer(buffer, "<u4", BLOCK)
    zeros = memoryview(_ZEROS)
    for position in range(start, stop, BLOCK):
        part = vector[position : min(position + BLOCK, stop)]
        for operation, encryptor in streams:
            encryptor.update_into(zeros[: 4 * len(part)], buffer)
            operation(part, stream[: len(part)], out=part)
