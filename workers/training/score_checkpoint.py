"""Score one checkpoint on the examples that were not used to choose it, in a separate process.

Loads and evaluates as in training, with the same precision, length, batch and fused head, so that only the
examples differ from the score by which the checkpoint was chosen.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from trl.trainer.utils import add_fused_lm_head

from autosft.profiles.dataset.tokenizer import fit_pad
from autosft.profiles.errors import UserError
from autosft.profiles.memory.trace.head_tiles import head_tiles
from autosft.studies.files.checkpoints import score_path, step_of
from autosft.studies.trial import AttemptEnd, Measurement, StopReason, TrialJob
from autosft.workers.data import collator, load_split
from autosft.workers.device import MemoryMeter, device_of
from autosft.workers.load_weights import load_adapter
from autosft.workers.ranks import SingleProcess, staging_dir
from autosft.workers.scoring.evaluation import Evaluation, evaluate
from autosft.workers.training.load import load_model, quiet, tokenizer_of
from autosft.workers.training.remote_io import publish, with_inputs_here

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

#: Seconds between two progress reports.
REPORT_S = 1.0


class Stopped(Exception):  # noqa: N818 - not an error
    """The evaluation was asked to stop."""


def score(
    job: TrialJob, report: Callable[[Measurement], None], stop_requested: Callable[[], StopReason | None]
) -> AttemptEnd:
    """Evaluate the checkpoint `job.resume_from` on the prepared data's final examples.

    Reports progress in batches and at last the metrics, and leaves the losses per example at
    `checkpoints.score_path`.  Raises UserError for a checkpoint that is not what was written, and where
    truncation leaves nothing to score.
    """
    started = time.monotonic()
    quiet()
    meter = device_of(job).meter(job.plan.memory_cap_bytes)
    torch.set_num_threads(job.plan.num_threads)
    job = with_inputs_here(job, SingleProcess())
    examples = load_split(job, "final")
    progress = Progress(job, meter, report, stop_requested, num_examples=len(examples))
    stopped = None
    try:
        result = evaluate_checkpoint(job, examples, progress.on_batch)
    except Stopped:
        stopped = stop_requested()
    else:
        save_losses(job, result)
        report(progress.measurement(result.metrics()))
    shutil.rmtree(staging_dir(job), ignore_errors=True)  # holds a checkpoint that was fetched
    allocated, reserved = meter.peak()
    return AttemptEnd(
        trial=job.trial,
        attempt=job.attempt,
        completed=stopped is None,
        stopped=stopped,
        failure=None,
        message="",
        log_path=None,
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved,
        duration_s=time.monotonic() - started,
        eval_fingerprint=None,
    )


class Progress:
    """Counts evaluated batches, reports them periodically, and checks whether to stop."""

    def __init__(
        self,
        job: TrialJob,
        meter: MemoryMeter,
        report: Callable[[Measurement], None],
        stop_requested: Callable[[], StopReason | None],
        *,
        num_examples: int,
    ) -> None:
        self.job, self.meter, self.report, self.stop_requested = job, meter, report, stop_requested
        self.num_batches = -(-num_examples // job.pinned.eval_micro_batch)
        self.num_done = 0
        self.started = self.reported_at = time.monotonic()

    def on_batch(self) -> None:
        """Count a batch.  Raises Stopped if the evaluation is asked to stop."""
        self.num_done += 1
        if time.monotonic() - self.reported_at >= REPORT_S:
            self.reported_at = time.monotonic()
            self.report(self.measurement())
        if self.stop_requested() is not None:
            raise Stopped

    def measurement(self, metrics: tuple[tuple[str, float], ...] = ()) -> Measurement:
        allocated, reserved = self.meter.peak()
        return Measurement(
            trial=self.job.trial,
            attempt=self.job.attempt,
            step=self.num_done,
            num_steps=self.num_batches,
            num_tokens=0,
            loss=None,
            grad_norm=None,
            learning_rate=None,
            tokens_per_s=None,
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
            metrics=metrics,
            elapsed_s=time.monotonic() - self.started,
        )


def evaluate_checkpoint(job: TrialJob, examples: Dataset, on_batch: Callable[[], None]) -> Evaluation:
    """Load the checkpoint onto the device and evaluate it.  Raises UserError where nothing can be scored."""
    assert job.resume_from is not None
    kind = device_of(job)
    device = torch.device(kind.torch_name)
    model = load_checkpoint(job, Path(job.resume_from)).to(device)
    tokenizer = tokenizer_of(job)
    fit_pad(tokenizer, model.get_input_embeddings().num_embeddings)
    with head_tiles(model, on_cpu=kind.uses_host_memory):
        result = evaluate(
            model,
            examples,
            collate=collator(tokenizer, job.pinned.eval_seq_len),
            micro_batch=job.pinned.eval_micro_batch,
            device=device,
            precision=precision_context(job, device),
            on_batch=on_batch,
        )
    if sum(result.num_tokens) == 0:
        raise UserError(f"no final example has an answer within {job.pinned.eval_seq_len} tokens.")
    return result


def save_losses(job: TrialJob, result: Evaluation) -> None:
    """Write the losses per example next to the checkpoint, or to the study's URL."""
    assert job.resume_from is not None
    checkpoint = Path(job.resume_from)
    path = score_path(checkpoint)
    if job.store_url is not None:  # the checkpoint was downloaded to another folder
        path = Path(job.output_dir) / path.name
    result.save(path, step=step_of(checkpoint))
    publish(job, path)


def load_checkpoint(job: TrialJob, checkpoint: Path) -> PreTrainedModel:
    """Load a checkpoint's model, or an adapter with its base model, with the head that evaluation needs."""
    if job.settings.adapter is None:
        model = base = load_model(replace(job, model=str(checkpoint)))
    else:
        base = load_model(job)
        model = load_adapter(base, checkpoint)
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    return model


def precision_context(job: TrialJob, device: torch.device) -> AbstractContextManager[None]:
    """Return the study's autocast context, as in the trainer."""
    dtype = job.pinned.precision.autocast_dtype
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=getattr(torch, dtype))
