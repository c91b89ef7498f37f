"""Who may knock at which door? The folders and Unix sockets of an agent, with their owners and modes.

The folder around a socket is the boundary: 0750 with the group that may enter. The socket itself is 0660.
"""

from __future__ import annotations

import grp
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from privacy.errors import ConsiliumError

FOLDER_MODE, SOCKET_MODE = 0o750, 0o660
CHUNK_LIMIT = 4 << 20
MESSAGE_LIMIT = CHUNK_LIMIT + (64 << 10)


def server(threads: int, name: str, limit: int = MESSAGE_LIMIT) -> grpc.Server:
    """A gRPC server that takes messages of at most `limit` bytes and refuses calls beyond its threads."""
    return grpc.server(
        ThreadPoolExecutor(threads, name),
        options=[
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", MESSAGE_LIMIT),
            ("grpc.so_reuseport", 0),
        ],
        maximum_concurrent_rpcs=threads,
    )


def open_door(server: grpc.Server, socket: Path, group: str) -> None:
    """Bind a server to a socket that only its owner and `group` can reach, and start it.

    Raises:
        ConsiliumError: no such group, or the group cannot be given, or the socket cannot be made.
    """
    member = _group(group)
    socket.parent.mkdir(parents=True, exist_ok=True)
    _give(socket.parent, FOLDER_MODE, member, group)
    before = os.umask(0o777 & ~SOCKET_MODE)
    try:
        server.add_insecure_port(f"unix:{socket.resolve()}")
    except RuntimeError as error:
        raise ConsiliumError(
            "The agent's socket cannot be made", str(socket), "Check the folder's owner, and that the disk is not full."
        ) from error
    finally:
        os.umask(before)
    _give(socket, SOCKET_MODE, member, group)
    server.start()


def _group(name: str) -> int | None:
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise ConsiliumError(
            "There is no such Unix group", name, "Correct it in site.toml, or make it with `groupadd`."
        ) from error


def _give(path: Path, mode: int, member: int | None, group: str) -> None:
    try:
        if member is not None:
            os.chown(path, -1, member)
        path.chmod(mode)
    except PermissionError as error:
        raise ConsiliumError(
            "The door cannot be given to its group",
            f"{path}, group {group or '(the owner’s)'}",
            "Start the agent as root or as a member of the group.",
        ) from error
