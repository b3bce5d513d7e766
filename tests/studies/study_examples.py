"""Values that the tests of studies share."""

from __future__ import annotations

import dataclasses
from typing import Any

from autosft.profiles.recipe import Method, Precision
from autosft.studies.search.space import FixedSettings, SearchSpace, default_space
from autosft.studies.store.records import Direction, Driver, Records, StudyRecords, StudySpec
from autosft.studies.trial import AttemptEnd, FailureKind, Measurement, PinnedSettings
from tests.plans import GIB, execution_plan

PINNED = PinnedSettings(
    precision=Precision.FP32,
    tf32=False,
    attention="sdpa",
    eval_seq_len=128,
    eval_micro_batch=8,
    eval_fingerprint="e" * 64,
    num_evaluations=4,
)

PLAN = execution_plan()


def space(**changes: Any) -> SearchSpace:
    made = default_space(
        method=Method.FULL,
        num_parameters=135_000_000,
        num_train_examples=10_000,
        seq_lens=[128],
        effective_batch_sizes=[8, 16, 32, 64, 128],
    )
    return made.changed(**changes)


def spec(name: str = "study", **changes: Any) -> StudySpec:
    made = StudySpec(
        name=name,
        metric="eval_loss",
        direction=Direction.MINIMIZE,
        model="models/tiny",
        model_fingerprint="m" * 64,
        data="data.jsonl",
        data_fingerprint="d" * 64,
        pinned=PINNED,
        fixed=FixedSettings(num_train_examples=10_000),
        space=space(),
        seed=0,
        num_trials=30,  # TPE: a Gaussian process takes its time
        environment={"versions": {"torch": "2.13"}},
    )
    return dataclasses.replace(made, **changes)


def driver(number: int = 1) -> Driver:
    """A driver on another host: alive until its heartbeat is old."""
    return Driver(host=f"host-{number}", pid=number, pid_started_at=0.0)


def opened(records: Records, *, now: float = 0.0, number: int = 1, **changes: Any) -> StudyRecords:
    """Open a study as a driver does."""
    study = records.open_study(spec(**changes), now=now)
    study.take_over(driver(number), now=now)
    study.recover(now=now)
    return study


def evaluation(
    trial: int, attempt: int, number: int, loss: float = 1.0, *, checkpoint: str | None = None
) -> Measurement:
    return Measurement(
        trial=trial,
        attempt=attempt,
        step=number * 10,
        num_steps=40,
        num_tokens=number * 1000,
        loss=loss,
        grad_norm=1.0,
        learning_rate=1e-4,
        tokens_per_s=9e3,
        peak_allocated_bytes=2 * GIB,
        peak_reserved_bytes=None,
        metrics=(("eval_loss", loss), ("eval_tokens", 500.0)),
        evaluation=number,
        checkpoint=checkpoint,
        elapsed_s=number * 1.0,
    )


def progress(trial: int, attempt: int, step: int) -> Measurement:
    made = evaluation(trial, attempt, 1)
    return dataclasses.replace(made, step=step, metrics=(), evaluation=None)


def end(trial: int, attempt: int, *, failure: FailureKind | None = None, **changes: Any) -> AttemptEnd:
    made = AttemptEnd(
        trial=trial,
        attempt=attempt,
        completed=failure is None and "stopped" not in changes,
        stopped=None,
        failure=failure,
        message="" if failure is None else f"it was {failure.value}",
        log_path=None,
        peak_allocated_bytes=2 * GIB,
        peak_reserved_bytes=None,
        duration_s=4.0,
        eval_fingerprint="e" * 64,
    )
    return dataclasses.replace(made, **changes)


def start(study: StudyRecords, trial: int, *, now: float = 0.0) -> int:
    return study.begin_attempt(trial, plan=PLAN, device_uuids=("GPU-0",), now=now)
