"""`autosft dashboard`: Optuna's dashboard on the study database."""

from __future__ import annotations

import contextlib
from socketserver import ThreadingMixIn
from typing import Annotated
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import typer

from autosft.commands.options import Command, Quiet, Storage, application, teach
from autosft.profiles.errors import UserError
from autosft.profiles.own_folders import data_folder

app = application()
HOST = "127.0.0.1"


@app.command(
    "dashboard",
    cls=Command,
    help=teach("Open the Optuna dashboard on the study database.", "autosft dashboard --port 8080"),
    epilog="Works while a study is running, too.  Press Ctrl+C to quit.",
)
def dashboard(
    *,
    storage: Storage = None,
    port: Annotated[int, typer.Option(metavar="PORT", min=1, max=65535, help="Port on 127.0.0.1.")] = 8080,
    quiet: Quiet = False,
) -> None:
    """Open the Optuna dashboard on the study database."""
    from autosft.commands.databases import existing_database, reading

    with listening(port) as server, reading(storage) as records:  # raises UserError for other databases
        shown = records.url
        if not records.studies():
            raise UserError(f"{shown} holds no studies yet.", remedy="autosft tune creates one.")
        from optuna_dashboard import wsgi

        from autosft.studies.dashboard.artifacts import StudyArtifacts
        from autosft.studies.dashboard.guard import Guard

        artifacts = StudyArtifacts(records, data_folder() / "uploads")
        guard = Guard(
            wsgi(existing_database(storage), artifact_store=artifacts),
            hosts=(f"{HOST}:{port}", f"localhost:{port}"),
        )
        server.set_app(guard)
        address = f"http://{HOST}:{port}/?token={guard.token}"
        typer.echo(address if quiet else f"Optuna dashboard on {shown}\nOpen {address}  (Ctrl+C to quit)")
        with contextlib.suppress(KeyboardInterrupt):  # the normal way to quit
            server.serve_forever()


def listening(port: int) -> WSGIServer:
    """Return a server bound to the port.  Raises UserError if the port is taken."""
    try:
        return ThreadingServer((HOST, port), SilentHandler)
    except OSError as error:
        raise UserError(
            f"--port {port}: {error.strerror}.", remedy="Choose another port, for example --port 8081."
        ) from error


class ThreadingServer(ThreadingMixIn, WSGIServer):
    """Threaded, because browsers keep idle connections open that would block a single thread."""

    daemon_threads = True


class SilentHandler(WSGIRequestHandler):
    """Does not log requests to the terminal."""

    def log_message(self, format: str, *args: object) -> None:
        pass
