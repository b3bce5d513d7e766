"""One attempt at training a configuration: its job, its leases, and its reports until it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from autosft.profiles.dataset.prepared import PreparedData
from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.hardware.leases import Leases
from autosft.profiles.units import gib
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.decide.self_measuring import capped_at
from autosft.scheduler.events import Note, Observer, TrialEnded, TrialMeasured, TrialStarted, Waiting
from autosft.scheduler.loop.leasing import MachineLeases
from autosft.scheduler.setup.prompt_set import PromptSet
from autosft.scheduler.train.overrides import Overrides
from autosft.scheduler.train.replan import Replanned
from autosft.scheduler.train.run_state import (
    keep_evaluation,
    kept_evaluations,
    last_checkpoint,
    refuse_another_run,
)
from autosft.studies.export import ExportedConfig
from autosft.studies.files.checkpoints import step_of
from autosft.studies.trial import (
    AttemptEnd,
    ExecutionPlan,
    Measurement,
    StopReason,
    TrialJob,
    TrialRecord,
    TrialState,
)
from autosft.workers.processes.starters import WarmServer
from autosft.workers.runners.local_runner import LocalRunner

POLL_S = 0.5
#: How often the user is told what is waited for.
NOTICE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingInputs:
    """The inputs of a training run, independent of its plan."""

    config: ExportedConfig  # with the user's overrides
    data: PreparedData
    models: Models  # of memory and time
    folder: Path  # of the run
    prompts: PromptSet | None  # prompts that checkpoints answer
    overrides: Overrides


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of an attempt."""

    job: TrialJob
    end: AttemptEnd
    evaluations: tuple[Measurement, ...]  # including those of the attempts that it resumed


@contextmanager
def warm_server() -> Iterator[WarmServer]:
    """Start the process that attempts are forked from; end it with the block."""
    server = WarmServer()
    try:
        yield server
    finally:
        server.close()


def next_job(
    inputs: TrainingInputs,
    replanned: Replanned,
    observe: Observer,
    stop_requested: Callable[[], bool] = lambda: False,
) -> TrialJob:
    """Return the attempt to run: the first one, or the one after an interrupted one.

    Raises UserError for a folder that cannot be written to or that holds another run.
    """
    config, folder = inputs.config, inputs.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to ({error.strerror}).") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output {folder}: cannot be written to.", remedy="Choose another folder.")
    refuse_another_run(folder, config)
    checkpoint = last_checkpoint(folder, observe)
    return TrialJob(
        study=config.study,
        trial=config.trial,
        attempt=1 + len(list(folder.glob("attempt-*.log"))),
        model=config.model.name,
        data_dir=str(inputs.data.path),
        output_dir=str(folder),
        settings=config.settings,
        pinned=replanned.pinned,
        plan=capped_at_free_memory(replanned, observe=observe, stop_requested=stop_requested),
        device_uuids=tuple(device.uuid for device in replanned.devices),
        resume_from=None if checkpoint is None else str(checkpoint),
        save_resume_state=True,
        trust_remote_code=inputs.overrides.trust_remote_code,
        scoring=None if inputs.prompts is None else inputs.prompts.written_to(folder),
    )


def capped_at_free_memory(
    replanned: Replanned,
    *,
    observe: Observer,
    stop_requested: Callable[[], bool],
    sleep: Callable[[float], None] = time.sleep,
) -> ExecutionPlan:
    """Return the plan, capped at what is free now if it needs its devices to itself.

    Waits while others hold too much of one; if the user wants to stop, the plan is returned unchanged.
    """
    plan = replanned.plan
    if not plan.measures_itself:
        return plan
    leases = MachineLeases(Leases())
    told_at = float("-inf")
    for device in replanned.devices:
        while (capped := capped_at(plan, device, leases.available_bytes(device))) is None:
            if stop_requested():
                return replanned.plan
            if time.monotonic() - told_at >= NOTICE_S:
                told_at = time.monotonic()
                observe(Waiting(message=leases.holders(device)))
            sleep(POLL_S)
        plan = capped
    return plan


