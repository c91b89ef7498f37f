"""How does the agent run as a process? `python -m client.agent HOME`: seal, open the two doors, wait for SIGTERM."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from client.agent.seal import networked, seal
from client.home import SiteHome
from privacy.errors import ConsiliumError

GRACE_SECONDS = 2.0


def main(arguments: list[str] | None = None) -> int:
    """Run an agent until SIGTERM or SIGINT; 0 after a clean end, 1 when it could not start."""
    parser = argparse.ArgumentParser(prog="python -m client.agent", description="The site's agent: sees the data.")
    parser.add_argument("home", type=Path, help="the site's folder")
    home = SiteHome(parser.parse_args(arguments).home.resolve())
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    log = logging.getLogger("consilium.agent")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    os.umask(0o077)
    sealed = seal()
    try:
        run(home, stop, log, sealed)
    except ConsiliumError as error:
        log.error("%s", error)
        return 1
    return 0


def run(home: SiteHome, stop: threading.Event, log: logging.Logger, sealed: bool) -> None:
    """Serve both doors until `stop` is set.

    Raises:
        ConsiliumError: the home is incomplete or in use, or a door cannot be opened.
    """
    from client.agent.core import Agent
    from client.agent.doors import open_door, server
    from client.agent.local import THREADS as LOCAL_THREADS
    from client.agent.local import register
    from client.agent.outward import THREADS, Outward

    home.check_sockets()
    with Agent(home) as agent:
        agent.warm_up()
        outward, local = server(THREADS, "outward"), server(LOCAL_THREADS, "local")
        outward.add_generic_rpc_handlers((Outward(agent),))
        register(local, agent)
        try:
            open_door(local, home.local_socket, agent.config.operator_group)
            open_door(outward, home.outward_socket, agent.config.outward_group)
            if not sealed and networked():
                log.warning("this process could open network sockets: run it in a container without a network")
            log.info("ready: %s, process %d", agent.site.name, os.getpid())
            stop.wait()
            log.info("stopping")
        finally:
            agent.stop()
            for door in (outward.stop(GRACE_SECONDS), local.stop(GRACE_SECONDS)):
                door.wait()
            for socket in (home.outward_socket, home.local_socket):
                socket.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
