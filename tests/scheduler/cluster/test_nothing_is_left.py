"""What a dead driver has left belongs to its run and goes away with it, whatever ended the driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from autosft.profiles.errors import UserError
from autosft.scheduler.cluster import run_folder, watchdog
from autosft.scheduler.cluster.run_folder import clean_up_dead_runs
from tests.scheduler.processes import LIMIT_S, ROOT, TRAIN, is_gone, members, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# --- whose process is it ------------------------------------------------------------------------------

SLEEP = "import signal, sys; print(flush=True); signal.pause()"


def sleeper(*, env: dict[str, str] | None = None, log: Path | None = None, program: str = SLEEP) -> int:
    """Start a process in a session of its own that sleeps; return once it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=log.open("w") if log else None,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process.pid


def test_who_only_reads_a_file_of_a_run_is_left_alone(tmp_path: Path) -> None:
    """Such as `tail -f` on a log, an editor, or a backup."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    log = run_dir / "log"
    log.write_text("x")
    reader = sleeper(program=f"kept = open({str(log)!r}), open({str(log)!r}, 'a');" + SLEEP)
    try:
        assert members(run_dir) == []
        assert watchdog.sweep(str(run_dir), spare=frozenset({os.getpid()})) == []
        assert not is_gone(reader)
    finally:
        os.kill(reader, signal.SIGKILL)


@pytest.mark.parametrize(
    "kind", ["a user's folder", "one with a lock", "a link", "a link to a run", "without a lock", "its own"]
)
def test_only_folders_of_runs_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The folder of all runs may hold anything; what is not surely a run's is not touched."""
    root, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    monkeypatch.setattr(run_folder, "runs_root", lambda: root)
    place = {
        "a user's folder": root / "thesis",
        "one with a lock": root / "thesis",
        "a link": root / "0123abcd",
        "a link to a run": root / "0123abcd",
        "without a lock": root / "0123abcd",
        "its own": root / "0123abcd",
    }[kind]
    if kind.startswith("a link"):
        place.symlink_to(elsewhere)
    else:
        place.mkdir()
    if kind in ("one with a lock", "its own", "a link to a run"):
        (place / "lock").touch()
    (place / "results.txt").write_text("of years")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    clean_up_dead_runs()
    after = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    if kind == "its own":
        assert not place.exists()
    else:
        assert after == before, "not even a lock is added"


def test_a_root_that_is_a_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "theirs"
    (target / "0123abcd").mkdir(parents=True)
    (target / "0123abcd" / "lock").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(run_folder, "_ROOM_BYTES", 0)  # or another temporary folder is taken
    (tmp_path / f"autosft-{os.getuid()}").symlink_to(target)
    with pytest.raises(UserError, match="link"):
        clean_up_dead_runs()
    assert (target / "0123abcd" / "lock").exists()


def test_a_process_belongs_to_a_run_by_environment_by_open_file_or_by_descent(tmp_path: Path) -> None:
    run_dir, other = tmp_path / "run", tmp_path / "run2"
    run_dir.mkdir()
    other.mkdir()
    by_environment = sleeper(env={"AUTOSFT_RUN": str(run_dir)})
    by_file = sleeper(log=run_dir / "log")
    parent = sleeper(
        log=run_dir / "log",
        program="import subprocess, sys, os, signal; null = open(os.devnull, 'w');"
        "subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'], stderr=null, stdout=null);"
        "print(flush=True); signal.pause()",
    )
    stranger = sleeper(env={"AUTOSFT_RUN": str(other)}, log=other / "log")
    # Another run, at its start, looks whether this one's driver is alive just when this one ends.
    passer_by = sleeper(log=run_dir / "lock")
    try:
        [child] = psutil.Process(parent).children()
        assert set(members(run_dir)) == {by_environment, by_file, parent, child.pid}
        assert watchdog.sweep(str(run_dir), spare=frozenset({os.getpid()})) == []
        assert all(is_gone(pid) for pid in (by_environment, by_file, parent, child.pid))
        assert not run_dir.exists()
        assert not is_gone(stranger)
        assert not is_gone(passer_by)
    finally:
        os.kill(stranger, signal.SIGKILL)
        os.kill(passer_by, signal.SIGKILL)


