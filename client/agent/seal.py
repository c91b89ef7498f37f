"""How is an agent kept off the network even where nobody built it a container? By asking the kernel, once, for good.

A seccomp filter (seccomp(2), Linux 3.17 and newer) lets this process and everything it will ever start open Unix
sockets and no others; it cannot be lifted again. An empty network namespace around the process is stronger still and
both may be used together.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import socket
import struct
from pathlib import Path

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SOCKET = {"x86_64": 41, "aarch64": 198}
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_IO_URING_SETUP = 425
_X32 = 0x40000000

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16

_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER, _TSYNC = 1, 1


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def seal() -> bool:
    """Forbid this process, all its threads and its children every socket but a Unix one.

    Returns:
        Whether the kernel agreed; False on another system or processor, where only a container can do it.
    """
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in _SECCOMP:
        return False
    code = _filter(machine)
    program = _Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return int(libc.syscall(_SECCOMP[machine], _SET_MODE_FILTER, _TSYNC, ctypes.byref(program))) == 0


def networked() -> bool:
    """Whether this process could reach any network: it may open an Internet socket and has more than a loopback."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
    except OSError:
        return False
    try:
        lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()[2:]
    except OSError:
        return True
    return any(line.split(":")[0].strip() != "lo" for line in lines)


def _filter(machine: str) -> bytes:
    """The BPF program: jumps count the instructions to skip when true and when false (bpf(4) of the BSDs)."""
    foreign, no_family, no_ring, allow = 8, 9, 10, 11
    steps: list[tuple[int, int | None, int | None, int]] = [
        (_LOAD, None, None, _ARCH),
        (_EQUAL, None, foreign, _AUDIT_ARCH[machine]),
        (_LOAD, None, None, _NUMBER),
        (_AT_LEAST, foreign, None, _X32),
        (_EQUAL, no_ring, None, _IO_URING_SETUP),
        (_EQUAL, None, allow, _SOCKET[machine]),
        (_LOAD, None, None, _FIRST_ARGUMENT),
        (_EQUAL, allow, no_family, socket.AF_UNIX),
        (_RETURN, None, None, _ERRNO | errno.EPERM),
        (_RETURN, None, None, _ERRNO | errno.EAFNOSUPPORT),
        (_RETURN, None, None, _ERRNO | errno.ENOSYS),
        (_RETURN, None, None, _ALLOW),
    ]
    jumps = [
        (code, *(0 if target is None else target - at - 1 for target in (yes, no)), value)
        for at, (code, yes, no, value) in enumerate(steps)
    ]
    return b"".join(struct.pack("=HBBI", *jump) for jump in jumps)
