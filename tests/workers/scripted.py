"""Scripted attempts: what a training run would report, as values.

`timeline` is pure.  The fake runner plays it on a virtual clock, and `train` plays it in a real process,
where the faults are real too; so one conformance suite holds over both.
"""

from __future__ import annotations

import enum
import errno
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from autosft.profiles.errors import UserError
from autosft.profiles.recipe import Method, Precision, Sharding
from autosft.studies.trial import (
    AttemptEnd,
    FailureKind,
    Measurement,
    PinnedSettings,
    StopReason,
    TrainingSettings,
    TrialJob,
)
from autosft.studies.wire import from_plain, to_plain
from autosft.workers.scoring.evaluation import evaluating
from tests.plans import execution_plan


class Fault(enum.Enum):
    """What goes wrong in a scripted attempt."""

    LOST = "lost"  #: the process is killed
    CRASH = "crash"  #: the process aborts
    EXIT = "exit"  #: the process exits without a word
    OUT_OF_MEMORY = "out of memory"
    EVALUATION_OUT_OF_MEMORY = "out of memory while evaluating"
    NON_FINITE_LOSS = "non-finite loss"
    ERROR = "error"  #: an exception
    BAD_DATA = "bad data"
    DISK_FULL = "disk full"
    SURROUNDINGS = "surroundings"  #: a disk that is read-only
    HANG = "hang"  #: no progress and no ear for a stop
    WAIT = "wait"  #: no progress, but it stops when asked


FAILURES = {
    Fault.LOST: FailureKind.WORKER_LOST,
    Fault.CRASH: FailureKind.ERROR,
    Fault.EXIT: FailureKind.ERROR,
    Fault.OUT_OF_MEMORY: FailureKind.OUT_OF_MEMORY,
    Fault.EVALUATION_OUT_OF_MEMORY: FailureKind.EVALUATION_OUT_OF_MEMORY,
    Fault.NON_FINITE_LOSS: FailureKind.NON_FINITE_LOSS,
    Fault.ERROR: FailureKind.ERROR,
    Fault.BAD_DATA: FailureKind.BAD_DATA,
    Fault.DISK_FULL: FailureKind.DISK_FULL,
    Fault.SURROUNDINGS: FailureKind.SURROUNDINGS,
}


