"""One attempt at a trial, from the job to its end: read it top to bottom.

Runs in a process of its own (see `workers.process`).  What is learned depends on `job.settings` and
`job.pinned` alone: the examples are laid out in one fixed order, every optimizer step takes the next
`effective_batch_size` of them, and the loss is averaged over tokens, so that any micro batch x accumulation
x data parallel gives the same run up to floating-point noise.  On several devices every rank runs this file;
what they do together is `gang`'s.  docs/training.md says what is exact and what is not.
"""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from trl import SFTTrainer

from autosft.profiles.dataset.prepared import eval_fingerprint
from autosft.profiles.errors import MissingExtraError, UserError
from autosft.profiles.nvml import GpuWatch
from autosft.profiles.recipe import Method, Precision
from autosft.profiles.user_code import load
from autosft.studies.checkpoints import checkpoint_dir, evaluation_path, install, verify
from autosft.studies.trial import AttemptEnd, FailureKind, Measurement, StopReason, Task, TrialJob
from autosft.workers.allocator import set_allocator, why_not_set
from autosft.workers.course import Course, collator, lay_out, load_split
from autosft.workers.disk import require_room
from autosft.workers.evaluation import evaluate
from autosft.workers.gang import Gang, join, staging_dir
from autosft.workers.memory_meter import MemoryMeter
from autosft.workers.prompt_scorer import PromptScorer
from autosft.workers.sft_config import is_cpu_job, sft_config
from autosft.workers.sharding import (
    assert_distributed,
    gather_optimizer_state,
    is_sharded,
    shard_optimizer_state,
    sharding_of,
)
from autosft.workers.sparse import ZeroMasks
from autosft.workers.tracking import set_environment

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

WEIGHT_DTYPES = {
    Precision.FP32: torch.float32,
    Precision.BF16_AUTOCAST: torch.float32,
    Precision.FP16_AUTOCAST: torch.float32,
    Precision.BF16: torch.bfloat16,
}


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
    set_environment(job)
    meter = MemoryMeter(on_cpu=is_cpu_job(job), cap_bytes=job.plan.memory_cap_bytes)
    torch.set_num_threads(job.plan.num_threads)

    tokenizer = load_tokenizer(job)
    course = lay_out(job)
    eval_data = load_split(job, "eval")
    seen_fingerprint = eval_fingerprint(eval_data, job.pinned.eval_seq_len)
    if seen_fingerprint != job.pinned.eval_fingerprint:
        raise UserError(
            f"the evaluation examples in {job.data_dir} are not the ones this study is measured on "
            f"(sha256 {seen_fingerprint[:12]}…, expected {job.pinned.eval_fingerprint[:12]}…).",
            remedy="Scores would not be comparable. Start a new study with --study NAME.",
        )

    if job.resume_from is not None and gang.rank == 0:
        verify(Path(job.resume_from))
    gang.wait()  # for that
    staging = staging_dir(job)
    trainer = trainer_class(job)(
        model=load_model(job),
        args=sft_config(job, num_steps=course.num_steps, staging_dir=str(staging)),
        train_dataset=course.dataset,
        processing_class=tokenizer,
        data_collator=collator(tokenizer, job.settings.seq_len),
        peft_config=adapter(job),
    )
    conductor = Conductor(job, gang, course, trainer, eval_data, meter, report, stop_requested)
    trainer.add_callback(conductor)
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


def quiet() -> None:
    """Keep progress bars out of the trial's log."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()


class Trainer(SFTTrainer):  # type: ignore[misc]
    """trl's trainer, with resume state that any number of processes can go on from; keeps zeros."""

    loss: UserLoss | None = None  # of --loss
    masks: ZeroMasks | None = None  # of --method sparse, once training begins

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
        if self.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        loss = self.loss(outputs, labels, num_items_in_batch=num_items_in_batch)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages over them again
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self.masks is not None and self.accelerator.sync_gradients:
            self.masks.clear_gradients()  # before they are clipped
        return loss

    def keep_zeros(self) -> None:
        """Take the masks from the weights as they are now and keep them to the end."""
        self.masks = ZeroMasks(self.model)
        self.masks.attach(self.optimizer.optimizer)


