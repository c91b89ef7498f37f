"""What do the coordinator's commands share? The home they work on, and questions put to a person."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from privacy.errors import ConsiliumError
from privacy.files import write_atomically
from server.home import CoordinatorHome
from server.registry import Registry

PROGRAM = "consilium-coordinator"

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Force = Annotated[bool, typer.Option("--force", help="Write over a file that is there.")]
Initial = Annotated[
    Path | None,
    typer.Option("--initial", help="Start from these weights (safetensors with the names of the same network)."),
]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Watch until it is no longer going on.")]


def group(help_: str) -> typer.Typer:
    """A group of commands."""
    return typer.Typer(
        help=help_,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        rich_markup_mode="markdown",
    )


def home_of(context: typer.Context) -> CoordinatorHome:
    """The home that --home names."""
    home = context.find_root().obj
    assert isinstance(home, CoordinatorHome)
    return home


def open_registry(context: typer.Context) -> Registry:
    """The registry of that home.

    Raises:
        ConsiliumError: no coordinator here, or the registry cannot be opened.
    """
    home = home_of(context)
    home.config()
    return Registry(home)


def confirm(question: str, why: str) -> None:
    """Ask; anything but yes ends the command.

    Raises:
        ConsiliumError: nobody is there to ask, or the answer is no.
    """
    if not sys.stdin.isatty():
        raise ConsiliumError("Nobody is here to be asked", why, "Give the command again with --yes when you are sure.")
    if not typer.confirm(question, err=True):
        raise ConsiliumError("Nothing was done", why, "Give the command again when you are sure.")


def read_text(path: Path, what: str) -> str:
    """A text file that a person wrote.

    Raises:
        ConsiliumError: it is missing, unreadable, or not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConsiliumError(
            f"The {what} cannot be read", f"{path} ({error.strerror})", "Check the path and its permissions."
        ) from error
    except UnicodeDecodeError as error:
        raise ConsiliumError(f"The {what} is not text", str(path), "Save it as UTF-8 text.") from error


def write_new(path: Path, data: bytes, *, force: bool) -> None:
    """Write a file that people pass on.

    Raises:
        ConsiliumError: it exists and `force` is not given.
    """
    if path.exists() and not force:
        raise ConsiliumError(
            "The file exists already", str(path), "Name another with --out, or write over it with --force."
        )
    if not path.absolute().parent.is_dir():
        raise ConsiliumError(
            "There is no such folder", str(path.absolute().parent), "Make it, or name another with --out."
        )
    write_atomically(path, data, 0o644)
