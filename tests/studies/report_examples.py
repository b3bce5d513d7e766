"""Reports of any size, made up.

`python -m tests.studies.report_examples NUM_TRIALS NUM_PARAMETERS FILE` writes one.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from pathlib import Path

from autosft.profiles.recipe import ByteRange
from autosft.studies.report import Answer, StudyReport, write_report
from autosft.studies.results.summary import summarise
from autosft.studies.search.space import SearchSpace, default_parameters, settings_from
from autosft.studies.trial import FailureKind, Measurement, TrialRecord, TrialState
from autosft.studies.values import AttemptRecord
from tests.studies import study_examples

GIB = 2**30
START = 1_790_000_000.0


def made_up_report(num_trials: int, num_parameters: int = 6, *, seed: int = 0) -> StudyReport:
    """Return a study with every kind of end in it, once it has five trials."""
    rng = random.Random(seed)
    spec = study_examples.spec("llama-alpaca", num_trials=num_trials)
    trials, attempts, at = [], {}, START
    for number in range(num_trials):
        trial, tried = made_up_trial(number, spec.space, num_parameters, rng, start=at)
        trials.append(trial)
        attempts[number] = tried
        at += 40.0 if number % 2 else 1.0
    summary = summarise(trials, lambda trial, evaluation: None, metric=spec.metric, maximize=False)
    names = [name for name, _ in trials[0].parameters] if trials else []
    return StudyReport(
        spec=spec,
        trials=tuple(trials),
        attempts_by_trial=attempts,
        summary=summary,
        importances=tuple((name, 0.5**i) for i, name in enumerate(names, start=1)) if num_trials > 8 else (),
        training=tuple(
            (
                trial.number,
                tuple(progress(trial.number, step, 2.0 + trial.number / 10) for step in range(1, 101)),
            )
            for trial in (summary.best, summary.default)
            if trial is not None
        ),
        answers=(
            Answer(
                prompt="Name three <b>primary</b> colours.",
                expected="Red, yellow and blue.",
                answers=(("base", "colours colours colours"), ("best", "Red, blue and yellow.")),
            ),
        ),
        database="sqlite:////home/ada/studies.db",
        written_at=at + 100.0,
    )


def made_up_trial(
    number: int, space: SearchSpace, num_parameters: int, rng: random.Random, *, start: float
) -> tuple[TrialRecord, tuple[AttemptRecord, ...]]:
    rate = 10 ** rng.uniform(-4.8, -3)
    parameters = {**default_parameters(space), "learning_rate": rate, "warmup_ratio": rng.randrange(10) / 50}
    parameters["lr_scheduler"] = rng.choice(["cosine", "linear", "constant_with_warmup"])
    settings = settings_from(space, parameters, study_examples.spec().fixed)
    parameters |= {f"made_up_{i}": rng.random() for i in range(num_parameters - len(parameters))}
    state, failure = TrialState.COMPLETED, None
    if number % 5 == 2:
        state = TrialState.STOPPED
    elif number % 11 == 3:
        state, failure = TrialState.INFEASIBLE, FailureKind.OUT_OF_MEMORY
    elif number % 29 == 4:
        state, failure = TrialState.FAILED, FailureKind.ERROR
    worst = 1.2 + 0.3 * abs(math.log10(rate) + 4) + 0.1 * rng.random()
    num_evaluations = {TrialState.COMPLETED: 4, TrialState.STOPPED: 1 + number % 3}.get(state, 0)
    measurements = tuple(
        dataclasses.replace(
            study_examples.evaluation(number, 1, i, worst + 1.5 / (i + 1)), peak_allocated_bytes=None
        )
        for i in range(1, num_evaluations + 1)
    )
    median = int((1.5 + rng.random()) * GIB)
    estimate = dataclasses.replace(
        study_examples.PLAN.estimate,
        allocated=ByteRange(median_bytes=median, upper_bytes=int(median * 1.2)),
    )
    plan = dataclasses.replace(study_examples.PLAN, estimate=estimate)
    peak = int(median * rng.uniform(0.93, 1.1))
    duration = 35.0 * (num_evaluations or 1) / 4
    attempt = AttemptRecord(
        trial=number,
        number=1,
        device_name="NVIDIA A100 80GB",
        device_uuids=(f"GPU-{number % 2}",),
        started_at=start,
        ended_at=start + duration,
        outcome=failure.value if failure else "pruned" if state is TrialState.STOPPED else "completed",
        message="",
        log_path=None,
        predicted_bytes=estimate.total_bytes,
        peak_allocated_bytes=peak,
        peak_reserved_bytes=None,
    )
    values = [measurement.metric("eval_loss") for measurement in measurements]
    trial = TrialRecord(
        number=number,
        state=state,
        settings=settings,
        parameters=tuple(parameters.items()),
        origin="default" if number == 0 else "sampler",
        plan=plan,
        num_attempts=1,
        value=values[-1] if values else None,
        best_step=measurements[-1].step if measurements else None,
        best_checkpoint=None,
        failure=failure,
        message="" if failure is None else "</script> needed 3.1 GiB",
        measurements=measurements,
        started_at=start,
        finished_at=start + duration,
    )
    return trial, (attempt,)


def progress(trial: int, step: int, start: float) -> Measurement:
    made = study_examples.progress(trial, 1, step)
    return dataclasses.replace(made, num_tokens=step * 100, loss=start / math.sqrt(step))


if __name__ == "__main__":
    write_report(Path(sys.argv[3]), made_up_report(int(sys.argv[1]), int(sys.argv[2])))
