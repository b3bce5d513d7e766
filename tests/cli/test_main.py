"""Whatever goes wrong ends in one message and the right exit code."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from autosft import cli
from autosft.commands import stopping
from autosft.commands.stopping import StopSwitch
from autosft.profiles.errors import InterruptedRunError, StudyFailedError, UserError
from autosft.studies.store.database import DatabaseError
from autosft.studies.store.records import open_records
from tests.cli.study_script import CONCLUSION, study_events

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and folders")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    """Keep the user's data, cache and logs out of the tests."""
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))


WRONG = {
    "unknown flag": ("tune --trails 3", r"no such option: --trails\.\n.*Did you mean --trials\?"),
    "unknown command": ("tuen", r"no such command 'tuen'\.\n.*Did you mean 'tune'\?"),
    "no value": ("tune --model", "'--model' requires an argument"),
    "not a number": ("tune --trials many", "'--trials'.*valid integer"),
    "zero trials": ("tune --trials 0", "--trials: 0: input should be greater than or equal to 1"),
    "negative budget": ("tune --time-budget -3h", "'-3h' is not a positive duration"),
    "unknown choice": ("tune --method lorra", "'--method'.*'lorra' is not one of 'auto', 'full'"),
    "empty range": ("tune --learning-rate 5..1", "ends below its start"),
    "model without data": ("tune --model m", "--data is missing"),
    "missing file": ("tune --config nowhere.yaml", "nowhere.yaml does not exist"),
    "argument too many": ("tune now", r"unexpected extra argument\(s\) \(now\)"),
    "argument missing": ("studies show", "missing argument 'STUDY'"),
    "no database": ("studies list", "no study database"),
    "no folder": ("profile --output no/folder/p.json", "there is no folder no/folder"),
    "unknown hardware": ("profile --hardware B9000", "B9000"),
    "database of another kind": ("studies list --storage redis://x", "redis"),
    "port out of range": ("dashboard --port 0", "'--port'"),
}