#: What all ranks of a gang come to together.
AGREED = (Fault.NON_FINITE_LOSS, Fault.WAIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A run of `num_steps` steps of `step_s` each, evaluated after every `len(eval_losses)`-th part of it.

    The fault strikes when `fault_step` would be done.  Peaks are reported as `peak_bytes`.
    """

    num_steps: int = 4
    step_s: float = 1.0
    eval_losses: tuple[float, ...] = (2.0, 1.5)
    metric: str = "eval_loss"  # what these are values of
    fault: Fault | None = None
    fault_step: int = 2
    fault_rank: int = 0  # the others wait for it then, as in a collective operation
    peak_bytes: int = 1000
    slowdown: float | None = None  # of its steps by other programs, as it reports
    output: str = ""  # written to standard output by a real process


def timeline(job: TrialJob, script: Script) -> Iterator[Measurement | Fault]:
    """Yield the report of each step, from the job's checkpoint on, and the fault where it strikes."""
    first = step_of(job.resume_from) if job.resume_from else 0
    evaluations = {
        math.ceil((i + 1) * script.num_steps / len(script.eval_losses)): i + 1
        for i in range(len(script.eval_losses))
    }
    for step in range(first + 1, script.num_steps + 1):
        if script.fault is not None and step == script.fault_step:
            yield script.fault
        evaluation = evaluations.get(step)
        yield Measurement(
            trial=job.trial,
            attempt=job.attempt,
            step=step,
            num_steps=script.num_steps,
            num_tokens=step * 100,
            loss=3.0 / step,
            grad_norm=1.0,
            learning_rate=job.settings.learning_rate,
            tokens_per_s=100 / script.step_s if script.step_s else None,
            peak_allocated_bytes=script.peak_bytes,
            peak_reserved_bytes=None,
            metrics=((script.metric, script.eval_losses[evaluation - 1]),) if evaluation else (),
            evaluation=evaluation,
            checkpoint=str(Path(job.output_dir) / f"step-{step}") if evaluation else None,
            elapsed_s=(step - first) * script.step_s,
            slowdown=script.slowdown,
        )


def step_of(checkpoint: str) -> int:
    return int(Path(checkpoint).name.rpartition("-")[2])


def end(
    job: TrialJob,
    *,
    stopped: StopReason | None = None,
    failure: FailureKind | None = None,
    peak_bytes: int = 1000,
) -> AttemptEnd:
    return AttemptEnd(
        trial=job.trial,
        attempt=job.attempt,
        completed=stopped is None and failure is None,
        stopped=stopped,
        failure=failure,
        message="" if failure is None else f"scripted: {failure.value}",
        log_path=None,
        peak_allocated_bytes=peak_bytes,
        peak_reserved_bytes=None,
        duration_s=1.0,
        eval_fingerprint=job.pinned.eval_fingerprint,
    )


def train(
    job: TrialJob, report: Callable[[Measurement], None], stop_requested: Callable[[], StopReason | None]
) -> AttemptEnd:
    """Play the script that stands in `job.model` in a real process: no waiting, and real faults."""
    script = from_plain(Script, json.loads(job.model))
    print(script.output, flush=True)
    for item in timeline(job, script):
        if isinstance(item, Measurement):
            report(item)
            continue
        is_mine = item in AGREED or int(os.environ.get("RANK", "0")) == script.fault_rank
        match item if is_mine else Fault.HANG:
            case Fault.LOST:
                os.kill(os.getpid(), signal.SIGKILL)
            case Fault.CRASH:
                os.abort()
            case Fault.EXIT:
                os._exit(3)
            case Fault.OUT_OF_MEMORY:
                raise MemoryError
            case Fault.EVALUATION_OUT_OF_MEMORY:
                with evaluating():
                    raise MemoryError
            case Fault.NON_FINITE_LOSS:
                return end(job, failure=FailureKind.NON_FINITE_LOSS)
            case Fault.ERROR:
                raise RuntimeError("scripted error")
            case Fault.DISK_FULL:
                raise OSError(errno.ENOSPC, "No space left on device")
            case Fault.SURROUNDINGS:
                raise OSError(errno.EROFS, "Read-only file system", "/model")
            case Fault.BAD_DATA:
                raise UserError("scripted bad data")
            case Fault.HANG:
                while True:
                    signal.pause()
            case Fault.WAIT:
                while (reason := stop_requested()) is None:
                    time.sleep(0.002)
                return end(job, stopped=reason)
    return end(job)


IMPATIENT = 13


def hang_limit_s(job: TrialJob, *, has_begun: bool) -> float:
    """Short for trial 13 alone: a machine under load may take its time for the others."""
    return 0.5 if job.trial == IMPATIENT and has_begun else 600.0


def make_job(
    script: Script | None = None,
    *,
    trial: int = 0,
    attempt: int = 1,
    output_dir: str | Path = "out",
    resume_from: str | None = None,
    memory_cap_bytes: int = 1 << 30,
    device_uuids: tuple[str, ...] = ("CPU-test",),
) -> TrialJob:
    """Return a small valid CPU job, with the script for `train` in the place of the model."""
    return TrialJob(
        study="scripted",
        trial=trial,
        attempt=attempt,
        model=json.dumps(to_plain(script or Script())),
        data_dir="",
        output_dir=str(output_dir),
        settings=TrainingSettings(
            learning_rate=1e-4,
            lr_scheduler="cosine",
            warmup_ratio=0.0,
            weight_decay=0.0,
            effective_batch_size=8,
            seq_len=64,
            method=Method.FULL,
            optimizer="adamw_torch",
            adapter=None,
            num_train_examples=32,
            max_grad_norm=1.0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_epsilon=1e-8,
            seed=0,
        ),
        pinned=PinnedSettings(
            precision=Precision.FP32,
            tf32=False,
            attention="sdpa",
            eval_seq_len=64,
            eval_micro_batch=8,
            eval_fingerprint="0" * 64,
            num_evaluations=2,
        ),
        plan=execution_plan(
            micro_batch=8 // len(device_uuids),
            effective_batch_size=8 // len(device_uuids),
            data_parallel=len(device_uuids),
            sharding=Sharding.DDP if len(device_uuids) > 1 else Sharding.NONE,
            device_name="CPU",
            memory_cap_bytes=memory_cap_bytes,
            predicted_duration_s=1.0,
        ),
        device_uuids=device_uuids,
        resume_from=resume_from,
        save_resume_state=False,
        trust_remote_code=False,
    )
