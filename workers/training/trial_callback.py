"""The trainer's callback: evaluate, save, report and stop at the right steps of an attempt."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from transformers import GenerationConfig, TrainerCallback
from transformers.utils import GENERATION_CONFIG_NAME

from autosft.profiles.hardware.nvml import GpuWatch
from autosft.profiles.recipe import Method
from autosft.studies.files.checkpoints import (
    checkpoint_dir,
    checkpoint_url,
    evaluation_path,
    install,
    prompt_scores_path,
)
from autosft.studies.trial import FailureKind, Measurement, StopReason, TrialJob
from autosft.workers.data import collator
from autosft.workers.device import MemoryMeter, device_of, pads_to_few_sizes
from autosft.workers.load_weights import name_base
from autosft.workers.ranks import Gang
from autosft.workers.scoring.evaluation import Evaluation, evaluate, evaluating
from autosft.workers.scoring.prompt_scorer import Answering, PromptScorer
from autosft.workers.training.applied_step import AppliedStep
from autosft.workers.training.disk import require_room
from autosft.workers.training.eta import Pace
from autosft.workers.training.example_order import RunExamples
from autosft.workers.training.fsdp import assert_distributed
from autosft.workers.training.optimizers import averages, forget_other_trials
from autosft.workers.training.random_state import RandomState
from autosft.workers.training.remote_io import CheckpointUpload, publish
from autosft.workers.training.step_clock import StepClock
from autosft.workers.training.trained_weights import TrainedWeights

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from autosft.workers.training.trainer import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt in this process: its job, its data, and its connections to the monitor."""

    job: TrialJob
    gang: Gang
    examples: RunExamples
    eval_data: Dataset
    meter: MemoryMeter
    report: Callable[[Measurement], None]
    stop_requested: Callable[[], StopReason | None]


