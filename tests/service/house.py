"""A machine with a server and with people who use it, as processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from autosft.profiles.child_python import python
from autosft.profiles.errors import UserError
from autosft.service.client import Client
from tests.cli.chat_model import make_chat_model, write_chats

WAIT_S = 600.0


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


@dataclass
class House:
    """A machine with a server, and what people of it type."""

    folder: Path
    port: int = field(default_factory=free_port)
    tokens: dict[str, str] = field(default_factory=dict)
    server: subprocess.Popen[bytes] | None = None
    options: tuple[str, ...] = ("--hardware", "cpu")  # of `autosft serve`
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def database(self) -> str:
        """The URL of its study database."""
        return f"sqlite:///{self.folder / 'data_home' / 'autosft' / 'studies.db'}"

    def environment(self) -> dict[str, str]:
        """Return what every process of this machine has in its environment."""
        homes = {f"XDG_{name}_HOME": str(self.folder / f"{name.lower()}_home") for name in ("DATA", "CACHE")}
        own = {"OMP_NUM_THREADS": "1", "AUTOSFT_SERVER": "", "AUTOSFT_TOKEN": ""}
        return os.environ | homes | own | self.variables

    def run(self, *words: str, by: str | None = None) -> str:
        """Run `autosft` as somebody would; return what it says."""
        environment = self.environment()
        if by is not None:
            environment |= {"AUTOSFT_SERVER": self.url, "AUTOSFT_TOKEN": self.tokens[by]}
        ended = subprocess.run(
            python("-m", "autosft", *words), env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, (words, ended.stdout, ended.stderr)
        return ended.stdout

    def add_user(self, name: str, *options: str) -> None:
        self.tokens[name] = self.run("serve", "users", "add", name, *options).splitlines()[1]

    def client(self, name: str | None = None) -> Client:
        return Client(self.url, token=None if name is None else self.tokens[name])

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        words = ("serve", "--port", str(self.port), *self.options)
        with (self.folder / "server.log").open("ab") as log:
            self.server = subprocess.Popen(
                python("-m", "autosft", *words, "--folder", str(self.folder / "shared")),
                env=self.environment(),
                stdout=log,
                stderr=log,
            )
        with self.client(next(iter(self.tokens), None)) as client:
            self.until(lambda: self.is_up(client))

    def is_up(self, client: Client) -> bool:
        """Whether the server answers; it must not have ended."""
        assert self.server is not None
        assert self.server.poll() is None, self.said()
        return answers(client)

    def kill_server(self) -> None:
        """Kill the server as the kernel would."""
        assert self.server is not None
        self.server.kill()
        self.server.wait()

    def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + WAIT_S
        while not is_so():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.2)

    def said(self) -> str:
        """Return the ends of the logs."""
        logs = [self.folder / "server.log", *self.folder.glob("data_home/autosft/service/items/*/log.txt")]
        return "\n".join(f"{log}:\n{log.read_text()[-4000:]}" for log in logs if log.exists())

    def end(self) -> None:
        """Stop the server, and kill whatever is left of the test."""
        if self.server is not None:
            self.kill_server()
        for process in self.processes():
            process.kill()

    def processes(self) -> list[psutil.Process]:
        """Return what runs with this test's folders."""
        found = []
        for process in psutil.process_iter():
            try:
                is_ours = process.environ().get("XDG_DATA_HOME", "").startswith(str(self.folder))
            except psutil.Error:
                continue
            if is_ours:
                found.append(process)
        return found


def furnished(folder: Path, **options: object) -> House:
    """Return a machine with a model and chats in its shared folder."""
    shared = folder / "shared"
    shared.mkdir()
    make_chat_model(shared / "llama")
    write_chats(shared / "chats.jsonl")
    return House(folder=folder, **options)  # type: ignore[arg-type]


def answers(client: Client) -> bool:
    try:
        client.me()
    except UserError:
        return False
    return True
