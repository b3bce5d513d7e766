"""`autosft train best.yaml`: one configuration, planned anew for the devices that are here.

What changes the result (settings, pinned, data) is kept to the letter; what only changes memory and speed is
decided again, and said.  A run that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from autosft.profiles.dataset.prepared import PreparedData
from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.hardware.leases import Leases
from autosft.profiles.recipe import Precision
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.decide.history import ended_run
from autosft.scheduler.decide.measured_memory import MeasuredMemory
from autosft.scheduler.decide.planner import DoesNotFitError
from autosft.scheduler.decide.self_measuring import capped_at
from autosft.scheduler.events import Note, Observer, TrialEnded, TrialMeasured, TrialStarted
from autosft.scheduler.loop.leasing import MachineLeases
from autosft.scheduler.loop.tuning import StudyFailedError
from autosft.scheduler.setup.inputs import devices_here, devices_named
from autosft.scheduler.setup.prompt_set import PromptSet, prompts_again
from autosft.scheduler.train.config_inputs import models_for, read_inputs
from autosft.scheduler.train.overrides import NOTHING_CHANGED, Changes, with_changes
from autosft.scheduler.train.replan import Replanned, replan
from autosft.scheduler.train.replan import changes as plan_changes
from autosft.scheduler.train.run_state import (
    keep_evaluation,
    kept_evaluations,
    last_checkpoint,
    refuse_another_run,
)
from autosft.scheduler.train.summary import left_out_of, prompt_lines, tell_plan
from autosft.studies.export import Expected, ExportedConfig, read_config
from autosft.studies.files.checkpoints import step_of
from autosft.studies.trial import (
    AttemptEnd,
    ExecutionPlan,
    FailureKind,
    Measurement,
    StopReason,
    TrialJob,
    TrialRecord,
    TrialState,
)
from autosft.workers.processes.starters import WarmServer
from autosft.workers.runners.local_runner import LocalRunner

POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What came of a run, beside what its study had measured."""

    is_complete: bool
    metric: str
    value: float | None  # at the last evaluation
    expected_value: float | None  # of the exported trial, at the same evaluation
    checkpoint: Path | None
    duration_s: float
    best_value: float | None = None  # of those evaluated now, where it was not the last
    best_step: int | None = None
    best_checkpoint: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """The devices that a user names for a run, as the flags have it."""

    hardware: str = "auto"
    gpus: str | None = None
    num_gpus: int | None = None

    @property
    def are_counted(self) -> bool:
        """Whether the user has named several, to be used together, and not only what there is."""
        is_counted = re.match(r"\d+ ?[x×*]", self.hardware) is not None
        return is_counted or self.gpus is not None or self.num_gpus is not None


AUTO = Devices()


def plan_file(path: Path, *, devices: Devices, changes: Changes, observe: Observer) -> Replanned:
    """Say how the configuration in `path` would run on `devices`, which need not be here.

    Raises UserError like `train_file`, and DoesNotFitError with what would fit.
    """
    exported = read_config(path)
    config = with_changes(exported, changes)
    there = devices_named(devices.hardware, devices.gpus, devices.num_gpus).devices
    model, data = read_inputs(config, trust_remote_code=changes.trust_remote_code)
    models = models_for(config, model, data)
    replanned = replan(config, there, models, precision=changes.precision, together=devices.are_counted)
    left_out = left_out_of(there, replanned) if devices.are_counted else ()
    tell_plan(observe, config, replanned, resume_from=None, before=exported.settings, left_out=left_out)
    return replanned


