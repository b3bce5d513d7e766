"""One attempt at a trial, from the job to its end: read it top to bottom.

Runs in a process of its own (see `workers.process`).  What is learned depends on `job.settings` and
`job.pinned` alone: the examples are laid out in one fixed order, every optimizer step takes the next
`effective_batch_size` of them, and the loss is averaged over tokens, so that any micro batch x accumulation
x data parallel gives the same run up to floating-point noise.  On several devices every rank runs this file;
what they do together is `gang`'s.  docs/training.md says what is exact and what is not.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from trl import SFTTrainer

from autosft.profiles.dataset.prepared import eval_fingerprint
from autosft.profiles.errors import MissingExtraError, UserError
from autosft.profiles.memory.trace.head_tiles import head_tiles
from autosft.profiles.memory.trace.row_attention import attention_of_training
from autosft.profiles.model.adapters import hold_trained_in_fp32, peft_config
from autosft.profiles.recipe import Method
from autosft.profiles.user_code import load
from autosft.studies.trial import AttemptEnd, Measurement, StopReason, Task, TrialJob
from autosft.workers import ahead
from autosft.workers.allocator import set_allocator
from autosft.workers.conductor import Conductor
from autosft.workers.course import lay_out
from autosft.workers.data import collator, load_split
from autosft.workers.device import is_cpu_job
from autosft.workers.memory_meter import MemoryMeter
from autosft.workers.ranks import join, staging_dir
from autosft.workers.sft_config import sft_config
from autosft.workers.sharding import gather_optimizer_state, is_sharded, shard_optimizer_state, sharding_of
from autosft.workers.shipping import with_data_here, with_inputs_here
from autosft.workers.sparse import ZeroMasks
from autosft.workers.tracking import set_environment

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
    if job.task is Task.SCORE:
        from autosft.workers.final_scoring import score  # which loads models as we do

        return score(job, report, stop_requested)
    started = time.monotonic()
    quiet()
    if not is_cpu_job(job):
        set_allocator()
    gang = join(job, on_cpu=is_cpu_job(job))
    assert gang.size == job.plan.data_parallel, "one process a device"
    job = with_inputs_here(job, gang)
    set_environment(job)
    meter = MemoryMeter(
        on_cpu=is_cpu_job(job),
        cap_bytes=job.plan.memory_cap_bytes,
        baseline_bytes=ahead.baseline_bytes(),
    )
    torch.set_num_threads(job.plan.num_threads)

    tokenizer = ahead.take(*tokenizer_part(job))
    course = lay_out(job)
    eval_data, seen_fingerprint = ahead.take(*evaluation_part(job))
    if seen_fingerprint != job.pinned.eval_fingerprint:
        raise UserError(
            f"the evaluation examples in {job.data_dir} are not the ones this study is measured on "
            f"(sha256 {seen_fingerprint[:12]}…, expected {job.pinned.eval_fingerprint[:12]}…).",
            remedy="Scores would not be comparable. Start a new study with --study NAME.",
        )

    staging = staging_dir(job)
    model = ahead.take(*model_part(job))
    ahead.drop()
    trainer = trainer_class(job)(
        model=model,
        args=sft_config(job, num_steps=course.num_steps, staging_dir=str(staging)),
        train_dataset=course.dataset,
        processing_class=tokenizer,
        data_collator=collator(tokenizer, job.settings.seq_len, padding_free=job.pinned.padding_free),
        peft_config=adapter(job),
    )
    if job.pinned.precision.scales_loss:
        hold_trained_in_fp32(trainer.model)
    conductor = Conductor(job, gang, course, trainer, eval_data, meter, report, stop_requested)
    trainer.add_callback(conductor)
    with head_tiles(model, on_cpu=is_cpu_job(job)):
        trainer.train(resume_from_checkpoint=job.resume_from)
        conductor.close()

    completed = conductor.failure is None and conductor.stopped is None
    allocated, reserved = gang.maximum(meter.peak())
    if gang.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
    return AttemptEnd(
        trial=job.trial,
        attempt=job.attempt,
        completed=completed,
        stopped=conductor.stopped,
        failure=conductor.failure,
        message=conductor.message,
        log_path=None,  # the parent knows where it sent our output
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved,
        duration_s=time.monotonic() - started,
        eval_fingerprint=seen_fingerprint,
    )


def load_ahead(job: TrialJob) -> None:
    """Load what any attempt like `job` starts with, before it is there (see `ahead`)."""
    quiet()
    job = with_data_here(job)
    has_room = ahead.begin(job)
    ahead.hold(*tokenizer_part(job))
    ahead.hold(*evaluation_part(job))
    # A checkpoint belongs to one trial; what is quantized or sharded is so on its device, while it loads.
    is_anyones = job.resume_from is None or job.settings.lora is not None
    is_on_host = job.settings.method is not Method.QLORA and len(job.device_uuids) == 1
    if has_room and is_anyones and is_on_host:
        ahead.hold(*model_part(job))


def quiet() -> None:
    """Keep progress bars out of the trial's log."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()