UserLoss = Callable[..., torch.Tensor]  # (outputs, labels, num_items_in_batch=...) -> loss of a micro batch


def trainer_class(job: TrialJob) -> type[Trainer]:
    """Return our trainer over the user's own class and with the user's own loss, where there are such."""
    pinned = job.pinned
    own = (load(pinned.trainer, flag="--trainer"),) if pinned.trainer is not None else ()
    loss = staticmethod(load(pinned.loss, flag="--loss")) if pinned.loss is not None else None
    return type("Trainer", (Trainer, *own), {"loss": loss})


# What is trained


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
    quantization = None
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
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        job.model if job.resume_from is None or job.settings.lora else job.resume_from,
        dtype=WEIGHT_DTYPES[job.pinned.precision],
        attn_implementation=job.pinned.attention,
        quantization_config=quantization,
        distributed_config=sharding_of(job),
        trust_remote_code=job.trust_remote_code,
    )
    return model


def adapter(job: TrialJob) -> Any | None:
    """Return peft's configuration for LoRA and QLoRA, None when every parameter is trained."""
    lora = job.settings.lora
    if lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        bias="none",
        task_type="CAUSAL_LM",
    )


# What happens along the way


class Conductor(TrainerCallback):  # type: ignore[misc]
    """Evaluates, saves, reports and stops at the right steps."""

    def __init__(
        self,
        job: TrialJob,
        gang: Gang,
        course: Course,
        trainer: Trainer,
        eval_data: Dataset,
        meter: MemoryMeter,
        report: Callable[[Measurement], None],
        stop_requested: Callable[[], StopReason | None],
    ) -> None:
        self.job, self.gang, self.course = job, gang, course
        self.trainer, self.eval_data = trainer, eval_data
        self.meter, self.report, self.stop_requested = meter, report, stop_requested
        self.gpus = GpuWatch(() if is_cpu_job(job) else job.device_uuids)
        self.collate_eval = collator(trainer.processing_class, job.pinned.eval_seq_len)
        self.prompts = None if job.scoring is None else PromptScorer(job, job.scoring)
        self.stopped: StopReason | None = None
        self.failure: FailureKind | None = None
        self.message = ""
        self.logs: dict[str, float] = {}
        self.first_step = 0
        self.started = self.training_s = self.resumed_at = 0.0

    def close(self) -> None:
        if self.prompts is not None:
            self.prompts.check.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert_distributed(self.trainer.model_wrapped, self.job.plan)
        if self.job.settings.method is Method.SPARSE:
            self.trainer.keep_zeros()
        self.first_step = state.global_step
        self.started = self.resumed_at = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.training_s += time.monotonic() - self.resumed_at
        step = state.global_step
        if step == self.first_step + 1:
            self.rehearse_worst_batch()
            if not args.use_cpu and (complaint := why_not_set()):
                warnings.warn(complaint, stacklevel=1)  # in the trial's log
        if step in self.course.evaluation_at_step:
            control.should_log = control.should_save = True  # logs first, then saves: see on_save
        reason = self.gang.agree(self.stop_requested())
        if reason is not None and step < self.course.num_steps:
            self.stopped = reason
            control.should_training_stop = True
            if reason in (StopReason.SHUTDOWN, StopReason.PAUSED) and self.job.save_resume_state:
                control.should_save = True
        if control.should_save:
            require_room(
                Path(args.output_dir),
                self.trainer.model,
                self.trainer.optimizer,
                with_resume_state=self.job.save_resume_state,
            )
        self.resumed_at = time.monotonic()
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        if not logs or "loss" not in logs:
            return control
        self.logs = dict(logs)
        if not math.isfinite(logs["loss"]):
            self.failure = FailureKind.NON_FINITE_LOSS
            self.message = f"the training loss became {logs['loss']} at step {state.global_step}."
            control.should_training_stop, control.should_save = True, False
        self.report(self.measurement(state.global_step))
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the checkpoint that the trainer has just written into place, and report what it is worth."""
        step = state.global_step
        if self.trainer.masks is not None:
            self.trainer.masks.check()
        checkpoint = self.install_checkpoint(Path(args.output_dir) / f"checkpoint-{step}", step)
        evaluation = self.course.evaluation_at_step.get(step)
        if evaluation is None:
            self.report(self.measurement(step, checkpoint=str(checkpoint)))
            return
        result = evaluate(
            self.trainer.model,
            self.eval_data,
            collate=self.collate_eval,
            micro_batch=self.job.pinned.eval_micro_batch,
            device=self.trainer.args.device,
            precision=self.trainer.compute_loss_context_manager(),
            on_batch=self.stop_requested,
            gang=self.gang,
        )
        if self.gang.rank == 0:
            result.save(evaluation_path(Path(self.job.output_dir), evaluation), step=step)
        if self.job.report_to:
            self.trainer.log(dict(result.metrics()))
        if not math.isfinite(result.loss):
            self.failure = FailureKind.NON_FINITE_LOSS
            self.message = f"the evaluation loss became {result.loss} at step {step}."
            control.should_training_stop = True
        metrics = result.metrics()
        if self.prompts is not None and self.failure is None:
            metrics += self.prompts.score(
                self.trainer, evaluation, step=step, on_batch=self.stop_requested, keep=self.gang.rank == 0
            )
        self.report(
            self.measurement(step, checkpoint=str(checkpoint), evaluation=evaluation, metrics=metrics)
        )
        self.resumed_at = time.monotonic()

    def rehearse_worst_batch(self) -> None:
        """Run the largest micro batch of the whole run forward and backward once, and forget it.

        After the first optimizer step everything that will ever be resident is there, so a run that cannot
        fit fails now, in seconds.  Gradients and random state are put back: the run is unchanged.
        """
        trainer = self.trainer
        devices = [] if trainer.args.use_cpu else [torch.cuda.current_device()]
        batch = trainer.data_collator([self.course.dataset[i] for i in self.course.worst])
        with torch.random.fork_rng(devices=devices), trainer.compute_loss_context_manager():
            inputs = {name: value.to(trainer.args.device) for name, value in batch.items()}
            trainer.compute_loss(
                trainer.model, inputs, num_items_in_batch=(inputs["labels"] != -100).sum()
            ).backward()
        trainer.model.zero_grad(set_to_none=True)

    def install_checkpoint(self, staged: Path, step: int) -> Path:
        """Drop what a checkpoint does not need and give it its final name, atomically."""
        final = checkpoint_dir(Path(self.job.output_dir), step)
        self.gang.wait()  # each rank has written its random state
        if self.gang.rank == 0:
            (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle: neither kept nor read
            install(staged, final)
        return final

    def measurement(
        self,
        step: int,
        *,
        checkpoint: str | None = None,
        evaluation: int | None = None,
        metrics: tuple[tuple[str, float], ...] = (),
    ) -> Measurement:
        allocated, reserved = self.gang.maximum(self.meter.peak())
        temperature_c, throttle_reasons = self.gpus.read()
        tokens = self.course.tokens_at_step
        trained = tokens[step] - tokens[self.first_step]
        return Measurement(
            trial=self.job.trial,
            attempt=self.job.attempt,
            step=step,
            num_steps=self.course.num_steps,
            num_tokens=tokens[step],
            loss=self.logs.get("loss"),
            grad_norm=self.logs.get("grad_norm"),
            learning_rate=self.logs.get("learning_rate"),
            tokens_per_s=trained / self.training_s if self.training_s > 0 else None,
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
            metrics=metrics,
            evaluation=evaluation,
            checkpoint=checkpoint,
            elapsed_s=time.monotonic() - self.started,
            temperature_c=temperature_c,
            throttle_reasons=throttle_reasons,
        )