def run_attempt(
    job: TrialJob,
    inputs: TrainingInputs,
    devices: Sequence[DeviceProfile],
    server: WarmServer,
    *,
    observe: Observer,
    stop_requested: Callable[[], bool],
) -> Outcome:
    """Run an attempt to its end; if the user wants to stop, it saves a checkpoint and ends."""
    record = record_of(job, inputs.config)
    done = 0 if job.resume_from is None else step_of(Path(job.resume_from))
    evaluations = kept_evaluations(inputs.folder, up_to=done)
    number = f"{len(devices)} x " if len(devices) > 1 else ""
    names = (f"{number}{devices[0].name}",)
    with ExitStack() as stack:
        leases = lease_or_wait(job, devices, observe=observe, stop_requested=stop_requested)
        if leases is None:
            return Outcome(job=job, end=left_waiting(job), evaluations=tuple(evaluations))
        stack.enter_context(leases)
        runner = LocalRunner(server)
        stack.callback(runner.close, grace_s=0.0)
        observe(TrialStarted(record=record, attempt=job.attempt, device_names=names))
        runner.run(job)
        for event in events_until_stopped(runner, job, observe=observe, stop_requested=stop_requested):
            if isinstance(event, AttemptEnd):
                observe(TrialEnded(record=ended_record(record, event, evaluations)))
                return Outcome(job=job, end=event, evaluations=tuple(evaluations))
            observe(TrialMeasured(measurement=event))
            if event.is_evaluation:
                evaluations.append(event)
                keep_evaluation(inputs.folder, event)
    raise AssertionError("an attempt ends")


def events_until_stopped(
    runner: LocalRunner, job: TrialJob, *, observe: Observer, stop_requested: Callable[[], bool]
) -> Iterator[Measurement | AttemptEnd]:
    """Yield an attempt's reports, without end; ask it to stop if the user wants to stop."""
    is_stopping = False
    while True:
        if stop_requested() and not is_stopping:
            is_stopping = True
            observe(Note(message="Stopping: saving a checkpoint; the same command resumes from it."))
            runner.stop(job.trial, job.attempt, StopReason.SHUTDOWN)
        yield from runner.events(POLL_S)


def lease_or_wait(
    job: TrialJob,
    devices: Sequence[DeviceProfile],
    *,
    observe: Observer,
    stop_requested: Callable[[], bool],
    sleep: Callable[[float], None] = time.sleep,
) -> ExitStack | None:
    """Lease what a job needs on all of its devices; closing the returned stack releases it.

    Waits in order of arrival, as studies do, and reports for whom.  Returns None if the user wants to stop.
    Raises UserError if waiting would not help.
    """
    broker = MachineLeases(Leases())
    told_at = float("-inf")
    while not stop_requested():
        stack = ExitStack()
        for device in devices:
            lease = broker.acquire(
                device,
                job.plan.booked_bytes,
                num_threads=job.plan.num_threads,
                study=job.study,
                trial=job.trial,
                until=time.time() + job.plan.predicted_duration_s,
            )
            if lease is None:
                break
            stack.enter_context(lease)
        else:
            return stack
        stack.close()
        most = broker.most_bytes(device)
        if job.plan.booked_bytes > most:
            raise UserError(
                f"the plan needs {gib(job.plan.booked_bytes)}; {device.name} has {gib(device.total_bytes)}, "
                f"of which autosft itself takes {gib(device.total_bytes - most)}.",
                remedy="Use a smaller --seq-len, --effective-batch-size or --method lora, or allow it more.",
            )
        if time.monotonic() - told_at >= NOTICE_S:
            told_at = time.monotonic()
            observe(Waiting(message=broker.holders(device)))
        sleep(POLL_S)
    return None


def left_waiting(job: TrialJob) -> AttemptEnd:
    """Return the end of an attempt that was left before its devices were free."""
    return AttemptEnd(
        trial=job.trial,
        attempt=job.attempt,
        completed=False,
        stopped=StopReason.SHUTDOWN,
        failure=None,
        message="stopped while it waited for its devices",
        log_path=None,
        peak_allocated_bytes=None,
        peak_reserved_bytes=None,
        duration_s=0.0,
        eval_fingerprint=None,
    )


def record_of(job: TrialJob, config: ExportedConfig) -> TrialRecord:
    """Return the run as a trial, for observers."""
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


def ended_record(record: TrialRecord, end: AttemptEnd, evaluations: Sequence[Measurement]) -> TrialRecord:
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
