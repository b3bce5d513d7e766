"""`autosft train best.yaml`: one configuration, planned anew for the devices that are here.

What changes the result (settings, pinned, data) is kept to the letter; what only changes memory and speed is
decided again, and said.  A run that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autosft.profiles.dataset.prepare import prepare
from autosft.profiles.dataset.prepared import PreparedData
from autosft.profiles.errors import UserError
from autosft.profiles.hardware import DeviceProfile
from autosft.profiles.leases import Leases
from autosft.profiles.model import ModelProfile, load_model_profile
from autosft.scheduler import planner
from autosft.scheduler.design import Models
from autosft.scheduler.events import Note, Observer, StudyOpened, TrialEnded, TrialMeasured, TrialStarted
from autosft.scheduler.leasing import MachineLeases
from autosft.scheduler.setup import cache_folder, devices_here
from autosft.scheduler.tuning import StudyFailedError, usable_bytes
from autosft.studies.checkpoints import checkpoint_dir, verify
from autosft.studies.export import ExportedConfig, read_config
from autosft.studies.trial import (
    AttemptEnd,
    ExecutionPlan,
    Measurement,
    StopReason,
    TrialJob,
    TrialRecord,
    TrialState,
)
from autosft.workers.local import LocalRunner
from autosft.workers.process import WarmServer

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


def train_file(
    path: Path,
    *,
    hardware: str,
    output: Path | None,
    observe: Observer,
    stop_requested: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train the configuration in `path` to its end, from its last checkpoint if there is one in `output`.

    Raises UserError when model or data are not what the configuration was found with, or nothing fits;
    StudyFailedError when training itself fails.
    """
    started = time.monotonic()
    config = read_config(path)
    device = devices_here(hardware).devices[0]
    with warm_server() as server:
        model, data = read_inputs(config)
        models = Models(model, data, config.pinned.num_evaluations, cache_dir=cache_folder() / "memory")
        plan = plan_here(config, device, models)
        folder = (output or path.with_suffix("")).expanduser().resolve()
        job = job_for(config, data, plan, device, folder)
        tell_plan(observe, config, plan, job)
        end, evaluations = run_job(job, config, server, device, observe, stop_requested)
    if end.failure is not None:
        raise StudyFailedError(f"{end.message} The log is {end.log_path}.")
    last = evaluations[-1] if evaluations else None
    return TrainingResult(
        is_complete=end.completed,
        metric=config.expected.metric,
        value=None if last is None else last.metric(config.expected.metric),
        expected_value=config.expected.final_value,
        checkpoint=None if last is None or last.checkpoint is None else Path(last.checkpoint),
        duration_s=time.monotonic() - started,
    )


@contextmanager
def warm_server() -> Iterator[WarmServer]:
    """Start the process that attempts are forked from; nothing of it is left afterwards."""
    server = WarmServer()
    try:
        yield server
    finally:
        server.close()


def read_inputs(config: ExportedConfig) -> tuple[ModelProfile, PreparedData]:
    """Read model and data and refuse others than the configuration was found with."""
    model = load_model_profile(config.model.name)
    if model.fingerprint != config.model.fingerprint:
        raise UserError(
            f"{config.model.name} is not the model that this configuration was found with "
            f"(sha256 {model.fingerprint[:12]}…, expected {config.model.fingerprint[:12]}…).",
            remedy="Point `model: name:` in the file at the original weights.",
        )
    options: dict[str, Any] = dict(config.data.options or {})
    data = prepare(
        config.data.source,
        model=config.model.name,
        cache_dir=cache_folder() / "data",
        max_positions=model.max_positions or None,
        **options,
    )
    if data.fingerprint != config.data.fingerprint:
        raise UserError(
            f"{config.data.source} is not the data that this configuration was found with "
            f"(sha256 {data.fingerprint[:12]}…, expected {config.data.fingerprint[:12]}…).",
            remedy="Use the original data; versions of the tokenizer's libraries count too.",
        )
    return model, data