def test_only_dead_runs_are_cleaned_up() -> None:
    program = """
        import os, subprocess, sys
        from autosft.scheduler.cluster.run_folder import run_folder
        with run_folder() as run_dir:
            subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"],
                             env={**os.environ, "AUTOSFT_RUN": str(run_dir)}, stdout=subprocess.DEVNULL)
            print(run_dir, flush=True)
            sys.stdin.read()
    """
    drivers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    run_dirs = [Path((d.stdout or sys.stdin).readline().strip().decode()) for d in drivers]  # type: ignore[union-attr]
    dead, living = drivers
    dead.kill()
    dead.wait()
    orphans = [pid for pid in members(run_dirs[0]) if pid != dead.pid]
    others = members(run_dirs[1])
    assert orphans
    assert others
    deadline = time.monotonic() + 60
    clean_up_dead_runs()
    while run_dirs[0].exists() and time.monotonic() < deadline:
        time.sleep(0.1)  # another run on this machine is just cleaning up there and holds the lock
        clean_up_dead_runs()
    assert all(is_gone(pid) for pid in orphans)
    assert not run_dirs[0].exists()
    assert run_dirs[1].exists()
    assert not any(is_gone(pid) for pid in others)
    watchdog.sweep(str(run_dirs[1]), spare=frozenset({os.getpid()}))
    living.kill()
    living.wait()


# --- a driver that dies -------------------------------------------------------------------------------

DRIVER = f"""
    import signal
    import sys
    # Tests that run in the background of a shell inherit an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path.insert(0, {str(ROOT)!r})
    from autosft.scheduler.cluster.ray_cluster import start_local
    from tests.workers.scripted import Fault, Script, make_job
    with start_local(imports=["tests.workers.scripted"]) as cluster:
        runner = cluster.runner(function={TRAIN!r})
        runner.run(make_job(Script(fault=Fault.HANG), output_dir=sys.argv[1]))
        runner.events(200.0)
        print(cluster.starter.socket_path.parents[1], flush=True)
        if sys.argv[2] == "raise":
            sys.stdin.readline()
            raise SystemError("a bug")
        while True:
            runner.events(60.0)
"""


@pytest.mark.ray
@pytest.mark.parametrize(
    "how",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("raise", marks=pytest.mark.slow),
    ],
)
def test_nothing_outlives_a_driver(tmp_path: Path, how: signal.Signals | str) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER), str(tmp_path), str(how)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr").open("w"),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert driver.stdout is not None
    run_dir = Path(driver.stdout.readline().decode().strip())
    assert run_dir.is_dir(), (tmp_path / "stderr").read_text()
    ours = members(run_dir)
    names = " ".join(" ".join(psutil.Process(pid).cmdline()) for pid in ours)
    for name in ("raylet", "gcs_server", "DashboardAgent", "RuntimeEnvAgent", "TrialActor", "warm_server"):
        assert name in names, f"{name} is not known to belong to the run"
    started = time.monotonic()
    if how == signal.SIGINT:
        os.killpg(driver.pid, signal.SIGINT)  # as the terminal does
    elif isinstance(how, signal.Signals):
        driver.send_signal(how)
    else:
        assert driver.stdin is not None
        driver.stdin.close()
    wait_for(lambda: driver.poll() is not None and all(is_gone(pid) for pid in ours))
    wait_for(lambda: not run_dir.exists())
    assert time.monotonic() - started < LIMIT_S
    assert members(run_dir) == []


@pytest.mark.ray
@pytest.mark.slow
def test_the_handler_of_sigterm_stays_in_place(tmp_path: Path) -> None:
    handler = """
        import signal
        def leave(*_):
            print("handled")
            raise KeyboardInterrupt
        signal.signal(signal.SIGTERM, leave)
    """
    program = textwrap.dedent(handler) + textwrap.dedent(DRIVER)
    driver = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), ""],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert driver.stdout is not None
    run_dir = Path(driver.stdout.readline().decode().strip())
    driver.terminate()
    said, errors = driver.communicate(timeout=LIMIT_S)
    assert said == b"handled\n"
    assert b"SIGTERM received" not in errors, "Ray's own handler has run"
    assert members(run_dir) == []


@pytest.mark.ray
def test_leaving_at_once_does_not_wait_for_ray_and_leaves_nothing() -> None:
    program = """
        from autosft.scheduler.cluster.ray_cluster import start_local
        with start_local(imports=[]) as cluster:
            print(cluster.starter.socket_path.parents[1])
            raise SystemExit(2)
    """
    left = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert left.returncode == 2
    assert left.stderr == "", "Ray's words reached the terminal"
    run_dir = Path(left.stdout.strip())
    assert not run_dir.exists()
    assert members(run_dir) == []
