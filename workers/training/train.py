"""Run one attempt at a trial, from its job to its end; read it from top to bottom.

Runs in a separate process (`workers.processes`).  What is learned depends on `job.settings` and
`job.pinned` alone: the examples come in one fixed order, every optimizer step takes the next
`effective_batch_size` of them, and the loss is averaged over tokens, so any micro batch x accumulation
x data parallel gives the same run up to floating-point noise.  On several devices every rank runs this file;
`workers.ranks` is how ranks agree.  docs/training.md says what is exact and what is not.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from autosft.profiles.dataset.prepared import eval_fingerprint
from autosft.profiles.dataset.tokenizer import fit_pad
from autosft.profiles.dataset.turn_end import set_turn_end
from autosft.profiles.memory.trace.head_tiles import head_tiles
from autosft.profiles.model.adapter_folder import is_adapter_folder
from autosft.profiles.model.adapters import hold_trained_in_fp32, holds_adapter_in_fp32
from autosft.profiles.recipe import Method
from autosft.studies.trial import AttemptEnd, Measurement, StopReason, Task, TrialJob
from autosft.workers.data import collator, load_split, require_same_evaluation
from autosft.workers.device import device_of, pads_to_few_sizes
from autosft.workers.load_weights import load_adapter_weights
from autosft.workers.ranks import join, staging_dir
from autosft.workers.scoring.own_loss import require_own_loss
from autosft.workers.training import preload
from autosft.workers.training.example_order import order_examples
from autosft.workers.training.load import (
    adapter,
    load_model,
    quiet,
    tokenizer_of,
    tokenizer_source,
    weights_source,
)
from autosft.workers.training.remote_io import with_data_here, with_inputs_here
from autosft.workers.training.sft_config import sft_config
from autosft.workers.training.trackers import set_environment
from autosft.workers.training.trainer import Trainer, trainer_class
from autosft.workers.training.trial_callback import Attempt, TrialCallback

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train(
    job: TrialJob,
    report: Callable[[Measurement], None],
    stop_requested: Callable[[], StopReason | None],
) -> AttemptEnd:
    """Run one attempt to its end and return how it ended.

    Calls `report` with progress and evaluations in order, asks `stop_requested` after every optimizer step,
    and leaves a model folder per evaluation in `<output_dir>/checkpoints/step-<n>`.  Raises UserError for
    data or a model that cannot be trained on, torch.OutOfMemoryError when the device is too small.
    """
    if job.task is not Task.TRAIN:
        from autosft.workers.training.score_checkpoint import score  # it loads models the same way

        return score(job, report, stop_requested)
    started = time.monotonic()
    attempt = prepare(job, report, stop_requested)
    trainer = build_trainer(attempt)
    callback = TrialCallback(attempt, trainer)
    trainer.add_callback(callback)
    on_cpu, in_few_sizes = device_of(job).uses_host_memory, pads_to_few_sizes(job)
    with head_tiles(unwrapped(trainer), on_cpu=on_cpu, in_few_sizes=in_few_sizes):
        trainer.train(resume_from_checkpoint=attempt.job.resume_from)
        callback.close()
    return finish(attempt, callback, duration_s=time.monotonic() - started)


def prepare(
    job: TrialJob,
    report: Callable[[Measurement], None],
    stop_requested: Callable[[], StopReason | None],
) -> Attempt:
    """Set up this process and its ranks, and read what the attempt is trained and evaluated on."""
    quiet()
    device = device_of(job)
    device.set_allocator()
    gang = join(job, device)
    assert gang.size == job.plan.data_parallel, "one process per device"
    job = with_inputs_here(job, gang)
    set_environment(job)
    meter = device.meter(job.plan.memory_cap_bytes, baseline_bytes=preload.baseline_bytes())
    torch.set_num_threads(job.plan.num_threads)
    examples = order_examples(job)
    eval_data, fingerprint = preload.take(*evaluation_part(job))
    require_same_evaluation(job, fingerprint)
    return Attempt(
        job=job,
        gang=gang,
        examples=examples,
        eval_data=eval_data,
        meter=meter,
        report=report,
        stop_requested=stop_requested,
    )


def build_trainer(attempt: Attempt) -> Trainer:
    """Load tokenizer and model, add the adapter, and return the trainer of the whole run."""
    job, examples = attempt.job, attempt.examples
    tokenizer = preload.take(*tokenizer_part(job))
    model = preload.take(*model_part(job))
    preload.drop()
    fit_pad(tokenizer, model.get_input_embeddings().num_embeddings, name=job.model, say=print)
    set_turn_end(model, tokenizer)
    trainer = trainer_class(job)(
        model=model,
        args=sft_config(job, num_steps=examples.num_steps, staging_dir=str(staging_dir(job))),
        train_dataset=examples.dataset,
        processing_class=tokenizer,
        data_collator=collator(
            tokenizer,
            job.settings.seq_len,
            padding_free=job.pinned.padding_free,
            in_few_sizes=pads_to_few_sizes(job),
        ),
        peft_config=adapter(job, model),
    )
    if job.settings.adapter is not None and holds_adapter_in_fp32(job.settings.method, job.pinned.precision):
        hold_trained_in_fp32(trainer.model)
    if job.resume_from is None and is_adapter_folder(job.model):
        load_adapter_weights(trainer.model, job.model)
    require_own_loss(trainer.model, f"--model {job.model}")
    return trainer


def unwrapped(trainer: Trainer) -> PreTrainedModel:
    """Return the trainer's model without its adapter's wrapper."""
    model = trainer.model
    return model.get_base_model() if isinstance(model, PeftModel) else model


def finish(attempt: Attempt, callback: TrialCallback, *, duration_s: float) -> AttemptEnd:
    """Clean up and return how the attempt ended; the peak is the largest over all ranks."""
    job, gang = attempt.job, attempt.gang
    allocated, reserved = gang.maximum(attempt.meter.peak())
    if gang.rank == 0:
        shutil.rmtree(staging_dir(job), ignore_errors=True)
    return AttemptEnd(
        trial=job.trial,
        attempt=job.attempt,
        completed=callback.failure is None and callback.stopped is None,
        stopped=callback.stopped,
        failure=callback.failure,
        message=callback.message,
        log_path=None,  # the parent process knows the log's path
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved,
        duration_s=duration_s,
        eval_fingerprint=job.pinned.eval_fingerprint,
    )


def load_ahead(job: TrialJob) -> None:
    """Load what an attempt like `job` needs, before the attempt exists (see `preload`)."""
    quiet()
    job = with_data_here(job)
    has_room = preload.begin(job)
    preload.hold(*tokenizer_part(job))
    preload.hold(*evaluation_part(job))
    # A checkpoint belongs to one trial; weights are quantized and sharded on their device, while loading.
    is_shared = job.resume_from is None or job.settings.adapter is not None
    is_on_host = job.settings.method is not Method.QLORA and len(job.device_uuids) == 1
    if has_room and is_shared and is_on_host:
        preload.hold(*model_part(job))


# The parts of an attempt that can be preloaded, each with a key of everything that it depends on


def tokenizer_part(job: TrialJob) -> tuple[Hashable, Callable[[], PreTrainedTokenizerBase]]:
    return ("tokenizer", tokenizer_source(job), job.trust_remote_code), lambda: tokenizer_of(job)


def evaluation_part(job: TrialJob) -> tuple[Hashable, Callable[[], tuple[Dataset, str]]]:
    def load() -> tuple[Dataset, str]:
        data = load_split(job, "eval")
        return data, eval_fingerprint(data, job.pinned.eval_seq_len)

    return ("evaluation", job.data_dir, job.pinned.eval_seq_len), load


def model_part(job: TrialJob) -> tuple[Hashable, Callable[[], PreTrainedModel]]:
    is_quantized = job.settings.method is Method.QLORA
    sharding = (job.plan.sharding, job.plan.data_parallel)
    pinned = (job.pinned.precision, job.pinned.attention, job.pinned.padding_free)
    return (
        ("model", weights_source(job), *pinned, *sharding, is_quantized, job.trust_remote_code),
        lambda: load_model(job),
    )