def train_file(
    path: Path,
    *,
    output: Path | None,
    observe: Observer,
    devices: Devices = AUTO,
    changes: Changes = NOTHING_CHANGED,
    stop_requested: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train the configuration in `path` to its end, from its last checkpoint if there is one in `output`.

    What runs out of memory is planned again smaller, as long as there is a smaller plan.  Raises UserError
    when model or data are not what the configuration was found with, or nothing fits; StudyFailedError when
    training itself fails.
    """
    started = time.monotonic()
    exported = read_config(path)
    config = with_changes(exported, changes)
    prompts = prompts_again(config.prompts, config.pinned)
    here = devices_here(devices.hardware, devices.gpus, devices.num_gpus).devices
    with warm_server() as server:
        model, data = read_inputs(config, trust_remote_code=changes.trust_remote_code)
        models = models_for(config, model, data, prompts)
        replanned = replan(config, here, models, precision=changes.precision, together=devices.are_counted)
        folder = (output or path.with_suffix("")).expanduser().resolve()
        job_as = partial(
            job_for,
            config,
            data,
            folder=folder,
            observe=observe,
            prompts=prompts,
            trust_remote_code=changes.trust_remote_code,
        )
        job = job_as(replanned)
        tell_plan(
            observe,
            config,
            replanned,
            resume_from=job.resume_from,
            before=exported.settings,
            prompts=prompt_lines(config, prompts, replanned.plan),
            left_out=left_out_of(here, replanned) if devices.are_counted else (),
        )
        end, evaluations = run_job(job, config, server, replanned.devices, observe, stop_requested)
    measured = models.costs.measured
    while end.failure is not None and end.failure.is_out_of_device_memory:
        measured = measured.with_run(ended_run(job, end))
        smaller = planned_smaller(config, replanned, models, end, measured, precision=changes.precision)
        if smaller is None:
            break
        words = "; ".join((*plan_changes(replanned.plan, smaller.plan), smaller.plan.reason))
        observe(Note(message=f"It ran out of memory and is planned again: {words}"))
        replanned = smaller
        job = job_as(replanned)
        with warm_server() as server:
            end, evaluations = run_job(job, config, server, replanned.devices, observe, stop_requested)
    if end.failure is not None:
        raise StudyFailedError(f"{end.message} The log is {end.log_path}.")
    last = evaluations[-1] if evaluations else None
    best = best_of(evaluations, config.expected)
    has_better = best is not None and best is not last
    return TrainingResult(
        is_complete=end.completed,
        metric=config.expected.metric,
        value=None if last is None else last.metric(config.expected.metric),
        expected_value=config.expected.final_value if config.settings == exported.settings else None,
        checkpoint=None if last is None or last.checkpoint is None else Path(last.checkpoint),
        duration_s=time.monotonic() - started,
        best_value=best.metric(config.expected.metric) if best and has_better else None,
        best_step=best.step if best and has_better else None,
        best_checkpoint=Path(best.checkpoint) if best and has_better and best.checkpoint else None,
    )


def best_of(evaluations: Sequence[Measurement], expected: Expected) -> Measurement | None:
    """Return the evaluation with the best value of the metric, of equal ones the last."""
    scored = [one for one in evaluations if one.metric(expected.metric) is not None]
    sign = 1.0 if expected.minimize else -1.0
    return min(reversed(scored), key=lambda one: sign * (one.metric(expected.metric) or 0.0), default=None)


def planned_smaller(
    config: ExportedConfig,
    replanned: Replanned,
    models: Models,
    end: AttemptEnd,
    measured: MeasuredMemory,
    *,
    precision: Precision | None,
) -> Replanned | None:
    """Return the plan that comes after one that ran out of memory, None where none is left."""
    eval_micro_batch = replanned.plan.eval_micro_batch
    if end.failure is FailureKind.EVALUATION_OUT_OF_MEMORY:
        eval_micro_batch = max(1, replanned.pinned.eval_micro_batch // 2)
    try:
        return replan(
            config,
            replanned.devices,
            models,
            precision=precision,
            together=len(replanned.devices) > 1,
            measured=measured,
            eval_micro_batch=eval_micro_batch,
        )
    except DoesNotFitError:
        return None


@contextmanager
def warm_server() -> Iterator[WarmServer]:
    """Start the process that attempts are forked from; nothing of it is left afterwards."""
    server = WarmServer()
    try:
        yield server
    finally:
        server.close()


def job_for(
    config: ExportedConfig,
    data: PreparedData,
    replanned: Replanned,
    folder: Path,
    *,
    observe: Observer,
    prompts: PromptSet | None,
    trust_remote_code: bool,
) -> TrialJob:
    """Return the attempt to run: the first one, or the next after one that was interrupted."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to ({error.strerror}).") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output {folder}: cannot be written to.", remedy="Choose another folder.")
    refuse_another_run(folder, config)
    last = last_checkpoint(folder, observe)
    return TrialJob(
        study=config.study,
        trial=config.trial,
        attempt=1 + len(list(folder.glob("attempt-*.log"))),
        model=config.model.name,
        data_dir=str(data.path),
        output_dir=str(folder),
        settings=config.settings,
        pinned=replanned.pinned,
        plan=as_free_now(replanned),
        device_uuids=tuple(one.uuid for one in replanned.devices),
        resume_from=None if last is None else str(last),
        save_resume_state=True,
        trust_remote_code=trust_remote_code,
        scoring=None if prompts is None else prompts.written_to(folder),
    )


