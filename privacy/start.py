"""How does a command begin? Its modules take a second or two to load, and Ctrl-C meanwhile ends it with one line.

The installed commands start here, before anything heavy is imported; later on `privacy.terminal.run` sees to Ctrl-C.
"""

from __future__ import annotations

import os
import signal
from importlib import import_module
from typing import Any

INTERRUPTED = 130


def start(module: str) -> None:
    """Load a module and run its `main`.

    While it loads nothing has begun that would have to be put in order, so an interrupt ends the process on the spot;
    an exception could be caught by whatever is just being imported.
    """
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # not when it is ignored, as in the background
        signal.signal(signal.SIGINT, _leave)
    main = import_module(module).main
    signal.signal(signal.SIGINT, usual)
    main()


def welcome() -> None:
    """The `consilium` command."""
    start("privacy.welcome")


def officer() -> None:
    """The `consilium-officer` command."""
    start("privacy.cli")


def _leave(*_: Any) -> None:
    os.write(2, b"Interrupted.\n")
    os._exit(INTERRUPTED)
