"""Drivers of a study in lockstep with a test, one after another, mortal at every commit that they make."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy.engine import Engine
from sqlalchemy.engine.interfaces import DBAPIConnection

from autosft.profiles.errors import StudyFailedError
from autosft.scheduler.loop.tuning import run_study
from autosft.scheduler.study_run import StudyRun
from autosft.studies.store.records import Records
from autosft.studies.store.study_records import StudyRecords
from tests.scheduler.whole import assert_whole
from tests.scheduler.world import ChaosRunner, World
from tests.studies.study_examples import driver, spec

#: Transitions: what a driver may be killed in.
OPERATIONS = (
    "take_over",
    "recover",
    "heartbeat",
    "enqueue",
    "ask",
    "begin_attempt",
    "record",
    "end_attempt",
    "set_state",
    "change_settings",
    "remove_checkpoints",
    "add_memory_observation",
    "finish_command",
    "release",
)


class Killed(BaseException):
    """The driver is killed here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """When a driver is to be killed: in the next such operation, at its commit of this number, from 0."""

    operation: str
    commit: int
    is_before: bool  # the commit, not after it


class Mortality:
    """Stands at every commit of the driver: looks at what it leaves, and kills the driver there if it is to.

    Whatever way a transaction is made, its commit passes here.
    """

    def __init__(self) -> None:
        self.death: Death | None = None
        self.thread = 0  # the driver's
        self._operation = ""
        self._num_commits = 0  # of the operation so far

    def install(self, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
        """Stand at the commits of a database, and learn which operation they belong to."""
        commit = engine.dialect.do_commit
        monkeypatch.setattr(engine.dialect, "do_commit", functools.partial(self._commit, commit))
        for name in OPERATIONS:
            monkeypatch.setattr(StudyRecords, name, self._named(name, getattr(StudyRecords, name)))

    def _named(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def named(*arguments: Any, **options: Any) -> Any:
            with self._within(name):
                return method(*arguments, **options)

        return named

    @contextmanager
    def _within(self, operation: str) -> Iterator[None]:
        outer = self._operation, self._num_commits
        self._operation, self._num_commits = operation, 0
        try:
            yield
        finally:
            self._operation, self._num_commits = outer

    def _commit(self, commit: Callable[[DBAPIConnection], None], connection: Any) -> None:
        file = connection.driver_connection
        has_written = file.total_changes != connection.info.get("total_changes", 0)
        connection.info["total_changes"] = file.total_changes
        if threading.get_ident() != self.thread or not has_written:
            commit(connection)
            return
        assert_whole(file)
        here = self._operation, self._num_commits
        self._num_commits += 1
        death = self.death
        strikes = death is not None and here == (death.operation, death.commit)
        if strikes:
            self.death = None
        if death is not None and strikes and death.is_before:
            raise Killed
        commit(connection)
        if strikes:
            raise Killed


class Life:
    """One driver, from its start to its end, in a thread that runs only while `go_on` waits for it."""

    def __init__(
        self, number: int, world: World, mortality: Mortality, database: Records, run: StudyRun
    ) -> None:
        self.runner = ChaosRunner(world, start_s=1e6 * number, park=self._park)
        self.is_over = False
        self.study: StudyRecords | None = None
        self._number, self._world, self._mortality = number, world, mortality
        self._database, self._run = database, run
        self._error: BaseException | None = None
        self._is_killed = False
        self._go, self._has_parked = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._live, daemon=True).start()

    def go_on(self) -> None:
        """Run until the loop asks for events again, or ends."""
        self._go.release()
        self._has_parked.acquire()
        if self._error is not None:
            raise self._error

    def kill(self) -> None:
        """Kill the driver where it waits for events."""
        self._is_killed = True
        self.go_on()

    def _park(self) -> None:
        self._has_parked.release()
        self._go.acquire()
        if self._is_killed:
            raise Killed

    def _live(self) -> None:
        self._go.acquire()
        self._mortality.thread = threading.get_ident()
        try:
            self._tune()
        except (Killed, StudyFailedError):
            pass  # without a word: the next driver finds the lease old
        except BaseException as error:
            self._error = error
        self.is_over = True
        self._has_parked.release()

    def _tune(self) -> None:
        now, num_trials = self.runner.now(), self._run.num_trials
        self.study = study = self._database.open_study(spec(self._run.name, num_trials=num_trials), now=now)
        study.take_over(driver(self._number), now=now)
        tally = run_study(
            self._run,
            records=study,
            runner=self.runner,
            leases=self._world,
            observe=lambda event: None,
            stop_requested=self._world.stop_requested,
            devices=self._world,
        )
        assert self.runner.fake.num_running == 0
        held = {item.number for item in study.unfinished() if item.number in tally.paused_trials}
        is_done = study.num_finished() + len(held) == num_trials
        assert is_done or self._world.has_heard or tally.was_stopped, "it has left work behind"
        study.release(now=self.runner.now())
