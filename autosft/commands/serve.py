"""`autosft serve`: one queue for a machine, a team or a cluster."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from autosft.commands import serve_users
from autosft.commands.options import Hardware, Quiet, Storage, application, teach
from autosft.profiles.errors import MissingExtraError, UserError

if TYPE_CHECKING:
    from autosft.service.server import Server
    from autosft.service.settings import Settings

app = application()
app.add_typer(serve_users.app, name="users")

OnStop = Literal["keep", "checkpoint"]


@app.callback(
    invoke_without_command=True,
    help=teach(
        "Serve a queue of studies and single runs, on this machine's devices, until it is stopped.",
        "autosft serve --folder ~/models --folder ~/data        for yourself, on 127.0.0.1",
        "autosft serve users add ada --role admin               a token for each of several people",
        "autosft serve --host 0.0.0.0 --folder /shared          for them, from other machines",
        "autosft serve --folder /shared --check                 what it would serve, and where",
    ),
    epilog="Runs go on when the server is stopped or killed, and the next one takes them up.  "
    "docs/service.md has users, TLS, backups and what is promised.",
)
def serve(
    context: typer.Context,
    *,
    folder: Annotated[
        list[Path] | None,
        typer.Option("--folder", metavar="FOLDER", help="Read models and data below it; may be repeated."),
    ] = None,
    outputs: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write below it; default: served in your data folder."),
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", min=1, max=65535, help="Port to listen on.")] = 8090,
    host_name: Annotated[
        list[str] | None,
        typer.Option("--host-name", metavar="NAME", help="Name by which it is reached; may be repeated."),
    ] = None,
    behind_tls: Annotated[
        bool, typer.Option("--behind-tls", help="A proxy speaks TLS: cookies are for it alone.")
    ] = False,
    hardware: Hardware = "auto",
    gpus: Annotated[str | None, typer.Option(metavar="2,3", help="Hand out these GPUs, by index.")] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Hand out the devices of a running Ray cluster, too."),
    ] = None,
    hub: Annotated[
        bool, typer.Option("--hub/--no-hub", help="Whether models and data are loaded from the hub.")
    ] = True,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code", help="Run code and call addresses that requests name; for friends only."
        ),
    ] = False,
    preempt_after: Annotated[
        str,
        typer.Option(
            metavar="5m", help="How long the first in the queue has to wait before lower priorities give way."
        ),
    ] = "5m",
    on_stop: Annotated[
        OnStop,
        typer.Option(
            help="What runs when the server is stopped: keep running, or save a checkpoint and end."
        ),
    ] = "keep",
    check: Annotated[
        bool, typer.Option("--check", help="Check everything and show what would be served, then end.")
    ] = False,
    storage: Storage = None,
    quiet: Quiet = False,
) -> None:
    """Serve a queue of studies and single runs."""
    if context.invoked_subcommand is not None:
        return
    require_parts()
    from autosft.profiles.own_folders import data_folder
    from autosft.service.decide.situation import Policy
    from autosft.service.requests.limits import Limits
    from autosft.service.settings import Settings
    from autosft.studies.store.database import default_storage_url

    own = data_folder()
    settings = Settings(
        storage=storage or default_storage_url(),
        folder=own / "service",
        limits=Limits(
            folders=tuple(existing(each) for each in folder or ()),
            outputs=(outputs or own / "served").expanduser().absolute(),
            allow_hub=hub,
            allow_code=allow_code,
        ),
        host=host,
        port=port,
        host_names=tuple(host_name or ()),
        hardware=hardware,
        gpus=gpus,
        address=address,
        is_behind_tls=behind_tls,
        policy=Policy(preempt_after_s=duration("--preempt-after", preempt_after)),
    )
    run(settings, on_stop=on_stop, is_check=check, is_quiet=quiet)


def require_parts() -> None:
    """Raise MissingExtraError without what serves."""
    import importlib.util

    for name in ("fastapi", "uvicorn", "prometheus_client", "a2wsgi"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(what="autosft serve", extra="serve")


def duration(flag: str, text: str) -> float:
    """Return the seconds of a duration such as 5m.  Raises UserError."""
    from autosft.studies.quantities import parse_duration

    if text.strip() == "0":
        return 0.0
    try:
        return parse_duration(text)
    except UserError as error:
        raise UserError(f"{flag}: {error.message}", remedy=error.remedy) from error


def existing(folder: Path) -> Path:
    """Return a folder as an absolute path.  Raises UserError if there is none."""
    found = folder.expanduser().absolute()
    if not found.is_dir():
        raise UserError(f"--folder {folder}: there is no such folder.", remedy="Create it, or name another.")
    return found


def run(settings: Settings, *, on_stop: OnStop, is_check: bool, is_quiet: bool) -> None:
    """Serve until a signal comes, or show what would be served."""
    from autosft.commands.service_flags import TyperCommandLine
    from autosft.service.server import open_server

    with open_server(
        settings, TyperCommandLine(), dashboard=lambda: dashboard_of(settings.storage)
    ) as server:
        for line in () if is_quiet else described(settings, server):
            typer.echo(line)
        if is_check:
            if not is_quiet:
                typer.echo("All of this can be served.")
            return
        serve_http(server, settings, on_stop=on_stop)


def described(settings: Settings, server: Server) -> list[str]:
    """Say what is served, to whom, and what requests may name."""
    from autosft.profiles.units import gib

    service, limits = server.service, settings.limits
    devices = ", ".join(
        f"{use.device.name} ({gib(use.device.usable_bytes)} to use)" for use in server.devices()
    )
    users = [user.name for user in service.queue.users.list() if not user.is_revoked]
    who = ", ".join(users) if users else "whoever is on this machine, without a token"
    return [
        f"Queue: {service.queue.url}",
        f"Devices: {devices}",
        f"Users: {who}",
        f"Reads: {', '.join(map(str, limits.folders)) or 'no folder (--folder FOLDER)'}"
        + (", the hub" if limits.allow_hub else ""),
        f"Writes: {limits.outputs}",
        "Code that requests name: " + ("runs (--allow-code)" if limits.allow_code else "is refused"),
    ]


def serve_http(server: Server, settings: Settings, *, on_stop: OnStop) -> None:
    """Answer requests until SIGINT or SIGTERM, then stop as asked."""
    import uvicorn

    from autosft.service.loop_process import LOG_FORMAT

    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    config = uvicorn.Config(
        server.app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=settings.is_behind_tls,
        timeout_graceful_shutdown=10,
    )

    class Draining(uvicorn.Server):
        """Ends the streams of events first, for which a shutdown would wait."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            server.drain()
            super().handle_exit(sig, frame)

    http = Draining(config)
    sockets = [bound(settings)]
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises again what it was stopped by
        signal.signal(number, lambda *_: None)
    server.begin()
    typer.echo(f"Serving on {settings.url}  (Ctrl+C to stop)")
    try:
        http.run(sockets=sockets)
    finally:
        server.end(checkpoint=on_stop == "checkpoint")
        going_on = "save a checkpoint and end" if on_stop == "checkpoint" else "go on"
        typer.echo(f"Stopped; what runs is left to {going_on}. The next server takes it up.")
    if server.is_replaced:
        raise UserError("Another server has taken over this queue.")


def bound(settings: Settings) -> Any:
    """Return a socket on the port.  Raises UserError if it is taken."""
    import socket

    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((settings.host, settings.port))
    except OSError as error:
        found.close()
        raise UserError(
            f"--host {settings.host} --port {settings.port}: {error.strerror}.",
            remedy="Choose another port, for example --port 8091.",
        ) from error
    found.set_inheritable(False)
    return found


def dashboard_of(storage: str) -> Any:
    """Return Optuna's dashboard on the database."""
    from optuna_dashboard import wsgi

    from autosft.commands.databases import existing_database
    from autosft.profiles.own_folders import data_folder
    from autosft.studies.dashboard.artifacts import StudyArtifacts
    from autosft.studies.store.records import open_records

    artifacts = StudyArtifacts(open_records(storage), data_folder() / "uploads")
    return wsgi(existing_database(storage), artifact_store=artifacts)
