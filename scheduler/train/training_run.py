"""`autosft train best.yaml`: a single configuration, replanned for the available devices.

What changes the result (settings, pinned, data) is kept exactly; what only changes memory and speed is
decided again, and reported.  An interrupted run resumes from its last checkpoint.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from autosft.profiles.errors import StudyFailedError
from autosft.scheduler.decide.history import ended_run
from autosft.scheduler.decide.measured_memory import MeasuredMemory
from autosft.scheduler.decide.planner import DoesNotFitError
from autosft.scheduler.events import Note, Observer
from autosft.scheduler.setup.export_check import require_exportable
from autosft.scheduler.setup.inputs import devices_here, devices_named
from autosft.scheduler.setup.prompt_set import prompts_again
from autosft.scheduler.train.attempt import Outcome, TrainingInputs, next_job, run_attempt, warm_server
from autosft.scheduler.train.config_inputs import models_for, read_inputs, require_trust
from autosft.scheduler.train.overrides import NO_OVERRIDES, Overrides, with_overrides
from autosft.scheduler.train.replan import Replanned, plan_changes, replan
from autosft.scheduler.train.summary import prompt_lines, run_opened, unused_devices
from autosft.studies.export import Expected, ExportedConfig, read_config, write_config
from autosft.studies.files.model_folder import install_model
from autosft.studies.trial import AttemptEnd, FailureKind, Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """The result of a run, next to what its study measured."""

    is_complete: bool
    metric: str
    value: float | None  # at the last evaluation
    expected_value: float | None  # of the exported trial, at the same evaluation
    checkpoint: Path | None
    duration_s: float
    best_value: float | None = None  # over the evaluations of this run, if it was not the last
    best_step: int | None = None
    best_checkpoint: Path | None = None
    model: Path | None = None  # a model folder of the best weights, once the run is complete


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """The devices that a user selects for a run, as on the command line."""

    hardware: str = "auto"
    gpus: str | None = None
    num_gpus: int | None = None

    @property
    def are_counted(self) -> bool:
        """Whether the user selected several devices, to be used together."""
        is_counted = re.match(r"\d+ ?[x×*]", self.hardware) is not None
        return is_counted or self.gpus is not None or self.num_gpus is not None


AUTO = Devices()


def plan_file(
    path: Path,
    *,
    devices: Devices,
    overrides: Overrides,
    observe: Observer,
    storage: str | None = None,
    export: str | None = None,
) -> Replanned:
    """Report to `observe` how the configuration in `path` would run on `devices`, which need not be present.

    Raises UserError like `train_file`, and DoesNotFitError with what would fit.
    """
    exported = read_config(path)
    config = with_overrides(exported, overrides)
    require_trust(config, path, trust_remote_code=overrides.trust_remote_code)
    named = devices_named(devices.hardware, devices.gpus, devices.num_gpus).devices
    model, data = read_inputs(config, trust_remote_code=overrides.trust_remote_code)
    require_exportable(export, model.source, trust_remote_code=overrides.trust_remote_code, observe=observe)
    models = models_for(config, model, data, storage=storage)
    replanned = replan(config, named, models, precision=overrides.precision, together=devices.are_counted)
    unused = unused_devices(named, replanned) if devices.are_counted else ()
    observe(run_opened(config, replanned, before=exported.settings, unused=unused))
    return replanned


def train_file(
    path: Path,
    *,
    output: Path | None,
    observe: Observer,
    devices: Devices = AUTO,
    overrides: Overrides = NO_OVERRIDES,
    storage: str | None = None,
    export: str | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train the configuration in `path` to its end, resuming from the last checkpoint in `output`, if any.

    At its end, the top of the folder holds the best weights, everything needed to load them, and the
    configuration.  If it runs out of memory, it is replanned smaller while there is a smaller plan.
    `export` names a format that the model will be exported in, which is checked first.  Raises UserError if
    model or data are not those that the configuration was found with, if nothing fits, or if the model
    cannot be exported; StudyFailedError if training itself fails.
    """
    started = time.monotonic()
    exported = read_config(path)
    config = with_overrides(exported, overrides)
    require_trust(config, path, trust_remote_code=overrides.trust_remote_code)
    prompts = prompts_again(config)
    here = devices_here(devices.hardware, devices.gpus, devices.num_gpus).devices
    folder = (output or path.with_suffix("")).expanduser().resolve()
    run_job = partial(run_attempt, observe=observe, stop_requested=stop_requested)
    with warm_server() as server:
        model, data = read_inputs(config, trust_remote_code=overrides.trust_remote_code)
        require_exportable(
            export, model.source, trust_remote_code=overrides.trust_remote_code, observe=observe
        )
        inputs = TrainingInputs(
            config=config,
            data=data,
            models=models_for(config, model, data, prompts, storage=storage),
            folder=folder,
            prompts=prompts,
            overrides=overrides,
        )
        replanned = replan(
            config, here, inputs.models, precision=overrides.precision, together=devices.are_counted
        )
        job = next_job(inputs, replanned, observe, stop_requested)
        observe(
            run_opened(
                config,
                replanned,
                before=exported.settings,
                unused=unused_devices(here, replanned) if devices.are_counted else (),
                prompts=prompt_lines(config, prompts, replanned.plan),
                resume_from=job.resume_from,
            )
        )
        outcome = run_job(job, inputs, replanned.devices, server)
    outcome = retry_smaller(
        outcome, replanned, inputs, run_job=run_job, observe=observe, stop_requested=stop_requested
    )
    if outcome.end.failure is not None:
        raise StudyFailedError(f"{outcome.end.message} The log is {outcome.end.log_path}.")
    result = training_result(outcome, exported, config, duration_s=time.monotonic() - started)
    best = result.best_checkpoint or result.checkpoint
    if not result.is_complete or best is None:
        return result
    install_model(best, folder)
    write_config(folder / "best.yaml", config)
    return replace(result, model=folder)


