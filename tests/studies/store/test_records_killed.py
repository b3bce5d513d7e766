"""Drivers killed anywhere: the study goes on as if nothing had happened, and the counts are exact."""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Engine

from autosft.studies.search.space import default_parameters, neighbours
from autosft.studies.store.records import StudyRecords, open_records
from autosft.studies.trial import FailureKind, StopReason, TrialState
from tests.studies.study_examples import PLAN, driver, end, evaluation, spec

NUM_TRIALS = (
    4  # finished ones; the study asks for more, so that the sampler is TPE: torch would not survive a fork
)
EVALUATIONS = 2
KILLED = 137

#: What becomes of each trial that is run to its end, by number; trial 2 is broken and does not count.
ENDS = {
    0: ({}, TrialState.COMPLETED),
    1: ({"stopped": StopReason.PRUNED}, TrialState.STOPPED),
    2: ({"failure": FailureKind.ERROR}, TrialState.FAILED),
    3: ({"failure": FailureKind.OUT_OF_MEMORY}, TrialState.INFEASIBLE),
    4: ({}, TrialState.COMPLETED),
}


def drive(url: str, *, number: int) -> None:
    """Run a study to its end, taking up whatever a killed driver has left."""
    records = open_records(url)
    now = number * 1000.0
    # Of more trials than are run here, so that the sampler is TPE: torch's threads do not survive a fork.
    study = records.open_study(spec(num_trials=30), now=now)
    study.take_over(driver(number), now=now)
    default = default_parameters(study.spec.space)
    study.enqueue(default, origin="default", now=now)
    for parameters in neighbours(study.spec.space, default):
        study.enqueue(parameters, origin="neighbour", now=now)
    study.recover(now=now)
    study.tidy_checkpoints(Path("/nowhere"), keep_best=2)
    while study.num_finished() < NUM_TRIALS:
        trial = study.unfinished()[0] if study.unfinished() else study.ask(now=now)
        run(study, trial.number, now=now)
    study.release(now=now)
    records.close()


def run(study: StudyRecords, trial: int, *, now: float) -> None:
    attempt = study.begin_attempt(trial, plan=PLAN, device_uuids=("GPU-0",), now=now)
    for evaluated in range(1, EVALUATIONS + 1):
        report = evaluation(
            trial, attempt, evaluated, 1.0 + trial / 10 + evaluated, checkpoint=f"none/{trial}/{evaluated}"
        )
        assert study.record(report, now=now)
    changes, state = ENDS[trial]
    assert study.end_attempt(end(trial, attempt, **changes), state, now=now)
    study.tidy_checkpoints(Path("/nowhere"), keep_best=2)


def killed_at(url: str, point: int) -> bool:
    """Run a driver in a process of its own that dies at its `point`-th statement or commit; was it killed?"""
    pid = os.fork()
    if pid == 0:
        try:
            points = itertools.count(1)

            def count(*_: object) -> None:
                if next(points) == point:
                    os._exit(KILLED)

            event.listen(Engine, "before_cursor_execute", count)
            event.listen(Engine, "commit", count)
            drive(url, number=1)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED)
    return code == KILLED


def outcome(url: str) -> dict[str, object]:
    """What must not depend on whether and where a driver was killed."""
    import optuna

    records = open_records(url)
    study = records.read_study("study")
    [theirs] = optuna.get_all_study_summaries(storage=url)
    projected = optuna.load_study(study_name="study", storage=url).trials
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        counts = {
            table: connection.scalar(sa.text(f"SELECT count(*) FROM autosft_{table}"))
            for table in ("studies", "trials", "queue", "checkpoints")
        }
        repeated = connection.scalar(
            sa.text("SELECT count(*) FROM autosft_attempts WHERE ended_at IS NULL OR outcome IS NULL")
        )
    engine.dispose()
    result = {
        "trials": [
            (trial.number, trial.state, trial.parameters, trial.value, trial.failure, len(trial.measurements))
            for trial in study.trials()
        ],
        "finished": study.num_finished(),
        "unfinished": study.unfinished(),
        "checkpoints": [checkpoint.path for checkpoint in study.checkpoints()],
        "rows": counts,
        "open attempts": repeated,
        "optuna": Counter((item.state.name, item.user_attrs.get("trial")) for item in projected),
        "optuna's values": [
            (item.user_attrs.get("trial"), item.value, item.intermediate_values, item.constraints)
            for item in projected
        ],
        "optuna's studies": (theirs.study_name, theirs.user_attrs["metric"]),
    }
    records.close()
    return result


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, empty_sqlite: Path) -> dict[str, object]:
    path = tmp_path_factory.mktemp("undisturbed") / "studies.db"
    shutil.copy(empty_sqlite, path)
    drive(f"sqlite:///{path}", number=1)
    return outcome(f"sqlite:///{path}")


def test_an_undisturbed_study_ends_as_expected(undisturbed: dict[str, object]) -> None:
    assert undisturbed["finished"] == NUM_TRIALS
    assert undisturbed["optuna"] == {
        ("COMPLETE", 0): 1,
        ("PRUNED", 1): 1,
        ("FAIL", 2): 1,
        ("PRUNED", 3): 1,
        ("COMPLETE", 4): 1,
    }
    assert undisturbed["open attempts"] == 0


def kill_points(stride: int) -> Iterator[int]:
    return itertools.count(1, stride)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stride",
    [
        pytest.param(67, id="some"),
        # Every point (stride 1) takes five minutes and passed when this was written; 7 takes one.
        pytest.param(7, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_killed_anywhere_it_is_resumed_exactly(
    stride: int, tmp_path: Path, empty_sqlite: Path, undisturbed: dict[str, object]
) -> None:
    for point in kill_points(stride):
        path = tmp_path / f"{point}.db"
        shutil.copy(empty_sqlite, path)
        url = f"sqlite:///{path}"
        if not killed_at(url, point):
            assert point > 100, "the driver makes more statements than that"
            return
        drive(url, number=2)
        assert outcome(url) == undisturbed, f"killed at statement {point}"
        path.unlink()