def plan_here(config: ExportedConfig, device: DeviceProfile, models: Models) -> ExecutionPlan:
    """Plan the configuration for a device of this machine.  Raises DoesNotFitError."""
    return planner.plan(
        config.settings,
        config.pinned,
        device=device,
        budget_bytes=usable_bytes(device),
        num_threads=config.plan.num_threads if config.plan else max(1, device.num_cores),
        estimate=models.estimate,
        speed=models.speed,
    )


def job_for(
    config: ExportedConfig, data: PreparedData, plan: ExecutionPlan, device: DeviceProfile, folder: Path
) -> TrialJob:
    """Return the attempt to run: the first one, or the next after one that was interrupted."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to ({error.strerror}).") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output {folder}: cannot be written to.", remedy="Choose another folder.")
    last = last_checkpoint(folder)
    return TrialJob(
        study=config.study,
        trial=config.trial,
        attempt=1 + len(list(folder.glob("attempt-*.log"))),
        model=config.model.name,
        data_dir=str(data.path),
        output_dir=str(folder),
        settings=config.settings,
        pinned=config.pinned,
        plan=plan,
        device_uuids=(device.uuid,),
        resume_from=None if last is None else str(last),
        save_resume_state=True,
        trust_remote_code=False,
    )


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last whole checkpoint of an earlier attempt."""
    for candidate in sorted(checkpoint_dir(folder, 0).parent.glob("step-*"), reverse=True):
        try:
            verify(candidate)
        except UserError:
            continue
        return candidate
    return None


def tell_plan(observe: Observer, config: ExportedConfig, plan: ExecutionPlan, job: TrialJob) -> None:
    """Say what is trained and what this machine's plan changed against the study's."""
    settings, before = config.settings, config.plan
    lines = [
        f"Model: {config.model.name}. Data: {config.data.source}.",
        f"From study {config.study}, trial {config.trial}: learning rate {settings.learning_rate:g}, "
        f"effective batch {settings.effective_batch_size}, length {settings.seq_len}, "
        f"{settings.num_train_examples:,} examples.",
        f"Plan: {plan.reason}",
    ]
    if before is not None and changes(before, plan):
        lines.append(f"Changed for this machine, with the same result: {', '.join(changes(before, plan))}.")
    if job.resume_from is not None:
        lines.append(f"Goes on from {job.resume_from}.")
    observe(
        StudyOpened(
            study=config.study,
            plan_lines=tuple(lines),
            num_trials=1,
            num_finished=0,
            metric=config.expected.metric,
            minimize=True,
            deadline=None,
        )
    )


def changes(before: ExecutionPlan, after: ExecutionPlan) -> list[str]:
    """List what differs between two plans, as `micro batch 1 -> 4`."""
    names = {
        "micro_batch": "micro batch",
        "gradient_accumulation": "accumulation",
        "checkpointing": "checkpointing",
        "num_threads": "threads",
    }
    pairs = [(words, getattr(before, name), getattr(after, name)) for name, words in names.items()]
    return [
        f"{words} {getattr(old, 'value', old)} -> {getattr(new, 'value', new)}"
        for words, old, new in pairs
        if old != new
    ]


def run_job(
    job: TrialJob,
    config: ExportedConfig,
    server: WarmServer,
    device: DeviceProfile,
    observe: Observer,
    stop_requested: Callable[[], bool],
) -> tuple[AttemptEnd, list[Measurement]]:
    """Run one attempt to its end; on the user's wish it saves a checkpoint and ends."""
    lease = MachineLeases(Leases()).acquire(
        device,
        job.plan.estimate.total_bytes,
        num_threads=job.plan.num_threads,
        study=job.study,
        trial=job.trial,
        until=time.time() + job.plan.predicted_duration_s,
    )
    if lease is None:
        raise UserError(MachineLeases(Leases()).holders(device), remedy="Try again when it has ended.")
    runner = LocalRunner(server)
    record = record_of(job, config)
    evaluations: list[Measurement] = []
    is_stopping = False
    try:
        observe(TrialStarted(record=record, attempt=job.attempt, device_names=(device.name,)))
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
    finally:
        runner.close(grace_s=0.0)
        lease.release()


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