def as_free_now(replanned: Replanned) -> ExecutionPlan:
    """Return the plan under a cap of what is free at this moment, where it takes its devices whole.

    Raises UserError where others hold too much of one.
    """
    plan = replanned.plan
    if not plan.measures_itself:
        return plan
    leases = MachineLeases(Leases())
    for device in replanned.devices:
        free = capped_at(plan, device, leases.available_bytes(device))
        if free is None:
            raise UserError(leases.holders(device), remedy="Try again when it has ended.")
        plan = free
    return plan


def run_job(
    job: TrialJob,
    config: ExportedConfig,
    server: WarmServer,
    devices: Sequence[DeviceProfile],
    observe: Observer,
    stop_requested: Callable[[], bool],
) -> tuple[AttemptEnd, list[Measurement]]:
    """Run one attempt to its end; on the user's wish it saves a checkpoint and ends.

    Returned are its evaluations after those of the attempts that it goes on from.
    """
    record = record_of(job, config)
    folder = Path(job.output_dir)
    done = 0 if job.resume_from is None else step_of(Path(job.resume_from))
    evaluations = kept_evaluations(folder, up_to=done)
    is_stopping = False
    number = f"{len(devices)} x " if len(devices) > 1 else ""
    with ExitStack() as stack:
        stack.enter_context(leased(job, devices))
        runner = LocalRunner(server)
        stack.callback(runner.close, grace_s=0.0)
        names = (f"{number}{devices[0].name}",)
        observe(TrialStarted(record=record, attempt=job.attempt, device_names=names))
        runner.run(job)
        while True:
            if stop_requested() and not is_stopping:
                is_stopping = True
                observe(Note(message="Stopping: a checkpoint is saved; the same command goes on from it."))
                runner.stop(job.trial, job.attempt, StopReason.SHUTDOWN)
            for event in runner.events(POLL_S):
                if isinstance(event, AttemptEnd):
                    observe(TrialEnded(record=ended_record(record, event, evaluations)))
                    return event, evaluations
                observe(TrialMeasured(measurement=event))
                if event.is_evaluation:
                    evaluations.append(event)
                    keep_evaluation(folder, event)


@contextmanager
def leased(job: TrialJob, devices: Sequence[DeviceProfile]) -> Iterator[None]:
    """Hold what a job needs of its devices, all of them or none.  Raises UserError where others hold it."""
    leases = MachineLeases(Leases())
    with ExitStack() as stack:
        for device in devices:
            lease = leases.acquire(
                device,
                job.plan.booked_bytes,
                num_threads=job.plan.num_threads,
                study=job.study,
                trial=job.trial,
                until=time.time() + job.plan.predicted_duration_s,
            )
            if lease is None:
                raise UserError(leases.holders(device), remedy="Try again when it has ended.")
            stack.enter_context(lease)
        yield


def record_of(job: TrialJob, config: ExportedConfig) -> TrialRecord:
    """Return the run as a trial, for those who watch it."""
    return TrialRecord(
        number=job.trial,
        state=TrialState.RUNNING,
        settings=job.settings,
        parameters=(("learning_rate", config.settings.learning_rate),),
        origin="enqueued",
        plan=job.plan,
        num_attempts=job.attempt,
        value=None,
        best_step=None,
        best_checkpoint=None,
        failure=None,
        message="",
        measurements=(),
        started_at=time.time(),
        finished_at=None,
    )


def ended_record(record: TrialRecord, end: AttemptEnd, evaluations: list[Measurement]) -> TrialRecord:
    """Return the record of a run that has ended."""
    state = TrialState.COMPLETED if end.completed else TrialState.WAITING
    return replace(
        record,
        state=TrialState.FAILED if end.failure else state,
        failure=end.failure,
        message=end.message,
        measurements=tuple(evaluations),
        finished_at=time.time(),
    )
