"""`autosft queue`: what a server's queue holds, and what may be done with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autosft.commands.options import AsJson, Command, Quiet, application, teach, write_json
from autosft.commands.remote import Server
from autosft.profiles.errors import UserError
from autosft.ui.queue_view import waiting_text

if TYPE_CHECKING:
    from autosft.service.client import Client

app = application()

DEFAULT_SERVER = "http://127.0.0.1:8090"
Named = Annotated[
    str, typer.Argument(metavar="ITEM", help="Number of an item, or a study's name.", show_default=False)
]


@app.callback(
    invoke_without_command=True,
    help=teach(
        "Show and change the queue of a server: what runs, what waits, why, and until when.",
        "autosft queue",
        "autosft queue cancel demo",
    ),
)
def queue(
    context: typer.Context,
    *,
    server: Server = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show and change the queue of a server: what runs, what waits, why, and until when."""
    if context.invoked_subcommand is None:
        show_queue(server, None, as_json=as_json, quiet=quiet)


@app.command(
    "list",
    cls=Command,
    help=teach(
        "List what runs, what waits in its order and why, and what has ended.",
        "autosft queue list",
        "autosft queue list --state waiting --json",
    ),
)
def list_queue(
    *,
    state: Annotated[
        list[str] | None, typer.Option(metavar="STATE", help="Only these; may be repeated.")
    ] = None,
    server: Server = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List the queue."""
    show_queue(server, state, as_json=as_json, quiet=quiet)


def show_queue(server: str | None, state: list[str] | None, *, as_json: bool, quiet: bool) -> None:
    """Show a server's queue."""
    from autosft.ui.queue_view import queue_table
    from autosft.ui.tables import show_table

    with connected(server) as client:
        query: dict[str, Any] = {"limit": 2000, **({"state": state} if state else {})}
        found = client.items(**query)
        url = client.url
    if as_json:
        write_json(found)
    elif quiet:
        for item in found:
            typer.echo(item["id"])
    elif not found:
        typer.echo(f"The queue of {url} is empty.")
    else:
        show_table(queue_table(found))


@app.command(
    "show",
    cls=Command,
    help=teach("Show one item: why it waits, what it needs, when it starts.", "autosft queue show demo"),
)
def show(item: Named, *, server: Server = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Show one item."""
    with connected(server) as client:
        shown = client.find(item)
    if as_json:
        write_json(shown)
        return
    if quiet:
        typer.echo(shown["state"])
        return
    typer.echo(f"item {shown['id']}, {shown['name']}, of {shown['owner']}. {waiting_text(shown)}")
    typer.echo(shown["command_line"])


@app.command(
    "log",
    cls=Command,
    help=teach("Show what an item has printed; --follow goes on until it ends.", "autosft queue log demo"),
)
def log(
    item: Named,
    *,
    follow: Annotated[bool, typer.Option("--follow", help="Follow it until the item ends.")] = False,
    server: Server = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show what an item has printed."""
    from autosft.commands.remote import follow as followed

    with connected(server) as client:
        number = client.find(item)["id"]
        if follow:
            followed(client, number, is_quiet=quiet or as_json, as_json=as_json)
        elif as_json:
            write_json(client.log(number))
        else:
            typer.echo(client.log(number)["text"], nl=False)


@app.command(
    "hold",
    cls=Command,
    help=teach("Take an item out of the queue; one that runs stops first.", "autosft queue hold demo"),
)
def hold(item: Named, *, server: Server = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Take an item out of the queue."""
    act(server, item, "hold", as_json=as_json, quiet=quiet)


@app.command(
    "release",
    cls=Command,
    help=teach("Put a held item back into the queue.", "autosft queue release demo"),
)
def release(item: Named, *, server: Server = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Put a held item back into the queue."""
    act(server, item, "release", as_json=as_json, quiet=quiet)


@app.command(
    "cancel",
    cls=Command,
    help=teach("End an item; what it has done is kept.", "autosft queue cancel demo"),
)
def cancel(item: Named, *, server: Server = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """End an item."""
    act(server, item, "cancel", as_json=as_json, quiet=quiet)


@app.command(
    "priority",
    cls=Command,
    help=teach(
        "Give an item another priority, highest first; above 0 only as admin.",
        "autosft queue priority demo 5",
    ),
    context_settings={"ignore_unknown_options": True},  # -5
)
def priority(
    item: Named,
    value: Annotated[int, typer.Argument(metavar="N", help="Priority.", show_default=False)],
    *,
    server: Server = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Give an item another priority."""
    act(server, item, "priority", as_json=as_json, quiet=quiet, priority=value)


@app.command(
    "move",
    cls=Command,
    help=teach(
        "Give an item a place, before fair share and priorities; only as admin.", "autosft queue move demo 1"
    ),
)
def move(
    item: Named,
    place: Annotated[int, typer.Argument(metavar="PLACE", min=1, help="From 1.", show_default=False)] = 1,
    *,
    server: Server = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Give an item a place in the queue."""
    act(server, item, "move", as_json=as_json, quiet=quiet, place=place)


@app.command(
    "clone",
    cls=Command,
    help=teach(
        "Queue what an item is, with fields changed.",
        "autosft queue clone demo --name demo-2 -- --learning-rate 1e-4",
        "autosft queue clone demo --warm-start -- --trials 48",
    ),
)
def clone(
    item: Named,
    flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="FLAGS...", help="After --: flags that it has instead.", show_default=False),
    ] = None,
    *,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Of the new one.")] = None,
    without: Annotated[
        list[str] | None, typer.Option(metavar="FLAG", help="A flag that it does not have; may be repeated.")
    ] = None,
    warm_start: Annotated[
        bool, typer.Option("--warm-start", help="Try the original's best settings first.")
    ] = False,
    held: Annotated[bool, typer.Option("--hold", help="Hold it until it is released.")] = False,
    server: Server = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Queue what an item is, with fields changed."""
    from autosft.commands.submissions import flags_given

    with connected(server) as client:
        original = client.find(item)
        words = [*(flags or [])]
        changed = flags_given(client, original["command"], words)[0] if words else {}
        changed |= {flag.removeprefix("--").replace("-", "_"): None for flag in without or ()}
        shown = client.clone(original["id"], changed, name=name, warm_start=warm_start, hold=held)
    tell(shown, as_json=as_json, quiet=quiet)


@app.command(
    "files",
    cls=Command,
    help=teach(
        "List what an item has written, or download one of its files.",
        "autosft queue files demo",
        "autosft queue files demo --get best.yaml --output best.yaml",
    ),
)
def list_files(
    item: Named,
    *,
    get: Annotated[str | None, typer.Option(metavar="PATH", help="Download this one.")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to; default: its name, here.")
    ] = None,
    server: Server = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List or download an item's files."""
    from autosft.profiles.units import gib

    with connected(server) as client:
        number = client.find(item)["id"]
        if get is not None:
            to = output or Path(Path(get).name)
            if to.exists():
                raise UserError(f"{to} exists.", remedy="Give another name with --output.")
            client.download(number, get, to)
            typer.echo(to)
            return
        found = client.files(number)
    if as_json:
        write_json(found)
        return
    for file in found["files"]:
        if quiet:
            typer.echo(file["path"])
            continue
        typer.echo(f"{gib(file['num_bytes']):>10}  {file['path']}")


def connected(server: str | None) -> Client:
    """Return a client of the server that is meant: by flag, AUTOSFT_SERVER, or the one on this machine."""
    from autosft.service.client import Client

    return Client(server or DEFAULT_SERVER)


def act(server: str | None, item: str, action: str, *, as_json: bool, quiet: bool, **body: Any) -> None:
    """Do something with an item, and say where it stands then."""
    with connected(server) as client:
        shown = client.act(client.find(item)["id"], action, **body)
    tell(shown, as_json=as_json, quiet=quiet)


def tell(shown: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
    """Say where an item stands."""
    if as_json:
        write_json(shown)
    elif quiet:
        typer.echo(shown["id"])
    else:
        typer.echo(f"item {shown['id']}, {shown['name']}: {waiting_text(shown)}")
