"""Every command of docs/service.md, in its order, and that what it names exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from autosft import cli
from autosft.service import client as client_module
from autosft.service.api.context import Service
from autosft.service.client import Client
from tests.service.api.fakes import FITS, ROOT, client, prediction, run, served
from tests.service.api.studies import example_study

ROOT_FOLDER = Path(__file__).parents[2]
PAGE = (ROOT_FOLDER / "docs" / "service.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Return the commands of the page in words, without the program's name."""
    shown = re.findall(r"^    \$ autosft (.+)$", PAGE, flags=re.M)
    return [shlex.split(line) for line in shown]


def batch() -> str:
    """Return the file that the page shows."""
    found = re.search(r"^    # night.yaml\n((?:    .*\n)+)", PAGE, flags=re.M)
    assert found is not None
    return found[1].replace("\n    ", "\n").removeprefix("    ")


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """The server of the page, without devices and drivers, which clients of this process reach."""
    monkeypatch.chdir(tmp_path)
    for name in ("CACHE", "DATA"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    for name in ("AUTOSFT_SERVER", "AUTOSFT_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with served(tmp_path, local_user=ROOT) as made:
        (tmp_path / "data" / "chats.jsonl").write_text("{}")
        (tmp_path / "data" / "llama").mkdir()
        transport, make = client(made)._transport, Client.__init__

        def connected(self: Client, url: str, **options: Any) -> None:
            make(self, url, transport=transport, sleep=lambda _: None, **options)

        monkeypatch.setattr(client_module.Client, "__init__", connected)
        made.planner.answers = lambda question: FITS if question["kind"] == "fits" else prediction()
        yield made


def test_the_page_shows_all_that_there_is() -> None:
    names = [words[0] if words[0] != "queue" else " ".join(words[:2]) for words in commands()]
    assert {"serve", "submit", "queue", "plan", "studies", "report", "export"} < set(names)
    for action in ("show", "hold", "release", "priority", "move", "clone", "cancel", "log", "files"):
        assert f"queue {action}" in names
    assert [words[1:3] for words in commands() if words[:2] == ["serve", "users"]] == [
        ["users", "add"],
        ["users", "add"],
        ["users", "list"],
        ["users", "revoke"],
    ]


def test_every_command_of_the_page_runs(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "night.yaml").write_text(batch())
    for words in commands():
        if words[0] == "queue":
            monkeypatch.setenv("AUTOSFT_SERVER", "http://127.0.0.1:8090")
        if words[:2] == ["plan", "--model"]:  # by now the first study runs
            run(service, service.queue.named("first")[0])
            example_study(service.records, service.limits.outputs / "root", "first")
        if words[:2] == ["queue", "files"]:
            continue  # below, once it has files
        assert cli.main(words) == 0, (shlex.join(words), capsys.readouterr().err)
    assert cli.main(["queue", "files", "first"]) == 0
    names = [item.name for item in service.queue.items()]
    assert names == ["first", "second", "third", "small-rank", "large-rank", "full"]
    assert (tmp_path / "first.html").exists()
    assert "study: first" in (tmp_path / "first.yaml").read_text()


def test_what_it_names_exists() -> None:
    for path in re.findall(r"\]\(\.\./(deploy/[^)]+)\)", PAGE):
        assert (ROOT_FOLDER / path).is_file(), path
    options = (ROOT_FOLDER / "autosft" / "commands" / "serve.py").read_text(encoding="utf-8")
    for flag in re.findall(r"`(--[a-z-]+)", PAGE):
        known = options + (ROOT_FOLDER / "tests" / "cli" / "command_line.txt").read_text(encoding="utf-8")
        assert flag in known, flag


def test_the_files_for_operators_start_the_server_that_there_is() -> None:
    folder = ROOT_FOLDER / "deploy"
    unit = (folder / "autosft.service").read_text(encoding="utf-8")
    image = (folder / "Containerfile").read_text(encoding="utf-8")
    parts = list(yaml.safe_load_all((folder / "service.yaml").read_text(encoding="utf-8")))
    kinds = [part["kind"] for part in parts]
    assert kinds == ["PersistentVolumeClaim", "Deployment", "Service", "NetworkPolicy"]
    pod = parts[1]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    known = (ROOT_FOLDER / "tests" / "cli" / "command_line.txt").read_text(encoding="utf-8")
    used = re.findall(r"--[a-z-]+", unit.split("ExecStart=")[1].split("\n")[0])
    used += re.findall(r'"(--[a-z-]+)"', image.split("CMD")[1])
    used += [argument.partition("=")[0] for argument in container["args"] if argument.startswith("--")]
    for flag in used:
        assert f"serve {flag}\n" in known, flag
    assert "KillMode=process" in unit  # runs outlive the server
    assert parts[3]["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert pod["securityContext"]["runAsNonRoot"] is True
