"""How does a hospital run its node and see how it is? `start, status, preflight`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client import link_state
from client.agent import agent_pb2 as pb
from client.agent_client import Local
from client.commands import data as data_commands
from client.commands import study as study_commands
from client.home import SiteHome
from client.link_state import LinkState, Trouble
from privacy.errors import ConsiliumError
from privacy.terminal import err, out

GIB = 1 << 30
NETWORK_OPEN = (
    "OPEN: the kernel did not let the agent give up the network. Start as root, permit user namespaces "
    "(sysctl user.max_user_namespaces), or run the agent in a container with --network none."
)


def start(
    context: typer.Context,
    agent_only: Annotated[bool, typer.Option("--agent-only", help="Only the agent, as in its own container.")] = False,
    connector_only: Annotated[bool, typer.Option("--connector-only", help="Only the connector.")] = False,
    agent_user: Annotated[str, typer.Option(help="Run the agent as this user (needs root).")] = "",
    connector_user: Annotated[str, typer.Option(help="Run the connector as this user (needs root).")] = "",
) -> None:
    """Run this hospital's node: the agent, which sees images and no network, and the connector, the other way round.

    The site operator, or systemd, runs it. What ends is started again; Ctrl-C or SIGTERM ends both. Under root, give
    each its own user, so that the file system keeps the connector away from keys and images; site.toml then names the
    groups that may use the two doors (outward_group: of both users; operator_group: of the agent's and yours).

    Example: consilium-site start

    Example: consilium-site --home /srv/consilium start --agent-user consilium-agent --connector-user consilium-link
    """
    from client.supervisor import Part, Supervisor

    home: SiteHome = context.obj
    if agent_only and connector_only:
        raise ConsiliumError("Only one of the two", "--agent-only and --connector-only", "Leave both out to run both.")
    parts = []
    if not connector_only:
        parts.append(Part("agent", agent_user))
    if not agent_only:
        parts.append(Part("connector", connector_user))
    console = err()
    Supervisor(home, parts, lambda text: console.print(escape(text))).run()


def status(context: typer.Context) -> None:
    """Show how this hospital's node is: its connection, its agent, studies, data, journal and disk.

    The site operator runs it at any time; it works with either process down, and names the remedy.

    Example: consilium-site status
    """
    home: SiteHome = context.obj
    config, consortium = home.config(), home.consortium()
    console = out()
    console.print(f"[bold]{config.site}[/] in {consortium.name}")
    grid = Table.grid(padding=(0, 2))
    _connector(home, grid.add_row)
    try:
        with Local(home.local_socket) as door:
            door.hello()
            reply: pb.StatusReply | None = door.status()
    except ConsiliumError as error:
        reply = None
        grid.add_row("Agent", f"[bold red]{escape(error.what)}[/] → {escape(error.remedy)}")
    if reply is not None:
        _agent(reply, grid.add_row)
    console.print(grid)
    if reply is not None:
        _lists(console, reply)


def preflight(
    context: typer.Context,
    agent_only: Annotated[bool, typer.Option("--agent-only", help="Only the agent's checks.")] = False,
    connector_only: Annotated[bool, typer.Option("--connector-only", help="Only the connector's checks.")] = False,
) -> None:
    """Check, step by step, whether this machine can take part, and say what to do where it cannot.

    The site operator runs it after `enrol`, and shows it to the network team. Connector: name, proxy, port, TLS
    (inspected?), certificate, clock, paths, node key. Agent: device, disk, network, a sample of images.
    The exit code is 1 when there is a problem.

    Example: consilium-site preflight
    """
    from client import preflight as checks

    home: SiteHome = context.obj
    home.config()
    shown = Table("side", "check", "", "result", box=None, pad_edge=False, header_style="bold")
    steps = (checks.connector(home) if not agent_only else (), checks.agent(home) if not connector_only else ())
    problems = 0
    for check in (check for step in steps for check in step):
        problems += check.problem
        mark = "[bold red]problem[/]" if check.problem else "[green]ok[/]"
        detail = escape(check.detail) + (f"\n→ {escape(check.remedy)}" if check.remedy else "")
        shown.add_row(check.side, escape(check.name), mark, detail)
    out().print(shown)
    if problems:
        err().print(f"[bold red]{problems} problem{'s' if problems > 1 else ''}[/]")
        raise typer.Exit(1)


def _connector(home: SiteHome, add: Callable[..., None]) -> None:
    try:
        state = link_state.read(home)
        alive = link_state.connector_alive(home)
    except ConsiliumError as error:
        add("Connector", f"[yellow]{escape(error.what)}[/] → {escape(error.remedy)}")
        return
    if not alive:
        add("Connector", "[bold red]not running[/] → Start it: `consilium-site start`.")
        if state is not None and state.last_at:
            add("", f"its last message: {state.last_kind} at {state.last_at}")
        return
    state = state or LinkState()
    address = escape(state.superlink)
    if state.phase == "connected":
        add("Connector", f"[green]connected[/] to {address} since {state.since}, node {state.node_id}")
    else:
        add("Connector", f"[yellow]not connected[/] to {address} since {state.since}, trying again by itself")
    if state.network is not None:
        add("", _trouble(state.network))
    if state.agent is not None:
        add("", _trouble(state.agent))
    if state.last_at:
        work = f"; now: {', '.join(state.working)}" if state.working else ""
        add("", f"last message: {state.last_kind} at {state.last_at}; {state.answered} answered{work}")
    else:
        add("", "no message yet")


def _agent(reply: pb.StatusReply, add: Callable[..., None]) -> None:
    add("Agent", f"[green]running[/], release {escape(reply.version)}, {escape(reply.device)}")
    add("", escape(reply.working) if reply.working else "idle")
    add("Network", f"[bold red]{NETWORK_OPEN}[/]" if reply.network else "[green]none[/]: the agent can reach nothing")
    add("Roster", f"version {reply.roster_version}" if reply.roster_version else "none yet")
    add("Journal", f"{reply.journal_entries} entries, head {escape(reply.journal_head[:16])}")
    free = reply.disk_free_bytes / GIB
    add("Disk", f"{free:.1f} GiB free" if free >= 1 else f"[bold red]{free:.2f} GiB free[/] → Free space.")


def _lists(console: Console, reply: pb.StatusReply) -> None:
    console.print()
    if reply.studies:
        console.print(study_commands.lines(list(reply.studies)))
        for text in study_commands.refusals(list(reply.studies)):
            console.print(escape(text), soft_wrap=True)
    else:
        console.print("No study yet.")
    console.print()
    if reply.data:
        console.print(data_commands.lines(list(reply.data)))
    else:
        console.print("No images connected yet: `consilium-site data connect NAME PATH`.")


def _trouble(trouble: Trouble) -> str:
    subject = f": {escape(trouble.subject)}" if trouble.subject else ""
    return f"[bold red]{escape(trouble.what)}[/]{subject} ({trouble.at}) → {escape(trouble.remedy)}"
