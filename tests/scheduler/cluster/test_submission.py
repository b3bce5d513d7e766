"""A job brings this autosft with it, and goes only where no stranger could send one."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from autosft.cli import main
from autosft.commands.submit import on_cluster
from autosft.profiles.errors import UserError
from autosft.scheduler.cluster import job_package, submission
from autosft.scheduler.cluster.submission import Jobs, is_loopback, url_of
from tests.ray_nodes import ROOT, RayNodes, ray_nodes

# --- what is sent -------------------------------------------------------------------------------------


def names_in(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_the_package_holds_autosft_as_its_wheel_would_and_the_users_files(tmp_path: Path) -> None:
    for name in ("data/chats.jsonl", ".git/config", "data/checkpoints/step-1/model.safetensors", "a.yaml"):
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_text("x")
    package = job_package.pack(tmp_path / "job.zip", tmp_path / "work")
    names = names_in(package.path)
    assert {name for name in names if name.startswith("files/")} == {
        "files/",
        "files/a.yaml",
        "files/data/chats.jsonl",
    }
    assert package.num_files == 2
    for name in ("autosft/cli.py", "autosft/workers/training/train.py", "autosft/studies/migrations/env.py"):
        assert name in names
    assert not [name for name in names if "__pycache__" in name]


def test_secrets_stay_here_and_links_that_lead_up_end(tmp_path: Path) -> None:
    work = tmp_path / "work"
    secret = (".env", ".env.local", ".netrc", ".ssh/id_rsa", "sub/.aws/credentials", "sub/key.pem", ".pgpass")
    for name in (*secret, "a.yaml", "sub/b.py", ".hidden.yaml", "environment.yaml"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("x")
    (work / "sub" / "up").symlink_to(work)
    (work / "sub" / "itself").symlink_to(work / "sub")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.txt").write_text("x")
    (work / "linked").symlink_to(tmp_path / "elsewhere")
    package = job_package.pack(tmp_path / "job.zip", work)
    assert {name for name in names_in(package.path) if name.startswith("files/")} == {
        "files/",
        "files/.hidden.yaml",
        "files/a.yaml",
        "files/environment.yaml",
        "files/linked/c.txt",
        "files/sub/b.py",
    }
    assert set(package.left_out) == {
        ".env",
        ".env.local",
        ".netrc",
        ".ssh",
        ".pgpass",
        "sub/.aws",
        "sub/key.pem",
    }


def test_a_password_is_not_sent_as_part_of_a_jobs_command(tmp_path: Path) -> None:
    arguments = ["tune", "--storage", "postgresql://ada:s3cret@db/studies"]
    with pytest.raises(UserError, match=r"ada:\*\*\*@db") as raised:
        Jobs(client=None, address="10.0.0.5:8265").submit(arguments, folder=None)
    assert "s3cret" not in str(raised.value)
    assert ".pgpass" in str(raised.value)


@pytest.mark.slow
def test_the_package_can_be_imported_where_autosft_is_not_installed(tmp_path: Path) -> None:
    package = job_package.pack(tmp_path / "job.zip", None)
    with zipfile.ZipFile(package.path) as archive:
        archive.extractall(tmp_path / "unpacked")
    program = (
        "import importlib.metadata, autosft, autosft.studies.store.records as r\n"
        "import autosft.profiles.hardware.known_devices as d\n"
        "print(autosft.__file__, r.__file__, d.__file__, importlib.metadata.version('autosft'))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert ended.stdout.count(str(tmp_path / "unpacked")) == 3, ended.stdout


def test_equal_content_gives_an_equal_package(tmp_path: Path) -> None:
    first = job_package.pack(tmp_path / "1.zip", None).path.read_bytes()
    assert job_package.pack(tmp_path / "2.zip", None).path.read_bytes() == first


def test_a_folder_that_is_too_large_is_refused_by_what_is_largest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_package, "MAX_PACKAGE_BYTES", 1000)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 900)
    (tmp_path / "chats.jsonl").write_bytes(b"x" * 200)
    with pytest.raises(UserError, match=r"2 files.*The largest: model.safetensors"):
        job_package.pack(tmp_path / "job.zip", tmp_path)


@pytest.mark.parametrize(
    ("command", "folder", "expected"),
    [
        (["tune", "--trials", "3"], None, ["tune", "--trials", "3", "--address", "auto"]),
        (["tune", "--address=auto"], None, ["tune", "--address=auto"]),
        (["studies", "list"], None, ["studies", "list"]),
        (["tune", "--config", "study.yaml"], Path(), ["tune", "--config", "study.yaml", "--address", "auto"]),
        (["tune", "--config", "study.yaml"], None, "study.yaml is a local file that"),
        (["tune", "--config=study.yaml"], None, "study.yaml is a local file that"),
        (["dashboard"], None, "'dashboard' cannot be sent"),
    ],
)
def test_a_command_is_made_one_for_the_cluster(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    folder: Path | None,
    expected: list[str] | str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text("trials: 3")
    if isinstance(expected, list):
        assert on_cluster(command, folder) == expected
    else:
        with pytest.raises(UserError, match=expected):
            on_cluster(command, folder)


# --- where to -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("10.0.0.5:8265", "http://10.0.0.5:8265"),
        ("https://ray.example.org", "https://ray.example.org"),
        ("http://head:8265/", "http://head:8265"),
        ("head", None),
        ("head:port", None),
        ("ray://head:10001", None),
    ],
)
def test_addresses(address: str, url: str | None) -> None:
    if url is not None:
        assert url_of(address) == url
    else:
        with pytest.raises(UserError, match="is not HOST:PORT or a URL"):
            url_of(address)


def test_loopback_is_told_by_the_address_behind_the_name() -> None:
    assert is_loopback("http://localhost:1")
    assert is_loopback("http://127.0.0.2:1")
    assert not is_loopback("http://192.0.2.7:1")
    assert not is_loopback("http://no-such-host.invalid:1")


class OpenDashboard(http.server.BaseHTTPRequestHandler):
    """What a cluster without tokens answers to a stranger."""

    answer: object = []

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(self.answer).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def open_port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), OpenDashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.slow
def test_a_cluster_that_strangers_can_use_is_refused(
    open_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        item for many in psutil.net_if_addrs().values() for item in many if item.family is socket.AF_INET
    ]
    own = [item.address for item in found if not item.address.startswith("127.")]
    if not own:
        pytest.skip("this machine has no address but loopback")
    assert main(["jobs", "list", "--address", f"{own[0]}:{open_port}"]) == 2
    said = capsys.readouterr().err
    assert "requires no token" in said
    assert "ray get-auth-token --generate" in said
    assert "--insecure" in said


@pytest.mark.slow
def test_wrong_addresses_are_told_apart(
    open_port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["jobs", "list", "--address", "127.0.0.1:1"]) == 2
    assert "No Ray dashboard answers at 127.0.0.1:1" in capsys.readouterr().err
    monkeypatch.setattr(OpenDashboard, "answer", "hello")
    assert main(["jobs", "list", "--address", f"127.0.0.1:{open_port}"]) == 2
    assert "is not Ray's Jobs API" in capsys.readouterr().err


def test_a_head_without_an_agent_for_jobs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoAgent:
        def submit_job(self, **_: object) -> str:
            raise RuntimeError("Request failed with status code 500: No available agent to submit job, ...")

    seconds = itertools.count(0.0, 20.0)
    clock = SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda _: None)
    monkeypatch.setattr(submission, "time", clock)
    with pytest.raises(UserError, match=r"head:8265 has no agent .*, 60 s after") as refusal:
        Jobs(NoAgent(), "head:8265").submit(["tune"], folder=None)
    assert "--dashboard-agent-listen-port" in str(refusal.value.remedy)
    assert next(seconds) == 100.0, "it was asked until the time was over"


# --- a running head -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head() -> Iterator[RayNodes]:
    with ray_nodes() as nodes:
        nodes.start_head(dashboard=True)
        yield nodes


def autosft(head: RayNodes, *arguments: str, token: str | None = "", cwd: Path | None = None):
    """Run a command against the head; `token` None: without one, "": with its own."""
    environment = {**os.environ, "HOME": str(head.folder), "PYTHONPATH": str(ROOT)}
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        environment.pop(name, None)
    if token is not None:
        environment["RAY_AUTH_TOKEN"] = token or head.token
    return subprocess.run(
        [sys.executable, "-m", "autosft", *arguments, "--address", head.dashboard]
        if "--" not in arguments
        else [
            *(sys.executable, "-m", "autosft", arguments[0], "--address", head.dashboard),
            *arguments[1:],
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_is_sent_followed_listed_and_stopped(head: RayNodes, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    storage = f"sqlite:///{tmp_path / 'studies.db'}"
    sent = autosft(head, "submit", "--follow", "--", "profile", "--hardware", "cpu", "--no-measure")
    assert sent.returncode == 0, sent.stderr
    assert "Sent autosft" in sent.stdout
    assert "cores" in sent.stdout
    assert sent.stderr == ""

    failing = autosft(
        head, "submit", "--follow", "--working-dir", ".", "--", "data", "show", "none.jsonl", cwd=tmp_path
    )
    assert failing.returncode == 2, failing.stdout + failing.stderr
    assert "1 files of yours" in failing.stdout

    long = autosft(head, "submit", "--quiet", "--", "tune", "--storage", storage)
    job = long.stdout.strip()
    assert job.startswith("raysubmit_"), long.stderr
    listed = json.loads(autosft(head, "jobs", "list", "--json").stdout)
    assert listed[0]["command"] == f"tune --storage {storage} --address auto"
    stopped = autosft(head, "jobs", "stop", job)
    assert stopped.returncode == 0, stopped.stderr
    deadline = time.monotonic() + 240  # each look is a process that imports Ray
    while (state := autosft(head, "jobs", "status", job, "--quiet").stdout.strip()) != "STOPPED":
        assert time.monotonic() < deadline, state
    assert autosft(head, "jobs", "logs", job).returncode == 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "words"), [(None, "rejects us without a token"), ("wrong" * 8, "rejects our token")]
)
def test_a_head_with_tokens_refuses_strangers(head: RayNodes, token: str | None, words: str) -> None:
    ended = autosft(head, "jobs", "list", token=token)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_that_is_not_there(head: RayNodes) -> None:
    ended = autosft(head, "jobs", "status", "raysubmit_nothing")
    assert ended.returncode == 2
    assert "There is no job 'raysubmit_nothing'" in ended.stderr
