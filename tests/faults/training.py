"""Training whose result gives away every step that was lost, repeated or done by two processes at once.

Its state is a chain of hashes over the steps, kept in checkpoints as a model's weights are; the metric is
read off the state.  So a run that was killed and resumed shows the learning curve of one that was not, or it
has gone on from something else than it should have.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from autosft.studies.files.checkpoints import checkpoint_dir, install, verify
from autosft.studies.trial import AttemptEnd, Measurement, StopReason, TrainingSettings, TrialJob

NUM_STEPS = 8
STEP_S = 0.06
STATE = "optimizer.json"  # named so that the checkpoint counts as one to resume from


def first_state(settings: TrainingSettings) -> str:
    return repr((settings.learning_rate, settings.effective_batch_size, settings.warmup_ratio))


def next_state(state: str, step: int) -> str:
    return hashlib.sha256(f"{state}/{step}".encode()).hexdigest()


def loss_of(state: str) -> float:
    return 1.0 + int(state[:12], 16) / 16**12


def curve(settings: TrainingSettings, num_evaluations: int) -> list[float]:
    """Return the loss at each evaluation of a run that nothing befell."""
    state, losses = first_state(settings), []
    for step in range(1, NUM_STEPS + 1):
        state = next_state(state, step)
        if step * num_evaluations % NUM_STEPS == 0:
            losses.append(loss_of(state))
    return losses


def train(
    job: TrialJob, report: Callable[[Measurement], None], stop_requested: Callable[[], StopReason | None]
) -> AttemptEnd:
    folder = Path(job.output_dir)
    with (folder / "lock").open("w") as lock:
        # Raises, and fails the study, where another process of this trial still lives.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        step, state = 0, first_state(job.settings)
        if job.resume_from is not None:
            verify(Path(job.resume_from))
            kept = json.loads((Path(job.resume_from) / STATE).read_text())
            step, state = kept["step"], kept["state"]
        stopped: StopReason | None = None
        while step < NUM_STEPS and stopped is None:
            time.sleep(STEP_S)
            step += 1
            state = next_state(state, step)
            share = step * job.pinned.num_evaluations
            evaluation = share // NUM_STEPS if share % NUM_STEPS == 0 else None
            stopped = stop_requested() if step < NUM_STEPS else None
            checkpoint = None
            if evaluation is not None or stopped is StopReason.SHUTDOWN:
                checkpoint = save(folder, job.attempt, step, state)
            report(measurement(job, step, state, evaluation, checkpoint))
    return ended(job, stopped)


def train_reading(
    job: TrialJob, report: Callable[[Measurement], None], stop_requested: Callable[[], StopReason | None]
) -> AttemptEnd:
    """The same, after its model and data were read."""
    for folder in (job.model, job.data_dir):
        (Path(folder) / "here").read_bytes()
    return train(job, report, stop_requested)


def ended(job: TrialJob, stopped: StopReason | None) -> AttemptEnd:
    return AttemptEnd(
        trial=job.trial,
        attempt=job.attempt,
        completed=stopped is None,
        stopped=stopped,
        failure=None,
        message="",
        log_path=None,
        peak_allocated_bytes=1,
        peak_reserved_bytes=None,
        duration_s=0.0,
        eval_fingerprint=job.pinned.eval_fingerprint,
    )


def save(folder: Path, attempt: int, step: int, state: str) -> str:
    staged = folder / f"staging-{attempt}"
    staged.mkdir(exist_ok=True)
    (staged / STATE).write_text(json.dumps({"step": step, "state": state}))
    final = checkpoint_dir(folder, step)
    install(staged, final)
    return str(final)


def measurement(
    job: TrialJob, step: int, state: str, evaluation: int | None, checkpoint: str | None
) -> Measurement:
    return Measurement(
        trial=job.trial,
        attempt=job.attempt,
        step=step,
        num_steps=NUM_STEPS,
        num_tokens=step * 100,
        loss=loss_of(state),
        grad_norm=None,
        learning_rate=job.settings.learning_rate,
        tokens_per_s=None,
        peak_allocated_bytes=1,
        peak_reserved_bytes=None,
        metrics=() if evaluation is None else (("eval_loss", loss_of(state)),),
        evaluation=evaluation,
        checkpoint=checkpoint,
    )
