"""`autosft serve` as a process: started, asked, killed, started again, and stopped as it is told to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from autosft import cli
from autosft.profiles.child_python import python
from autosft.profiles.errors import UserError
from autosft.service.client import Client
from autosft.service.requests.limits import Limits
from autosft.service.server import local_user, require_safe
from autosft.service.settings import Settings
from autosft.service.values import Role, User

WAIT_S = 300.0


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


@contextmanager
def serving(folder: Path, port: int) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    """A server of its own, asked until it answers; killed at the end."""
    environment = os.environ | {f"XDG_{name}_HOME": str(folder / name.lower()) for name in ("DATA", "CACHE")}
    environment.pop("AUTOSFT_SERVER", None)
    command = python("-m", "autosft", "serve", "--hardware", "cpu", "--port", str(port))
    process = subprocess.Popen(
        [*command, "--folder", str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            deadline = time.monotonic() + WAIT_S
            while True:
                assert process.poll() is None, process.stdout and process.stdout.read()
                assert time.monotonic() < deadline, "it does not answer"
                try:
                    client.me()
                except UserError:
                    time.sleep(0.1)
                else:
                    break
            yield process, client
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_queue_outlives_its_server(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path, port) as (process, client):
        item = client.submit("tune", {"trials": 2}, name="kept", hold=True, key="once")
        assert client.me()["role"] == "admin"
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=WAIT_S)
    assert not alive, "it leaves processes behind"
    with serving(tmp_path, port) as (process, client):
        [shown] = client.items()
        assert (shown["id"], shown["name"], shown["state"]) == (item["id"], "kept", "held")
        assert client.submit("tune", {"trials": 2}, name="kept", hold=True, key="once")["id"] == item["id"]
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, said
        assert "The next server takes it up" in said
        assert "Traceback" not in said


def settings(folder: Path, host: str = "127.0.0.1", storage: str | None = None) -> Settings:
    limits = Limits(folders=(), outputs=folder / "outputs")
    return Settings(storage=storage or f"sqlite:///{folder}/s.db", folder=folder, limits=limits, host=host)


ADA = User(name="ada")
GONE = User(name="bob", is_revoked=True)
CASES = {
    "loopback without users": ("127.0.0.1", (), True, True),
    "loopback by name": ("localhost", (), True, True),
    "loopback with a user": ("127.0.0.1", (ADA,), True, False),
    "loopback with a revoked one": ("127.0.0.1", (GONE,), True, True),
    "off loopback with a user": ("0.0.0.0", (ADA,), True, False),
    "off loopback without users": ("0.0.0.0", (), False, False),
    "off loopback with a revoked one": ("192.0.2.1", (GONE,), False, False),
}


@pytest.mark.parametrize("case", CASES)
def test_who_is_served_without_a_token(tmp_path: Path, case: str) -> None:
    host, users, is_allowed, is_open = CASES[case]
    made = settings(tmp_path, host)
    if not is_allowed:
        with pytest.raises(UserError, match="no user has a token"):
            require_safe(made, users)
        return
    require_safe(made, users)
    found = local_user(made, users)
    assert (found is not None and found.role is Role.ADMIN) is is_open


def test_a_password_is_kept_out_of_command_lines(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="list of processes"):
        require_safe(settings(tmp_path, storage="postgresql://ada:secret@db/studies"), ())


def test_hosts_are_those_that_it_listens_on(tmp_path: Path) -> None:
    made = settings(tmp_path)
    assert {"127.0.0.1:8090", "localhost:8090", "[::1]:8090"} <= made.hosts()
    assert "0.0.0.0:8090" not in made.hosts()


WRONG = {
    "a folder that is not there": (["serve", "--folder", "/nowhere-at-all"], "there is no such folder"),
    "off loopback without users": (["serve", "--host", "0.0.0.0"], "no user has a token"),
    "a name that is a path": (["serve", "users", "add", "../ada"], "not a user's name"),
    "a user that is not there": (["serve", "users", "revoke", "nobody"], "no user named"),
    "a share that is none": (["serve", "users", "add", "ada", "--shares", "0"], "0 shares"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_one_message_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    for name in ("DATA", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    words, said = WRONG[case]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_port_that_is_taken_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.main(["serve", "--hardware", "cpu", "--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err
