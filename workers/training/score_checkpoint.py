"""Score one checkpoint on the examples that were not used to choose it, or the untuned model as trials are.

In a process of its own.  Loaded and evaluated as in training: same precision, length, batch and fused head,
so that scores differ by the model and the examples alone.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from trl.trainer.utils import add_fused_lm_head

from autosft.profiles.dataset.prepared import eval_fingerprint
from autosft.profiles.dataset.tokenizer import fit_pad
from autosft.profiles.dataset.turn_end import set_turn_end
from autosft.profiles.errors import UserError
from autosft.profiles.memory.trace.head_tiles import head_tiles
from autosft.profiles.model.adapter_folder import is_adapter_folder
from autosft.studies.files.checkpoints import (
    UNTUNED_EVALUATION,
    evaluation_path,
    prompt_scores_path,
    score_path,
    step_of,
)
from autosft.studies.trial import AttemptEnd, Measurement, PromptScoring, StopReason, Task, TrialJob
from autosft.workers.data import collator, load_split, require_same_evaluation
from autosft.workers.device import MemoryMeter, device_of, pads_to_few_sizes
from autosft.workers.load_weights import load_adapter
from autosft.workers.ranks import SingleProcess, staging_dir
from autosft.workers.scoring.evaluation import Evaluation, evaluate, evaluating
from autosft.workers.scoring.prompt_scorer import Answering, PromptScorer
from autosft.workers.training.load import load_model, quiet, tokenizer_of
from autosft.workers.training.remote_io import publish, with_inputs_here

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Seconds between two progress reports.
REPORT_S = 1.0


class Stopped(Exception):  # noqa: N818 - not an error
    """The evaluation was asked to stop."""


def score(
    job: TrialJob, report: Callable[[Measurement], None], stop_requested: Callable[[], StopReason | None]
) -> AttemptEnd:
    """Evaluate a checkpoint on the final examples, or the untuned model as a trial evaluates its own.

    The checkpoint is `job.resume_from`.  Reports progress in batches and at last the metrics, and leaves the
    losses per example at `checkpoints.score_path`, of the untuned model at `checkpoints.evaluation_path`.
    Raises UserError for a checkpoint that is not what was written, for other evaluation examples than the
    study's, and where truncation leaves nothing to score.
    """
    started = time.monotonic()
    quiet()
    meter = device_of(job).meter(job.plan.memory_cap_bytes)
    torch.set_num_threads(job.plan.num_threads)
    job = with_inputs_here(job, SingleProcess())
    is_untuned = job.task is Task.UNTUNED
    examples = load_split(job, "eval" if is_untuned else "final")
    if is_untuned:
        require_same_evaluation(job, eval_fingerprint(examples, job.pinned.eval_seq_len))
    progress = Progress(job, meter, report, stop_requested, num_examples=len(examples))
    stopped = None
    try:
        loaded = load(job)
        on_cpu, in_few_sizes = device_of(job).uses_host_memory, pads_to_few_sizes(job)
        with head_tiles(loaded.network, on_cpu=on_cpu, in_few_sizes=in_few_sizes):
            result = evaluate_loaded(job, loaded, examples, progress.on_batch)
            metrics = result.metrics()
            if is_untuned and job.scoring is not None:
                metrics += answers_score(job, job.scoring, loaded, progress.on_answers)
    except Stopped:
        stopped = stop_requested()
    else:
        save_losses(job, result)
        report(progress.measurement(metrics))
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
        eval_fingerprint=job.pinned.eval_fingerprint if is_untuned else None,
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
        self.on_answers()

    def on_answers(self) -> None:
        """Report now and then.  Raises Stopped where the evaluation is asked to end."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model on its device, with the head that evaluation needs."""

    model: PreTrainedModel | PeftModel
    network: PreTrainedModel  # without its adapter's wrapper
    tokenizer: PreTrainedTokenizerBase
    device: torch.device


def load(job: TrialJob) -> Loaded:
    """Load the checkpoint to evaluate, or the model as it is before tuning, onto the device."""
    device = torch.device(device_of(job).torch_name)
    tokenizer = tokenizer_of(job)
    model = network = load_model(job)  # of a whole model's checkpoint its own weights
    has_adapter = job.resume_from is not None or is_adapter_folder(job.model)
    if job.settings.adapter is not None and has_adapter:
        model = load_adapter(network, Path(job.resume_from or job.model))
    add_fused_lm_head(network, outputs=("log_probs", "entropy", "is_top1"))
    fit_pad(tokenizer, model.get_input_embeddings().num_embeddings)
    set_turn_end(network, tokenizer)
    return Loaded(model=model.to(device), network=network, tokenizer=tokenizer, device=device)


def evaluate_loaded(
    job: TrialJob, loaded: Loaded, examples: Dataset, on_batch: Callable[[], None]
) -> Evaluation:
    """Evaluate a model on examples.  Raises UserError where nothing can be scored."""
    with evaluating():
        result = evaluate(
            loaded.model,
            examples,
            collate=collator(loaded.tokenizer, job.pinned.eval_seq_len, in_few_sizes=pads_to_few_sizes(job)),
            micro_batch=job.pinned.eval_micro_batch,
            device=loaded.device,
            precision=precision_context(job, loaded.device),
            on_batch=on_batch,
        )
    if sum(result.num_tokens) == 0:
        raise UserError(f"no example has an answer within {job.pinned.eval_seq_len} tokens.")
    return result


def answers_score(
    job: TrialJob, scoring: PromptScoring, loaded: Loaded, on_batch: Callable[[], None]
) -> tuple[tuple[str, float], ...]:
    """Let a model answer the study's prompts, keep which it followed, and return those metrics."""
    prompts = PromptScorer(job, scoring)
    answering = Answering(
        model=loaded.model.eval(),
        tokenizer=loaded.tokenizer,
        precision=lambda: precision_context(job, loaded.device),
    )
    try:
        with evaluating():
            metrics = prompts.score(answering, UNTUNED_EVALUATION, step=0, on_batch=on_batch, keep=True)
    finally:
        prompts.check.close()
    publish(job, prompt_scores_path(Path(job.output_dir), UNTUNED_EVALUATION))
    return metrics


def save_losses(job: TrialJob, result: Evaluation) -> None:
    """Write the losses per example next to the checkpoint, or to the study's URL."""
    path, step = evaluation_path(Path(job.output_dir), UNTUNED_EVALUATION), 0
    if job.resume_from is not None:
        path, step = score_path(Path(job.resume_from)), step_of(Path(job.resume_from))
        if job.store_url is not None:  # the checkpoint was downloaded to another folder
            path = Path(job.output_dir) / path.name
    result.save(path, step=step)
    publish(job, path)


def precision_context(job: TrialJob, device: torch.device) -> AbstractContextManager[None]:
    """Return the study's autocast context, as in the trainer."""
    dtype = job.pinned.precision.autocast_dtype
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=getattr(torch, dtype))
