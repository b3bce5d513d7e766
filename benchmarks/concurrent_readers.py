"""A study that writes while others read and leave commands: counts every "database is locked".

    python -m benchmarks.concurrent_readers --minutes 10
    python -m benchmarks.concurrent_readers --minutes 10 --storage postgresql://USER@HOST/DATABASE

One process writes trials as the tuning loop does, Optuna's tables included.  Beside it, each in a process of
its own: one reads as `studies show` does, one makes reports, one reads as Optuna's dashboard does (all trials
through Optuna's storage), one leaves commands as `studies pause` does.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from queue import Empty
from typing import Any

from autosft.profiles.errors import UserError
from autosft.studies.report import render, report_of
from autosft.studies.store.records import CommandKind, open_records
from autosft.studies.trial import TrialState
from tests.studies.study_examples import end, evaluation, opened, progress, start

PAUSE_S = 0.05
STEPS_PER_TRIAL = 20


def write(url: str, tell: Callable[[str], None], until: float) -> None:
    """Run one trial after another: 20 progress reports, 4 evaluations, an end."""
    records = open_records(url)
    study = opened(records, name="busy", now=time.time(), num_trials=100_000)
    while time.time() < until:
        trial = study.ask(now=time.time()).number
        attempt = start(study, trial, now=time.time())
        for step in range(STEPS_PER_TRIAL):
            study.record(progress(trial, attempt, step + 100), now=time.time())
            study.heartbeat(now=time.time())
            tell("progress")
            time.sleep(PAUSE_S)
        for number in range(1, 5):
            study.record(evaluation(trial, attempt, number, 2.0 - number / 10), now=time.time())
        study.end_attempt(end(trial, attempt), TrialState.COMPLETED, now=time.time())
        for command in study.pending_commands():
            study.finish_command(command.id, now=time.time())
        tell("trial")
    study.release(now=time.time())
    records.close()


def read(url: str, tell: Callable[[str], None], until: float) -> None:
    """Read as `studies list` and `studies show` do, opening the database each time."""
    while time.time() < until:
        records = open_records(url)
        found = records.read_study("busy")
        assert len(found.trials()) >= 0
        records.studies()
        found.scores()
        records.close()
        tell("reading")
        time.sleep(4 * PAUSE_S)


def report(url: str, tell: Callable[[str], None], until: float) -> None:
    """Make a report every few seconds, as `autosft report` does."""
    while time.time() < until:
        records = open_records(url)
        page = render(report_of(records.read_study("busy"), database=url, now=time.time()))
        assert page.endswith("</html>")
        records.close()
        tell("report made")
        time.sleep(60 * PAUSE_S)


def watch(url: str, tell: Callable[[str], None], until: float) -> None:
    """Read as Optuna's dashboard does."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    while time.time() < until:
        storage = optuna.storages.RDBStorage(url)
        for study in storage.get_all_studies():
            storage.get_all_trials(study._study_id, deepcopy=False)
        storage.remove_session()
        storage.engine.dispose()
        tell("dashboard reading")
        time.sleep(10 * PAUSE_S)


def command(url: str, tell: Callable[[str], None], until: float) -> None:
    """Leave a command each second."""
    while time.time() < until:
        records = open_records(url)
        records.send_command("busy", CommandKind.RESUME, now=time.time())
        records.close()
        tell("command")
        time.sleep(20 * PAUSE_S)


def take_part(role: Callable[..., None], url: str, told: Any, until: float) -> None:
    """Play a role again and again; tell what goes wrong instead of ending."""
    while time.time() < until:
        try:
            role(url, told.put, until)
        except (UserError, Exception) as error:
            told.put(f"ERROR in {role.__name__}: {' '.join(str(error).split())[:200]}")
            time.sleep(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--storage", help="database URL; a new SQLite file if not given")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = given.storage or f"sqlite:///{folder}/studies.db"
        records = open_records(url)
        opened(records, name="busy", now=0.0, num_trials=100_000).release(now=0.0)
        records.close()
        context = multiprocessing.get_context("spawn")
        told: Any = context.Queue()
        until = time.time() + 60 * given.minutes
        parts = [
            context.Process(target=take_part, args=(role, url, told, until))
            for role in (write, read, report, watch, command)
        ]
        for part in parts:
            part.start()
        counts: collections.Counter[str] = collections.Counter()
        while any(part.is_alive() for part in parts) or not told.empty():
            try:
                counts[told.get(timeout=1.0)] += 1
            except Empty:
                continue
    print(json.dumps({"minutes": given.minutes, "url": url.partition(":")[0], **counts}, indent=1))
    return int(any(name.startswith("ERROR") for name in counts))


if __name__ == "__main__":
    sys.exit(main())