def retry_smaller(
    outcome: Outcome,
    replanned: Replanned,
    inputs: TrainingInputs,
    *,
    run_job: Callable[..., Outcome],
    observe: Observer,
    stop_requested: Callable[[], bool],
) -> Outcome:
    """After an attempt that ran out of memory, run others with smaller plans while there are any."""
    memory = inputs.models.costs.measured
    while outcome.end.failure is not None and outcome.end.failure.is_out_of_device_memory:
        memory = memory.with_run(ended_run(outcome.job, outcome.end))
        smaller = plan_smaller(outcome.end, replanned, inputs, memory)
        if smaller is None:
            break
        changes = "; ".join((*plan_changes(replanned.plan, smaller.plan), smaller.plan.reason))
        observe(Note(message=f"It ran out of memory and is replanned: {changes}"))
        replanned = smaller
        job = next_job(inputs, replanned, observe, stop_requested)
        with warm_server() as server:
            outcome = run_job(job, inputs, replanned.devices, server)
    return outcome


def plan_smaller(
    end: AttemptEnd, replanned: Replanned, inputs: TrainingInputs, memory: MeasuredMemory
) -> Replanned | None:
    """Return the plan to try after one that ran out of memory, None if there is none left."""
    eval_micro_batch = replanned.plan.eval_micro_batch
    if end.failure is FailureKind.EVALUATION_OUT_OF_MEMORY:
        eval_micro_batch = max(1, replanned.pinned.eval_micro_batch // 2)
    try:
        return replan(
            inputs.config,
            replanned.devices,
            inputs.models,
            precision=inputs.overrides.precision,
            together=len(replanned.devices) > 1,
            measured=memory,
            eval_micro_batch=eval_micro_batch,
        )
    except DoesNotFitError:
        return None


def training_result(
    outcome: Outcome, exported: ExportedConfig, config: ExportedConfig, *, duration_s: float
) -> TrainingResult:
    """Return the result of a run; a value is expected only with the file's own settings."""
    expected = config.expected
    last = outcome.evaluations[-1] if outcome.evaluations else None
    best = best_of(outcome.evaluations, expected)
    better = None if best is last else best
    return TrainingResult(
        is_complete=outcome.end.completed,
        metric=expected.metric,
        value=None if last is None else last.metric(expected.metric),
        expected_value=expected.final_value if config.settings == exported.settings else None,
        checkpoint=None if last is None or last.checkpoint is None else Path(last.checkpoint),
        duration_s=duration_s,
        best_value=None if better is None else better.metric(expected.metric),
        best_step=None if better is None else better.step,
        best_checkpoint=None if better is None or better.checkpoint is None else Path(better.checkpoint),
    )


def best_of(evaluations: Sequence[Measurement], expected: Expected) -> Measurement | None:
    """Return the evaluation with the best value of the metric, the last one in a tie."""
    scored = [report for report in evaluations if report.metric(expected.metric) is not None]
    sign = 1.0 if expected.minimize else -1.0
    return min(
        reversed(scored), key=lambda report: sign * (report.metric(expected.metric) or 0.0), default=None
    )