class Trainer(SFTTrainer):  # type: ignore[misc]
    """trl's trainer, with resume state that any number of processes can go on from; keeps zeros."""

    # A user's class below may have attributes of any name: ours say whose they are.
    autosft_loss: UserLoss | None = None  # of --loss
    autosft_masks: ZeroMasks | None = None  # of --method sparse, once training begins

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: a checkpoint of a trial is not a release."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if isinstance(self.model, PeftModel):  # else `load_model` has read the weights there
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = gather_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(
            Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True
        )
        self.optimizer.load_state_dict(shard_optimizer_state(state, self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        if self.autosft_loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        loss = self.autosft_loss(outputs, labels, num_items_in_batch=num_items_in_batch)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages over them again
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self.autosft_masks is not None and self.accelerator.sync_gradients:
            self.autosft_masks.clear_gradients()  # before they are clipped
        return loss

    def keep_zeros(self) -> None:
        """Take the masks from the weights as they are now and keep them to the end."""
        self.autosft_masks = ZeroMasks(self.model)
        self.autosft_masks.attach(self.optimizer.optimizer)


UserLoss = Callable[..., torch.Tensor]  # (outputs, labels, num_items_in_batch=...) -> loss of a micro batch


def trainer_class(job: TrialJob) -> type[Trainer]:
    """Return our trainer over the user's own class and with the user's own loss, where there are such."""
    pinned = job.pinned
    own = (load(pinned.trainer, flag="--trainer"),) if pinned.trainer is not None else ()
    loss = staticmethod(load(pinned.loss, flag="--loss")) if pinned.loss is not None else None
    return type("Trainer", (Trainer, *own), {"autosft_loss": loss})


# What is trained


# Each with all that it depends on: by this the same part of another job is known.


def tokenizer_part(job: TrialJob) -> tuple[Hashable, Callable[[], PreTrainedTokenizerBase]]:
    return ("tokenizer", tokenizer_source(job), job.trust_remote_code), lambda: load_tokenizer(job)


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


def load_tokenizer(job: TrialJob) -> PreTrainedTokenizerBase:
    """Return the tokenizer; padding falls back on the end-of-sequence token, which labels never score."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(job), trust_remote_code=job.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_source(job: TrialJob) -> str:
    """Where the tokenizer of this study stands: beside the prepared data where our own template was added."""
    prepared = Path(job.data_dir) / "tokenizer"
    return str(prepared) if prepared.is_dir() else job.model


def load_model(job: TrialJob) -> PreTrainedModel:
    """Load the weights in the study's precision; 4-bit for QLoRA."""
    precision, quantization = job.pinned.precision, None
    if job.settings.method is Method.QLORA:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(what="--method qlora", extra="gpu") from error
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float16 if precision.scales_loss else torch.bfloat16,
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        weights_source(job),
        dtype=getattr(torch, precision.weight_dtype),
        attn_implementation=attention_of_training(job.pinned.attention, padding_free=job.pinned.padding_free),
        quantization_config=quantization,
        distributed_config=sharding_of(job),
        trust_remote_code=job.trust_remote_code,
    )
    return model


def weights_source(job: TrialJob) -> str:
    """Where the weights to start from stand: the base model's beside adapters, else those of a checkpoint."""
    return job.model if job.resume_from is None or job.settings.lora else job.resume_from


def adapter(job: TrialJob) -> Any | None:
    """Return peft's configuration of the adapter, None when every parameter is trained."""
    lora = job.settings.lora
    return None if lora is None else peft_config(lora)
