"""Who may write to a study, over SQLite and PostgreSQL: one driver at a time, and what a dead one leaves."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys

import psutil
import pytest

from autosft.studies.store.records import Driver, LeaseLostError, Records, StudyInUseError
from autosft.studies.trial import StopReason, TrialState
from autosft.studies.values import start_ticks
from tests.studies.study_examples import driver, end, evaluation, opened, spec, start


def test_a_second_live_driver_is_refused_with_who_runs_it(records: Records) -> None:
    opened(records, now=0.0, number=1)
    other = records.open_study(spec(), now=30.0)
    with pytest.raises(StudyInUseError, match="process 1 on host-1"):
        other.take_over(driver(2), now=59.0)


def test_a_silent_driver_is_replaced_and_writes_no_more(records: Records) -> None:
    first = opened(records, now=0.0, number=1)
    first.ask(now=0.0)
    first.heartbeat(now=50.0)
    second = records.open_study(spec(), now=0.0)
    with pytest.raises(StudyInUseError):
        second.take_over(driver(2), now=100.0)
    second.take_over(driver(2), now=111.0)
    before = records.read_study("study").trials()
    for write in (
        lambda: first.ask(now=112.0),
        lambda: first.heartbeat(now=112.0),
        lambda: first.enqueue({"weight_decay": 0.1}, origin="enqueued", now=112.0),
        lambda: start(first, 0),
    ):
        with pytest.raises(LeaseLostError, match="taken over"):
            write()
    first.release(now=113.0)  # harmless
    assert records.read_study("study").trials() == before
    assert first.trials() == before  # what was not committed is not in memory either
    second.ask(now=114.0)


def test_a_released_study_is_free_at_once(records: Records) -> None:
    first = opened(records, now=0.0, number=1)
    assert records.studies()[0].driver == driver(1)
    first.release(now=1.0)
    assert records.studies()[0].driver is None
    opened(records, now=2.0, number=2).ask(now=2.0)


def test_a_dead_process_of_this_host_is_replaced_at_once_and_a_living_one_is_not(records: Records) -> None:
    me = Driver.current()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started_at = psutil.Process(child.pid).create_time()
    study = records.open_study(spec(), now=0.0)
    study.take_over(Driver(host=me.host, pid=child.pid, pid_started_at=started_at), now=0.0)
    other = records.open_study(spec(), now=1.0)
    with pytest.raises(StudyInUseError, match=str(child.pid)):
        other.take_over(me, now=1.0)
    child.communicate(b"\n")
    other.take_over(me, now=1.0)
    # A pid that has been given to another process since is not the driver.
    third = records.open_study(spec(), now=1.0)
    other.release(now=1.0)
    third.take_over(Driver(host=me.host, pid=os.getpid(), pid_started_at=1.0), now=1.0)
    other.take_over(me, now=1.0)


def test_attempts_of_a_dead_driver_are_abandoned(records: Records) -> None:
    first = opened(records, now=0.0, number=1)
    for number in range(3):
        first.ask(now=0.0)
        start(first, number)
    first.record(evaluation(1, 1, 1, 1.5, checkpoint="nowhere/1"), now=1.0)
    first.end_attempt(end(2, 1, stopped=StopReason.USER), TrialState.STOPPED, now=2.0)

    second = records.open_study(spec(), now=99.0)
    second.take_over(driver(2), now=99.0)
    assert second.recover(now=99.0) == (0, 1)
    assert second.recover(now=99.0) == ()
    assert [trial.state for trial in second.trials()] == [
        TrialState.WAITING,
        TrialState.WAITING,
        TrialState.STOPPED,
    ]
    assert second.num_finished() == 1
    assert second.trial(1).value == 1.5
    assert [checkpoint.path for checkpoint in second.checkpoints()] == ["nowhere/1"]
    assert not second.record(evaluation(1, 1, 2), now=100.0)
    assert start(second, 1) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "step_s", [-7200.0, 7200.0, 1e8], ids=["backwards", "forwards", "a sleeping machine"]
)
def test_a_clock_step_makes_no_live_driver_look_dead(records: Records, step_s: float) -> None:
    """Else another command would delete its study."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = Driver.current()
    live = dataclasses.replace(
        me,
        pid=child.pid,
        start_ticks=start_ticks(child.pid),
        pid_started_at=me.pid_started_at - step_s,  # as psutil, which adds the clock, had it then
    )
    study = records.open_study(spec(), now=0.0)
    study.take_over(live, now=1e9)
    try:
        with pytest.raises(StudyInUseError):
            records.delete_study("study", now=1e9 + step_s)
        with pytest.raises(StudyInUseError):
            records.open_study(spec(), now=0.0).take_over(me, now=1e9 + step_s)
    finally:
        child.kill()
        child.communicate()
    records.open_study(spec(), now=0.0).take_over(me, now=1e9 + 1.0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_suspended_driver_is_replaced_once_it_has_been_silent(records: Records) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = Driver.current()
    live = dataclasses.replace(me, pid=child.pid, start_ticks=start_ticks(child.pid))
    records.open_study(spec(), now=0.0).take_over(live, now=0.0)
    try:
        os.kill(child.pid, signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        with pytest.raises(StudyInUseError):
            records.open_study(spec(), now=0.0).take_over(me, now=59.0)
        records.open_study(spec(), now=0.0).take_over(me, now=61.0)
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("what", ["another boot", "another process by its number"])
def test_a_driver_of_before_is_replaced_at_once(records: Records, what: str) -> None:
    me = Driver.current()
    assert me.start_ticks is not None
    before = (
        dataclasses.replace(me, boot_id="another")
        if what == "another boot"
        else dataclasses.replace(me, start_ticks=me.start_ticks - 1)
    )
    records.open_study(spec(), now=0.0).take_over(before, now=0.0)
    records.open_study(spec(), now=0.0).take_over(me, now=1.0)


def test_taking_over_shows_what_another_driver_wrote_in_the_meantime(records: Records) -> None:
    mine = records.open_study(spec(), now=0.0)
    assert mine.trials() == ()
    other = opened(records, now=1.0, number=1)
    asked = other.ask(now=1.0).number
    other.release(now=2.0)
    mine.take_over(driver(2), now=3.0)
    assert [trial.number for trial in mine.trials()] == [asked]
