"""A second user of the same machine can read nothing, stop nothing and delete nothing of the first's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.hardware import leases
from autosft.profiles.hardware.leases import Leases, default_folder
from autosft.profiles.own_folders import cache_folder
from autosft.scheduler.cluster import run_folder
from autosft.scheduler.cluster.run_folder import clean_up_dead_runs
from autosft.studies.store.records import default_storage_url, open_records
from tests.studies.study_examples import spec

ADD = shutil.which("useradd") or "/usr/sbin/useradd"

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or os.getuid() != 0 or not Path(ADD).exists(),
        reason="makes users: needs root and useradd",
    ),
]

GIB = 1 << 30


@pytest.fixture(scope="module")
def users() -> Iterator[tuple[int, int]]:
    """Two users, by their numbers."""
    names = [f"autosft-test-{number}-{os.getpid()}" for number in (1, 2)]
    made = []
    for name in names:
        done = subprocess.run(
            [ADD, "-M", "-s", "/bin/false", name], check=False, capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"useradd: {done.stderr.strip()}")
        made.append(int(subprocess.check_output(["id", "-u", name], text=True)))
    yield made[0], made[1]
    for name in names:
        subprocess.run([str(Path(ADD).with_name("userdel")), name], check=False, capture_output=True)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder that all users write to, and homes that all may enter."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="m") as name:
        root = Path(name)
        root.chmod(0o755)
        for folder, mode in (("tmp", 0o1777), ("home", 0o1777)):
            (root / folder).mkdir()
            (root / folder).chmod(mode)
        monkeypatch.setattr(tempfile, "tempdir", str(root / "tmp"))
        monkeypatch.setattr(leases, "_SHARED", (root / "tmp",))
        monkeypatch.setattr(run_folder, "_ROOM_BYTES", 0)
        yield root


def become(user: int, machine: Path) -> None:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    os.umask(0o022)
    os.environ["XDG_DATA_HOME"] = str(machine / "home" / f"data-{user}")
    os.environ["XDG_CACHE_HOME"] = str(machine / "home" / f"cache-{user}")


@contextlib.contextmanager
def first_user(user: int, machine: Path) -> Iterator[dict[str, Any]]:
    """A process of the first user that has all that a run has; yields where it lies."""
    told, tell = os.pipe()
    wait, leave = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(leave)
            become(user, machine)
            with run_folder.run_folder() as run_dir:
                (run_dir / "token").touch(mode=0o600)
                (run_dir / "token").write_text("s3cret")
                listener = socket.socket(socket.AF_UNIX)
                listener.bind(str(run_dir / "s"))
                listener.listen()
                lease = Leases().acquire(
                    "GPU-0", 20 * GIB, total_bytes=24 * GIB, free_bytes=24 * GIB, study="mine", trial=0
                )
                assert lease is not None
                with closing(open_records(default_storage_url())) as records:
                    records.open_study(spec(), now=0.0)
                (cache_folder() / "data").mkdir()
                (cache_folder() / "data" / "prepared").write_text("private")
                places = {
                    "pid": os.getpid(),
                    "run": str(run_dir),
                    "leases": str(default_folder()),
                    "database": default_storage_url().removeprefix("sqlite:///"),
                    "cache": str(cache_folder()),
                }
                os.write(tell, json.dumps(places).encode() + b"\n")
                os.read(wait, 1)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(wait)
    os.close(tell)
    with os.fdopen(told) as lines:
        line = lines.readline()
    assert line, "the first user could not set up"
    try:
        yield json.loads(line)
    finally:
        os.close(leave)
        os.waitpid(child, 0)


def as_second(user: int, machine: Path, act: Callable[[], object]) -> str:
    """Return what comes of an act of the second user: "" where it went well, else the error's type."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            become(user, machine)
            act()
            os.write(tell, b" ")
        except BaseException as error:
            os.write(tell, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(tell)
    with os.fdopen(told) as said:
        answer = said.read()
    os.waitpid(child, 0)
    return answer.strip()


def below(folder: str) -> list[Path]:
    return sorted(Path(folder).rglob("*"))


ATTACKS: dict[str, Callable[[dict[str, Any]], object]] = {
    "read the token": lambda at: Path(at["run"], "token").read_text(),
    "list the run": lambda at: os.listdir(at["run"]),  # noqa: PTH208
    "list the leases": lambda at: os.listdir(at["leases"]),  # noqa: PTH208
    "connect to a socket": lambda at: socket.socket(socket.AF_UNIX).connect(f"{at['run']}/s"),
    "read the database": lambda at: Path(at["database"]).read_bytes(),
    "open the database": lambda at: open_records(f"sqlite:///{at['database']}"),
    "read the cache": lambda at: Path(at["cache"], "data", "prepared").read_bytes(),
    "kill the run": lambda at: os.kill(at["pid"], signal.SIGKILL),
    "stop the run": lambda at: os.kill(at["pid"], signal.SIGSTOP),
    "delete the run": lambda at: shutil.rmtree(at["run"]),
    "move the runs away": lambda at: Path(at["run"]).parent.rename(f"{at['run']}-x"),
    "delete the leases": lambda at: shutil.rmtree(at["leases"]),
    "write into the leases": lambda at: Path(at["leases"], "x").touch(),
    "take over the leases": lambda at: Leases(Path(at["leases"])).held("GPU-0"),
    "delete the database": lambda at: Path(at["database"]).unlink(),
}


def test_a_second_user_can_read_stop_and_delete_nothing_of_the_first(
    users: tuple[int, int], machine: Path
) -> None:
    first, second = users
    with first_user(first, machine) as at:
        before = [path for place in ("run", "leases", "cache") for path in below(at[place])]
        for name, attack in ATTACKS.items():
            error = as_second(second, machine, lambda attack=attack: attack(at))  # type: ignore[misc]
            assert error in ("PermissionError", "UserError", "OperationalError", "FileNotFoundError"), (
                f"{name}: {error or 'went well'}"
            )
        assert before == [path for place in ("run", "leases", "cache") for path in below(at[place])]
        assert before
        assert Path(at["database"]).is_file()
        os.kill(at["pid"], 0)


def test_a_second_user_runs_beside_the_first(users: tuple[int, int], machine: Path) -> None:
    """Neither sweeps the other's runs, and each has leases of its own."""
    first, second = users

    def run() -> None:
        clean_up_dead_runs()
        with run_folder.run_folder() as mine:
            assert mine.is_dir()
            lease = Leases().acquire(
                "GPU-0", 4 * GIB, total_bytes=24 * GIB, free_bytes=24 * GIB, study="mine", trial=0
            )
            assert lease is not None

    with first_user(first, machine) as at:
        assert as_second(second, machine, run) == ""
        assert Path(at["run"]).is_dir()


@pytest.mark.parametrize("obstacle", ["a folder", "a link", "a file"])
def test_what_a_second_user_lays_in_the_way_is_refused_and_not_followed(
    users: tuple[int, int], machine: Path, obstacle: str
) -> None:
    first, second = users
    name = machine / "tmp" / f"autosft-{first}"
    target = machine / "home" / "target"

    def lay() -> None:
        target.mkdir()
        target.chmod(0o777)
        (target / "0123abcd").mkdir()
        (target / "0123abcd" / "lock").touch()
        if obstacle == "a folder":
            name.mkdir()
            name.chmod(0o777)
        elif obstacle == "a link":
            name.symlink_to(target)
        else:
            name.touch()

    assert as_second(second, machine, lay) == ""

    def start() -> None:
        with pytest.raises(UserError), run_folder.run_folder():
            pass

    assert as_second(first, machine, start) == ""
    assert (target / "0123abcd" / "lock").exists()
