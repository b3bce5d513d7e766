"""`autosft serve users`: who may use the service, and how much."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from autosft.commands.options import AsJson, Command, Quiet, Storage, application, teach, write_json
from autosft.profiles.errors import UserError

if TYPE_CHECKING:
    from autosft.service.store.queue_store import QueueStore

app = application()

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the user.", show_default=False)]
RoleName = Literal["owner", "admin"]


@app.callback()
def users() -> None:
    """Add, list and revoke the users of the service."""


@app.command(
    "add",
    cls=Command,
    help=teach(
        "Add a user and show their token, once: only a hash of it is kept.",
        "autosft serve users add ada",
        "autosft serve users add bob --shares 2 --max-devices 4 --hours 200",
    ),
)
def add(
    name: Name,
    *,
    role: Annotated[
        RoleName, typer.Option(help="owner: sees and stops their own; admin: everybody's.")
    ] = "owner",
    shares: Annotated[
        float, typer.Option(metavar="X", help="Share of the devices' time, against others'.")
    ] = 1.0,
    max_devices: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Devices that they may have at once.")
    ] = None,
    hours: Annotated[
        float | None, typer.Option("--hours", metavar="X", help="Device-hours that they may use in a week.")
    ] = None,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Add a user and show their token."""
    from autosft.service.requests.read import NAME
    from autosft.service.values import Role, User

    if not NAME.fullmatch(name):
        raise UserError(
            f"{name[:80]!r} is not a user's name: it is a folder's, too.",
            remedy="Use letters, digits, dots, dashes and underscores, a letter or digit first.",
        )
    user = User(name=name, role=Role(role), shares=shares, max_devices=max_devices, device_hours_a_week=hours)
    with opened(storage) as queue:
        token = queue.users.add(user, now=time.time())
    if as_json:
        write_json({"user": name, "role": role, "token": token})
    elif quiet:
        typer.echo(token)
    else:
        typer.echo(f"Token of {name}, which is shown this once:\n{token}")
        typer.echo("They set AUTOSFT_TOKEN to it, or sign in with it on the page.")


@app.command(
    "list",
    cls=Command,
    help=teach("List the users, what they may use, and what they have used.", "autosft serve users list"),
)
def list_users(*, storage: Storage = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the users."""
    from autosft.ui.tables import new_table, show_table

    with opened(storage) as queue:
        found = queue.users.list()
        usage = queue.usage(now=time.time(), half_life_s=86_400.0)
    if as_json:
        write_json([as_plain(user, usage.get(user.name)) for user in found])
        return
    if quiet:
        for user in found:
            typer.echo(user.name)
        return
    if not found:
        typer.echo("Nobody has a token: on 127.0.0.1 none is needed.")
        return
    table = new_table()
    for heading in ("user", "role", "shares", "devices at once", "hours a week", "used this week", ""):
        table.add_column(heading)
    for user in found:
        used = usage.get(user.name)
        table.add_row(
            user.name,
            user.role.value,
            f"{user.shares:g}",
            str(user.max_devices or "any"),
            "any" if user.device_hours_a_week is None else f"{user.device_hours_a_week:g}",
            f"{0.0 if used is None else used.week_s / 3600:.1f} h",
            "revoked" if user.is_revoked else "",
        )
    show_table(table)


@app.command(
    "revoke",
    cls=Command,
    help=teach(
        "End a user's access within seconds; what they have queued stays.", "autosft serve users revoke bob"
    ),
)
def revoke(name: Name, *, storage: Storage = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """End a user's access."""
    with opened(storage) as queue:
        queue.users.revoke(name, now=time.time())
    if as_json:
        write_json({"user": name, "is_revoked": True})
    elif not quiet:
        typer.echo(f"{name} has no access any more; autosft queue shows what they have queued.")


def opened(storage: str | None) -> closing[QueueStore]:
    from autosft.service.store.queue_store import open_queue
    from autosft.studies.store.database import default_storage_url

    return closing(open_queue(storage or default_storage_url()))


def as_plain(user: Any, used: Any) -> dict[str, Any]:
    return {
        "user": user.name,
        "role": user.role.value,
        "shares": user.shares,
        "max_devices": user.max_devices,
        "device_hours_a_week": user.device_hours_a_week,
        "used_week_s": 0.0 if used is None else used.week_s,
        "is_revoked": user.is_revoked,
    }
