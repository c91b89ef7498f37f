"""How do our programs speak at a terminal? Errors in three parts, tables, and one way to end.

Used by all four commands. What went wrong is red, the thing it happened to follows, and an arrow names the remedy.
Exit codes: 0 done, 1 something a person can put right, 2 the command was typed wrongly, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from privacy.errors import ConsiliumError
from privacy.files import FULL

DEBUG = "CONSILIUM_DEBUG"
NARROWEST = 72

OS_ERRORS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("The disk is full", "Free space there and run the command again; nothing was half written."),
    errno.EDQUOT: ("The disk quota is used up", "Free space there and run the command again."),
    errno.EACCES: ("Permission denied", "Run the command as the owner of that file, or choose another place."),
    errno.EPERM: ("Permission denied", "Run the command as the owner of that file, or choose another place."),
    errno.EROFS: ("The file system is read-only", "Choose another place."),
    errno.ENOENT: ("There is no such file", "Check the path."),
    errno.EISDIR: ("This is a folder, not a file", "Name a file in it."),
    errno.ENOTDIR: ("This is a file, not a folder", "Name a folder."),
    errno.EEXIST: ("The file exists already", "Remove it, or name another one."),
    errno.EMFILE: ("Too many files are open", "Raise the limit with `ulimit -n` and run the command again."),
}


def ending() -> list[signal.Signals]:
    """The signals that ask a program to end; a closed terminal is one unless `nohup` said otherwise."""
    asked = [signal.SIGTERM, signal.SIGINT]
    return asked if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*asked, signal.SIGHUP]


def out() -> Console:
    """Where results go. Made on demand, so that it follows the terminal's present width."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def err() -> Console:
    """Where errors, warnings and questions go."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def show_error(error: ConsiliumError) -> None:
    """What happened, to what, what to do; on standard error."""
    console = err()
    subject = f": {escape(error.subject)}" if error.subject else ""
    console.print(f"[bold red]{escape(error.what)}[/]{subject}")
    console.print(f"  → {escape(error.remedy)}")


def warn(text: str) -> None:
    """One line that does not stop anything."""
    err().print(f"[yellow]{escape(text)}[/]")


def table(*columns: str, rows: Iterable[Sequence[Any]] = (), title: str | None = None) -> Table:
    """A plain table; cells are shown as they are, never read as markup."""
    result = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        result.add_column(column, overflow="fold")  # a hash or a name is never cut off
    for row in rows:
        result.add_row(*(escape(str(cell)) for cell in row))
    return result


def os_error(error: OSError) -> ConsiliumError:
    """An operating system's error in our words."""
    what, remedy = OS_ERRORS.get(
        error.errno or 0, ("The operating system refused", "Put right what it says, then run the command again.")
    )
    copied = error.filename2 if error.errno in FULL else None  # of a copy, `filename` is what was read
    subject = str(copied or error.filename) if error.filename is not None else (error.strerror or str(error))
    if (error.errno or 0) not in OS_ERRORS and error.filename is not None:
        subject = f"{error.filename}: {error.strerror}"
    return ConsiliumError(what, subject, remedy)


def run(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; whatever goes wrong is said in words.

    A traceback appears only for a defect of ours, or for anything when CONSILIUM_DEBUG is set.
    """
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name=name)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except ConsiliumError as error:
        if os.environ.get(DEBUG):
            raise
        show_error(error)
        return 1
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  the reader has gone
        return 0
    except KeyboardInterrupt:
        err().print("Interrupted.")
        return 130
    except OSError as error:
        if os.environ.get(DEBUG):
            raise
        show_error(os_error(error))
        return 1
    return 0
