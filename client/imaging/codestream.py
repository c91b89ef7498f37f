"""How is a compressed image taken apart without harm? Its own size is read first, and its decoder is chosen.

Of the decoders that could do it, the one is taken that answers a damaged stream with an error. GDCM, which ends the
whole process on some (a C++ exception that nothing catches; found by the fuzzer), is left for what only it can read,
and those files are always read in a process of their own.
"""

from __future__ import annotations

import struct

from pydicom import uid

_DECODERS: dict[str, str] = {
    uid.JPEGBaseline8Bit: "pillow",
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEGLSNearLossless: "pyjpegls",
    uid.JPEG2000Lossless: "pylibjpeg",
    uid.JPEG2000: "pylibjpeg",
    uid.HTJ2KLossless: "pylibjpeg",
    uid.HTJ2KLosslessRPCL: "pylibjpeg",
    uid.HTJ2K: "pylibjpeg",
}
ISOLATED = frozenset({str(uid.JPEGExtended12Bit), str(uid.JPEGLossless), str(uid.JPEGLosslessSV1)})
"""Transfer syntaxes that only GDCM decodes here."""


def decoder(syntax: str) -> str:
    """Which of pydicom's decoding plugins reads a transfer syntax; "" leaves it to pydicom, which has only one."""
    return _DECODERS.get(syntax, "")


def stream_size(stream: bytes) -> tuple[int, int] | None:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 code stream declares itself; None where it has none.

    Source: ITU-T T.81 B.2.2 (SOF), T.87 C.2.2 (SOF55), T.800 A.5.1 (SIZ).
    """
    start = stream.find(b"\xff\x4f\xff\x51", 0, 256)  # SOC then SIZ, after JP2 boxes if there are any
    if start >= 0 and len(stream) >= start + 24:
        right, bottom, left, top = struct.unpack_from(">IIII", stream, start + 8)
        return bottom - top, right - left
    if stream[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns = struct.unpack_from(">HH", stream, at + 5)
            return rows, columns
        at += 2 + struct.unpack_from(">H", stream, at + 2)[0]
    return None