@pytest.mark.parametrize(("line", "expected"), WRONG.values(), ids=WRONG)
def test_a_wrong_request_is_one_message_and_exit_code_2(line, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert re.search(expected, err)
    assert "Traceback" not in err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [], "something half-made was left"


def test_a_file_that_is_no_database_is_refused(capsys, tmp_path):
    (tmp_path / "notes.db").write_text("milk, bread, eggs " * 100)
    assert cli.main(["studies", "list", "--storage", f"sqlite:///{tmp_path}/notes.db"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_taken_port_is_refused(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert cli.main(["dashboard", "--port", str(other.getsockname()[1])]) == 2
    assert re.search(r"--port \d+: .*in use", capsys.readouterr().err)


def test_a_dashboard_on_nothing_is_refused(capsys, tmp_path):
    url = f"sqlite:///{tmp_path}/studies.db"
    open_records(url).close()
    assert cli.main(["dashboard", "--storage", url]) == 2
    assert "holds no studies yet" in capsys.readouterr().err
    assert cli.main(["studies", "list", "--storage", url]) == 0
    assert "holds no studies yet" in capsys.readouterr().out


def test_remedies_stand_indented_below_the_message(capsys):
    cli.complain("7 is too many\nand not prime", "Take 5.\nOr 3.", code=2)
    assert capsys.readouterr().err == (
        "error: 7 is too many\n       and not prime\n       Take 5.\n       Or 3.\n"
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["tune", "--help"], ["data", "show", "-h"]])
def test_help(arguments, capsys):
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: autosft")
    assert err == ""


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_python_m_autosft_is_the_same_program():
    ended = subprocess.run(
        [sys.executable, "-m", "autosft", "tune", "--trails"], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")


def test_a_closed_pipe_ends_quietly():
    command = f"{sys.executable} -m autosft tune --help | true"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert ended.stderr == ""


def test_profile_says_what_is_there(capsys, tmp_path):
    file = tmp_path / "p.json"
    assert cli.main(["profile", "--hardware", "2xL40S", "--output", str(file)]) == 0
    assert capsys.readouterr().out.count("L40S (assumed, not found here)") == 2
    assert cli.main(["profile", "--hardware", str(file), "--json"]) == 0
    assert capsys.readouterr().out.startswith("{")


# tune, with everything below the command line replaced


@dataclass
class FakeStudy:
    runner: object
    run: object = None
    records: object = None
    leases: object = None
    devices: object = None
    hardware: object = None


class Records:
    """Has recorded no advice and takes none amiss."""

    def advice(self) -> list[object]:
        return []

    def add_advice(self, *_: object, **__: object) -> None: ...


class Runner:
    def __init__(self) -> None:
        self.graces: list[float] = []

    def close(self, *, grace_s: float) -> None:
        self.graces.append(grace_s)

    def now(self) -> float:
        return 0.0


@pytest.fixture
def study(monkeypatch):
    """Replace what `tune` calls; returns the parts for a test to change."""
    from autosft.profiles.hardware.discover import profile_hardware
    from autosft.scheduler.finish import conclusion, final_evaluation, untuned_score
    from autosft.scheduler.loop import tuning
    from autosft.scheduler.setup import open_study as setup
    from autosft.scheduler.study_run import Tally

    parts = {"conclusion": CONCLUSION, "requests": [], "was_closed": False}

    @contextmanager
    def open_study(request, *, observe):
        parts["requests"].append(request)
        try:
            yield FakeStudy(runner=Runner(), records=Records(), hardware=profile_hardware("cpu"))
        finally:
            parts["was_closed"] = True

    def run_study(run, *, observe, stop_requested, **_):
        for event in study_events(2):
            observe(event)
        parts.get("during", lambda _: None)(stop_requested)
        return Tally(
            num_gaps=0, idle_s=0.0, median_gap_s=None, overhead=None, paused_trials=(), was_stopped=False
        )

    monkeypatch.setattr(setup, "open_study", open_study)
    monkeypatch.setattr(tuning, "run_study", run_study)
    monkeypatch.setattr(final_evaluation, "score_best", lambda *_, **__: None)
    monkeypatch.setattr(untuned_score, "score_untuned", lambda *_, **__: None)
    monkeypatch.setattr(untuned_score, "AgainstUntuned", lambda _, observe: observe)
    monkeypatch.setattr(conclusion, "conclude", lambda *_: parts["conclusion"], raising=False)
    return parts


def test_tune_shows_the_study_and_its_end(study, capsys):
    assert cli.main(["tune", "--trials", "2", "--weight-decay", "0"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.index("study demo") < out.index("trial 1 completed") < out.index("autosft train")
    [request] = study["requests"]
    assert (request.trials, request.space) == (2, {"weight_decay": "0"})


def test_ctrl_c_once_is_a_clean_stop_with_exit_code_130(study, capsys):
    def press_ctrl_c(stop_requested):
        assert not stop_requested()
        signal.raise_signal(signal.SIGINT)
        assert stop_requested()

    study["during"] = press_ctrl_c
    study["conclusion"] = replace(CONCLUSION, is_complete=False, num_finished=1)
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["tune"]) == 130
    assert CONCLUSION.resume_command in capsys.readouterr().out
    assert study["was_closed"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stop_that_comes_after_the_last_trial_changes_nothing(study):
    study["during"] = lambda _: signal.raise_signal(signal.SIGTERM)
    assert cli.main(["tune"]) == 0


def test_a_study_without_a_result_ends_with_1_and_says_why(study, capsys):
    why = "no trial has a result: the only trial: out of device memory; a shorter --seq-len needs less."
    study["conclusion"] = replace(CONCLUSION, best_trial=None, no_result=why)
    assert cli.main(["tune"]) == 1
    out, err = capsys.readouterr()
    assert err == f"error: {why}\n"
    assert "resume" in out, "what there is to go on with is shown as well"


ENDS = {
    "the work failed": (StudyFailedError("trial 3 failed: no"), 1, "error: trial 3 failed: no\n"),
    "Ray has died": (InterruptedRunError("Ray's head has died"), 75, "error: Ray's head has died\n"),
    "the database went away": (DatabaseError("it does not answer"), 75, "error: it does not answer\n"),
    "the data is bad": (UserError("line 3: no", remedy="Fix it."), 2, "error: line 3: no\n       Fix it.\n"),
    "stopped before anything ran": (KeyboardInterrupt(), 130, "stopped\n"),
}


@pytest.mark.parametrize(("error", "code", "message"), ENDS.values(), ids=ENDS)
def test_how_a_study_can_end(error, code, message, study, capsys):
    def fail(_):
        raise error

    study["during"] = fail
    assert cli.main(["tune"]) == code
    assert capsys.readouterr().err == message
    assert study["was_closed"]


def test_a_bug_of_ours_leaves_its_traceback_in_a_file(study, capsys):
    def fail(_):
        raise KeyError("x")

    study["during"] = fail
    assert cli.main(["tune"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    [path] = re.findall(r"The traceback is in (\S+)", err)
    assert "KeyError: 'x'" in Path(path).read_text(encoding="utf-8")


def test_a_full_disk_is_no_bug_of_ours(study, capsys):
    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/checkpoint")

    study["during"] = fail
    assert cli.main(["tune"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: /data/checkpoint: No space left on device.\n")
    assert "bug in autosft" not in err


# Signals


class Ended(BaseException):
    pass


@pytest.fixture
def at_once(monkeypatch):
    """Make os._exit visible instead of ending the tests."""

    def leave(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(stopping.os, "_exit", leave)


@pytest.mark.usefixtures("at_once")
def test_ctrl_c_twice_ends_everything_at_once():
    calls: list[str] = []
    runner = Runner()
    with StopSwitch(on_abort=lambda: calls.append("terminal")) as stop:
        stop.guard(runner)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested()
        assert runner.graces == []
        with pytest.raises(Ended, match="130"):
            signal.raise_signal(signal.SIGINT)
    assert (calls, runner.graces) == (["terminal"], [0.0])


@pytest.mark.usefixtures("at_once")
def test_a_runner_that_hangs_does_not_keep_us(monkeypatch):
    monkeypatch.setattr(stopping, "CLOSE_S", 0.01)
    lock = threading.Lock()

    class Hanging:
        def close(self, *, grace_s: float) -> None:
            with lock:
                pass

    with lock, StopSwitch(on_abort=lambda: None) as stop:
        stop.guard(Hanging())
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Ended, match="130"):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("at_once")
def test_sigterm_repeated_stays_a_clean_stop():
    runner = Runner()
    with StopSwitch(on_abort=lambda: None) as stop:
        stop.guard(runner)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested()
    assert runner.graces == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_trials_run_a_signal_interrupts(number):
    with pytest.raises(KeyboardInterrupt), StopSwitch(on_abort=lambda: None):
        signal.raise_signal(number)


class Interrupted:
    """Is interrupted where Python raises nothing further, as in the import system's callbacks."""

    def __init__(self, number: signal.Signals) -> None:
        self._number = number

    def __del__(self) -> None:
        signal.raise_signal(self._number)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_python_loses_ends_the_program_all_the_same(number, monkeypatch):
    codes: list[int] = []
    told: list[type[BaseException]] = []
    monkeypatch.setattr(stopping.os, "_exit", codes.append)
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with StopSwitch(on_abort=lambda: None):
            Interrupted(number)
        assert codes == [130]
        Interrupted(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert told == [KeyboardInterrupt, KeyboardInterrupt], "the hook of before is back"


def test_what_else_python_loses_ends_nothing(monkeypatch):
    class Broken:
        def __del__(self) -> None:
            raise ValueError("lost")

    told: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))
    monkeypatch.setattr(stopping.os, "_exit", lambda code: pytest.fail("it has ended"))
    with StopSwitch(on_abort=lambda: None):
        Broken()
    assert told == [ValueError]
