"""How is a process locked in before it starts? No network, another user, no new privileges, then it is the program.

Run as `python -m client.isolation --parent PID [--no-network] [--user NAME] -- PROGRAM ARGUMENT ...`. An empty network
namespace has no interface but a closed loopback: nothing can be reached, whatever the program tries. Unix sockets in
the file system still work. Where the kernel does not permit it, the program starts all the same and says so; the agent
reports it in `consilium-site status`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import pwd
import signal
import sys

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38


def leave_network(user: str) -> str:
    """Move into an empty network namespace and take on `user` (empty: stay); why not, or an empty string.

    Root may do the first alone (namespaces(7)); everyone else needs a user namespace around it, in which the process
    keeps its own user and group.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0 and libc.unshare(CLONE_NEWNET) == 0:
        become(user)
        return ""
    become(user)
    me, group = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return os.strerror(ctypes.get_errno())
    for name, text in (("setgroups", "deny"), ("uid_map", f"{me} {me} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    return ""


def become(user: str) -> None:
    """Take on another user, with his groups (root only; an empty name changes nothing)."""
    if user:
        entry = pwd.getpwnam(user)
        os.initgroups(user, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
        os.environ["HOME"] = entry.pw_dir


def die_with(parent: int) -> None:
    """Ask the kernel for SIGTERM when the supervisor ends, however it ends (prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit("the supervisor has ended")


def main() -> None:
    """Lock in, then become the program."""
    options = argparse.ArgumentParser(prog="client.isolation")
    options.add_argument("--parent", type=int, required=True)
    options.add_argument("--no-network", action="store_true")
    options.add_argument("--user", default="")
    options.add_argument("program", nargs="+")
    chosen = options.parse_args()
    if chosen.no_network:
        reason = leave_network(chosen.user)
        if reason:
            print(
                f"The network could not be taken away: {reason}. Start as root, or permit user namespaces "
                "(sysctl user.max_user_namespaces), or run the agent in a container with --network none.",
                file=sys.stderr,
                flush=True,
            )
    else:
        become(chosen.user)
    os.umask(0o077)
    die_with(chosen.parent)
    os.execv(chosen.program[0], chosen.program)  # noqa: S606  the program is our own, by its full path


if __name__ == "__main__":
    main()
