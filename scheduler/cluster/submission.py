"""Submits autosft to a running Ray cluster as a job, and manages jobs there.

Anybody who can reach a cluster's Jobs API can run programs on it.  A cluster whose API accepts requests
without a token is therefore used only if it can be reached from this machine alone, or if the user insists.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import shlex
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from autosft.profiles.errors import UserError
from autosft.profiles.masking import has_password, masked_command
from autosft.scheduler.cluster.job_package import FILES, Package, pack

#: Timeout of the head for requests that need no work, in seconds.
ANSWER_S = 10.0
#: How long a head that has just been started may take until it accepts jobs, in seconds.
START_S = 60.0

TURN_ON = (
    "Turn its token authentication on: run `ray get-auth-token --generate` once, copy ~/.ray/auth_token to "
    "every node, and start Ray there with RAY_AUTH_MODE=token."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as reported by the cluster."""

    id: str
    status: str  # PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED
    command: str
    message: str
    started_at: float | None  # UNIX seconds
    ended_at: float | None
    exit_code: int | None

    @property
    def is_over(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class Jobs:
    """The jobs of one cluster.  Methods raise UserError for a job that does not exist."""

    def __init__(self, client: Any, address: str) -> None:
        self._client = client
        self.address = address

    def submit(self, arguments: Sequence[str], *, folder: Path | None) -> tuple[str, Package]:
        """Start `autosft ARGUMENTS` on the cluster's head, with the files below `folder`; return its id.

        Raises UserError for a password in the arguments, which all who list the cluster's jobs would see.
        """
        if has_password(shlex.join(arguments)):
            raise UserError(
                f"autosft {masked_command(arguments)}: a password in a job's command is shown to everybody "
                "who lists the cluster's jobs.",
                remedy="Leave it out of the URL, and put it into ~/.pgpass on the head.",
            )
        with tempfile.TemporaryDirectory(prefix="autosft-job-") as temporary:
            package = pack(Path(temporary) / "job.zip", folder)
            deadline = time.monotonic() + START_S
            while True:
                try:
                    job = self._client.submit_job(
                        entrypoint=f"cd {FILES} && exec python -m autosft {shlex.join(arguments)}",
                        runtime_env={"working_dir": str(package.path)},
                        metadata={"autosft": shlex.join(arguments)},
                    )
                except RuntimeError as error:  # Ray raises nothing narrower
                    if "No available agent" not in str(error):
                        raise
                    if time.monotonic() > deadline:
                        raise UserError(
                            f"the head at {self.address} has no agent that starts jobs, "
                            f"{START_S:.0f} s after it was asked.",
                            remedy="Another Ray on that machine may hold its port (52365): start the head "
                            "with --dashboard-agent-listen-port=PORT.",
                        ) from error
                    time.sleep(1.0)
                else:
                    return str(job), package

    def all(self) -> list[Job]:
        """Return autosft's jobs, latest first."""
        found = [_job(job) for job in self._client.list_jobs() if "autosft" in (job.metadata or {})]
        return sorted(found, key=lambda item: -(item.started_at or 0.0))

    def get(self, job: str) -> Job:
        with self._known(job):
            return _job(self._client.get_job_info(job))

    def logs(self, job: str) -> str:
        with self._known(job):
            return str(self._client.get_job_logs(job))

    def stop(self, job: str) -> bool:
        """Ask a job to stop; return False if it had already ended."""
        with self._known(job):
            return bool(self._client.stop_job(job))

    def stream_output(self, job: str) -> Iterator[str]:
        """Yield a job's output as it arrives, until the job ends."""
        with self._known(job):
            yield from _in_turn(self._client.tail_job_logs(job))

    @contextlib.contextmanager
    def _known(self, job: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if "does not exist" not in str(error) and "404" not in str(error):
                raise
            raise UserError(
                f"There is no job {job!r} on {self.address}.",
                remedy=f"See them with: autosft jobs list --address {self.address}",
            ) from error


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id or details.job_id,
        status=str(details.status.value),
        command=(details.metadata or {}).get("autosft", details.entrypoint),
        message=details.message or "",
        started_at=details.start_time / 1000 if details.start_time else None,
        ended_at=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
    )


def _in_turn(chunks: AsyncIterator[str]) -> Iterator[str]:
    """Yield the items of an asynchronous iterator."""
    with asyncio.Runner() as runner:
        while True:
            try:
                yield runner.run(_next(chunks))
            except StopAsyncIteration:
                return


async def _next(chunks: AsyncIterator[str]) -> str:
    return await anext(chunks)


def connect(address: str, *, insecure: bool) -> Jobs:
    """Return the jobs of the cluster whose dashboard is at `address`: HOST:PORT or a URL.

    Raises UserError if nothing answers there, if it is not Ray, if the token is not the cluster's, and,
    unless `insecure`, if other machines could send it jobs without a token.
    """
    url = url_of(address)
    with _environment_for(url), _as_user_errors(address):
        headers = authorisation()
        if not needs_token(url) and not insecure and not is_loopback(url):
            raise UserError(
                f"The Ray cluster at {address} requires no token: whoever reaches it can run programs on it.",
                remedy=f"{TURN_ON} Or pass --insecure if only you can reach it.",
            )
        from ray.job_submission import JobSubmissionClient

        logger = logging.getLogger("ray")  # keeps the terminal for the user
        logger.handlers, logger.propagate = [logging.NullHandler()], False
        if needs_token(url) and not headers:
            raise UserError(
                f"The Ray cluster at {address} rejects us without a token.",
                remedy="Set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token of that cluster.",
            )
        return Jobs(JobSubmissionClient(url, headers=headers), address)


def url_of(address: str) -> str:
    """Return the URL of the dashboard.  Raises UserError for an invalid address."""
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    with contextlib.suppress(ValueError):  # a port that is not a number
        if parts.scheme in ("http", "https") and parts.hostname and (parts.port or "://" in address):
            return url.rstrip("/")
    raise UserError(
        f"--address {address!r} is not HOST:PORT or a URL.",
        remedy="Example: --address 10.0.0.5:8265, the dashboard's port that `ray start --head` printed.",
    )


def is_loopback(url: str) -> bool:
    """Whether only this machine can reach the address."""
    host = urlsplit(url).hostname or ""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(item.partition("%")[0]).is_loopback for item in found)


def authorisation() -> dict[str, str]:
    """Return the headers with this user's Ray token; empty if there is none."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    return dict(AuthenticationTokenLoader.instance().get_token_for_http_header(ignore_auth_mode=True))


def needs_token(url: str) -> bool:
    """Whether the Jobs API rejects a request without a token."""
    import requests

    answer = requests.get(f"{url}/api/jobs/", timeout=ANSWER_S)
    if answer.status_code in (401, 403):
        return True
    if answer.status_code != 200 or not isinstance(answer.json(), list):
        raise ConnectionError(f"status {answer.status_code}")
    return False


@contextlib.contextmanager
def _environment_for(url: str) -> Iterator[None]:
    """Keep Ray from using an address other than the given one: its environment variables take precedence."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = url
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _as_user_errors(address: str) -> Iterator[None]:
    """Turn connection errors of a cluster into a UserError."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise UserError(
            f"The Ray cluster at {address} rejects our token.",
            remedy="Set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token of that cluster.",
        ) from error
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
        raise UserError(
            f"No Ray dashboard answers at {address}.",
            remedy="Check the address and the firewall; the port is the dashboard's, 8265 by default.",
        ) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise UserError(
            f"What answers at {address} is not Ray's Jobs API ({error}).",
            remedy="Use the port of the dashboard, 8265 by default, not that of the head (6379).",
        ) from error
