"""How does `consilium-coordinator` begin? Light, so that Ctrl-C while the rest loads ends it in words."""

from __future__ import annotations

from privacy.start import start


def main() -> None:
    """The `consilium-coordinator` command."""
    start("server.cli")