class TrialCallback(TrainerCallback):  # type: ignore[misc]
    """Evaluates, saves, reports and stops at the right steps."""

    def __init__(self, attempt: Attempt, trainer: Trainer) -> None:
        job, examples = attempt.job, attempt.examples
        self.job, self.gang, self.examples = job, attempt.gang, examples
        self.trainer, self.eval_data, self.meter = trainer, attempt.eval_data, attempt.meter
        self.report, self.stop_requested = attempt.report, attempt.stop_requested
        self.gpus = GpuWatch(device_of(job).watched(job.device_uuids))
        self.collate_eval = collator(
            trainer.processing_class, job.pinned.eval_seq_len, in_few_sizes=pads_to_few_sizes(job)
        )
        self.prompts = None if job.scoring is None else PromptScorer(job, job.scoring)
        self.stopped: StopReason | None = None
        self.failure: FailureKind | None = None
        self.message = ""
        self.logs: dict[str, float] = {}
        self.upload: CheckpointUpload | None = None  # of the last checkpoint, where it goes to a URL
        self.pace = Pace(examples.padded_at_step, examples.evaluation_at_step, job.plan.run_time)
        self.trained: TrainedWeights  # set when training begins
        self.applied: AppliedStep | None = None  # until its first step is over
        self.first_step = self.saved_step = 0
        self.random_state: RandomState | None = None  # after the last whole step
        self.clock = StepClock(job.plan.num_threads)
        self.started = self.training_s = self.resumed_at = self.stepped_at = 0.0

    def close(self) -> None:
        forget_other_trials()
        if self.prompts is not None:
            self.prompts.check.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert_distributed(self.trainer.model_wrapped, self.job.plan)
        if self.job.settings.method is Method.SPARSE:
            self.trainer.keep_zeros()
        if averages(self.trainer.optimizer):
            self.trainer.optimizer.train()  # after a resume: from averages to what is trained
        self.trained = TrainedWeights(self.trainer.model, self.job, warmup_steps=int(args.warmup_steps))
        self.first_step = state.global_step
        self.applied = AppliedStep(self.trainer, self.job, is_fresh=self.first_step == 0)
        self.started = self.resumed_at = time.monotonic()
        self.clock.begin()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.applied is not None:
            self.applied.before_step(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.applied is not None:
            self.applied.after_step()
            self.applied = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        step = state.global_step
        step_s = time.monotonic() - self.resumed_at
        self.training_s += step_s
        self.clock.end()
        self.pace.step_took(step, step_s)
        if step == self.first_step + 1:
            self.rehearse_worst_batch()
            if self.job.plan.measures_itself:
                self.rehearse_evaluation()
            if complaint := device_of(self.job).allocator_warning():
                warnings.warn(complaint, stacklevel=1)  # in the trial's log
        if step in self.examples.evaluation_at_step:
            control.should_log = control.should_save = True  # logs first, then saves: see on_save
            if averages(self.trainer.optimizer):
                self.trainer.optimizer.eval()  # until the next step: what is evaluated and kept
        reason = self.gang.agree(self.stop_requested())
        if reason is not None and step < self.examples.num_steps:
            self.stopped = reason
            control.should_training_stop = True
            if self.is_to_resume(reason):
                control.should_save = True
        if control.should_save:
            require_room(
                Path(args.output_dir),
                self.trainer.model,
                self.trainer.optimizer,
                with_resume_state=self.job.save_resume_state,
            )
        self.random_state = RandomState.now() if args.gradient_accumulation_steps > 1 else None
        self.stepped_at = self.resumed_at = time.monotonic()
        self.clock.begin()
        return control

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Hear a stop between two micro batches; on several devices only between optimizer steps.

        What of the step is done is dropped: the checkpoint is that of the last whole step, random state
        included, so that going on from it gives the same run.
        """
        reason = self.stop_requested() if self.gang.size == 1 else None
        if reason is None:
            return control
        self.stopped = reason
        control.should_training_stop = True
        has_new_step = state.global_step > max(self.first_step, self.saved_step)
        if self.is_to_resume(reason) and has_new_step and self.random_state is not None:
            self.random_state.restore()
            control.should_save = True
            require_room(
                Path(args.output_dir), self.trainer.model, self.trainer.optimizer, with_resume_state=True
            )
        return control

    def is_to_resume(self, reason: StopReason) -> bool:
        """Whether an attempt that stops for this reason is gone on with from where it is."""
        return reason in (StopReason.SHUTDOWN, StopReason.PAUSED) and self.job.save_resume_state

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
        """Move the checkpoint that the trainer has just written into place, evaluate it and report."""
        step = self.saved_step = state.global_step
        if self.trainer.autosft_masks is not None:
            self.trainer.autosft_masks.check()
        checkpoint = self.install_checkpoint(Path(args.output_dir) / f"checkpoint-{step}", step)
        saved_at = time.monotonic()
        evaluation = self.examples.evaluation_at_step.get(step)
        if evaluation is None:
            self.wait_for_upload()
            self.report(self.measurement(step, checkpoint=checkpoint))
            return
        result = self.evaluated(self.eval_data)
        if self.gang.rank == 0:
            result.save(evaluation_path(Path(self.job.output_dir), evaluation), step=step)
        if self.job.report_to:
            self.trainer.log(dict(result.metrics()))
        if not math.isfinite(result.loss):
            self.failure = FailureKind.NON_FINITE_LOSS
            self.message = f"the evaluation loss became {result.loss} at step {step}."
            control.should_training_stop = True
        else:
            self.trained.require_changed(first_step=self.first_step, step=step)
        metrics = result.metrics()
        evaluated_at = time.monotonic()
        if self.prompts is not None and self.failure is None:
            with evaluating():
                metrics += self.prompts.score(
                    Answering.of_trainer(self.trainer),
                    evaluation,
                    step=step,
                    on_batch=self.stop_requested,
                    keep=self.gang.rank == 0,
                )
        self.pace.evaluation_took(
            checkpoint_s=saved_at - self.stepped_at,
            evaluation_s=evaluated_at - saved_at,
            answers_s=time.monotonic() - evaluated_at,
        )
        if self.gang.rank == 0:
            folder = Path(self.job.output_dir)
            for path in (evaluation_path(folder, evaluation), prompt_scores_path(folder, evaluation)):
                publish(self.job, path)
        self.wait_for_upload()
        self.report(self.measurement(step, checkpoint=checkpoint, evaluation=evaluation, metrics=metrics))
        self.resumed_at = time.monotonic()
        self.clock.begin()

    def rehearse_worst_batch(self) -> None:
        """Run the largest micro batch of the whole run forward and backward once, and discard the result.

        After the first optimizer step everything that stays resident is allocated, so a run that cannot fit
        fails now, within seconds.  Gradients and random state are restored: the run is unchanged.
        """
        trainer = self.trainer
        devices = device_of(self.job).generators()
        batch = trainer.data_collator([self.examples.dataset[i] for i in self.examples.worst])
        with torch.random.fork_rng(devices=devices), trainer.compute_loss_context_manager():
            inputs = send_to_device(batch, trainer.args.device)
            trainer.compute_loss(
                trainer.model, inputs, num_items_in_batch=(inputs["labels"] != -100).sum()
            ).backward()
        trainer.model.zero_grad(set_to_none=True)

    def rehearse_evaluation(self) -> None:
        """Evaluate the largest batches, one for each rank, and discard the result.

        Without a predicted bound, this measures what evaluation needs now instead of after a quarter of the
        run.
        """
        lengths = self.eval_data["length"]
        order = sorted(range(len(self.eval_data)), key=lambda i: (-lengths[i], i))
        self.evaluated(self.eval_data.select(order[: self.job.pinned.eval_micro_batch * self.gang.size]))

    def evaluated(self, examples: Dataset) -> Evaluation:
        """Return the model's losses on examples, by all ranks together."""
        with evaluating():
            return evaluate(
                self.trainer.model,
                examples,
                collate=self.collate_eval,
                micro_batch=self.job.pinned.eval_micro_batch,
                device=self.trainer.args.device,
                precision=self.trainer.compute_loss_context_manager(),
                on_batch=self.stop_requested,
                gang=self.gang,
            )

    def install_checkpoint(self, staged: Path, step: int) -> str:
        """Drop what a checkpoint does not need; rename it into place atomically, or start its upload."""
        url = self.job.store_url
        final = checkpoint_dir(Path(self.job.output_dir), step)
        self.gang.wait()  # each rank has written its random state
        if self.gang.rank == 0:
            self.save_generation_config(staged)
            (staged / "training_args.bin").unlink(
                missing_ok=True
            )  # a pickle: not needed, and not safe to load
            name_base(staged, self.job.model)
            if url is None:
                install(staged, final)
            else:
                self.upload = CheckpointUpload(self.job, staged, step=step)
        return str(final) if url is None else checkpoint_url(url, self.job.attempt, step)

    def wait_for_upload(self) -> None:
        """Wait until the checkpoint is uploaded, before it is reported."""
        if self.upload is not None:
            self.upload.wait(self.stop_requested)

    def save_generation_config(self, staged: Path) -> None:
        """Write generation_config.json next to an adapter, which peft omits: servers stop by it."""
        if not (staged / GENERATION_CONFIG_NAME).exists():
            known = self.trainer.model.generation_config
            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            GenerationConfig(**{name: getattr(known, name) for name in names}).save_pretrained(staged)

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
        tokens = self.examples.tokens_at_step
        trained = tokens[step] - tokens[self.first_step]
        return Measurement(
            trial=self.job.trial,
            attempt=self.job.attempt,
            step=step,
            num_steps=self.examples.num_steps,
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
            contents=self.upload.contents if checkpoint is not None and self.upload is not None else None,
            elapsed_s=time.monotonic() - self.started,
            slowdown=self.clock.slowdown if device_of(self.job).uses_host_memory else None,
            temperature_c=temperature_c,
            throttle_reasons=throttle_reasons,
            remaining_s=self.pace.remaining_s(step, is_evaluated=evaluation is not None),
        )
