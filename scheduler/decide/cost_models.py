"""Predicted memory and time of a run, in one place for plans, studies and training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from autosft.profiles.dataset.prepared import PreparedData, Split, length_profile
from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.memory.estimate import Evaluation, estimate
from autosft.profiles.memory.host_kernels import (
    Rows,
    compiles_per_shape,
    kernels,
    padded_lengths,
    with_kernels,
)
from autosft.profiles.model.profile import ModelProfile
from autosft.profiles.recipe import (
    LengthProfile,
    MemoryEstimate,
    Method,
    Precision,
    RunTime,
    Sharding,
    StepRecipe,
    why_tie_not_sharded,
)
from autosft.profiles.speed.measured import KindOfRun
from autosft.profiles.speed.step_work import num_trained
from autosft.profiles.speed.throughput import (
    ThroughputEstimate,
    like_measured,
    predict_checkpoint_s,
    predict_evaluation_s,
    predict_generation_s,
    predict_start_s,
    predict_step_s,
)
from autosft.scheduler.decide.history import NOTHING_LEARNED, Learned
from autosft.scheduler.decide.measured_memory import MAX_EVAL_MICRO_BATCH
from autosft.scheduler.decide.planner import Costs, StepSpeed
from autosft.studies.trial import TrainingSettings

#: The lengths of training examples: (truncation length, rounds that conversations are cut to) -> lengths.
Lengths = Callable[[int, int | None], LengthProfile]

#: Maximum number of prompts that are answered in a batch (`workers.scoring.generation`).
ANSWER_BATCH = 64
#: What trials measure where fp32 is the default (a CPU): predicted without it, they ended at their cap.
HOST_KERNELS = "the 16-bit kernels of a CPU, which allocate copies that are no tensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The prompts that a model answers at each evaluation, for a metric of prompts."""

    num_prompts: int
    mean_prompt_tokens: float
    max_new_tokens: int


class Models:
    """The memory and speed models of one model and its data's lengths; results are cached."""

    def __init__(
        self,
        model: ModelProfile,
        lengths: Lengths,
        *,
        eval_lengths: Callable[[int], LengthProfile] | None = None,
        num_evaluations: int = 0,
        answers: Answers | None = None,
        learned: Learned = NOTHING_LEARNED,
        cache_dir: Path | None = None,
    ) -> None:
        """`learned` is what earlier trials have measured; traces are cached in `cache_dir`."""
        self.model, self.num_evaluations, self.answers = model, num_evaluations, answers
        self.learned, self.cache_dir = learned, cache_dir
        self.lengths = cache(lengths)
        self.eval_lengths = None if eval_lengths is None else cache(eval_lengths)
        self.predict = cache(self._predict)
        self.costs = Costs(
            memory=self.predict, speed=self.speed, measured=learned.measured_memory(model.fingerprint)
        )
        self.estimate = cache(self.costs.memory_of)
        self._padded = cache(padded_lengths)
        self.step = cache(self._predict_step)

    @classmethod
    def of_data(
        cls,
        model: ModelProfile,
        data: PreparedData,
        num_evaluations: int,
        *,
        answers: Answers | None = None,
        learned: Learned = NOTHING_LEARNED,
        cache_dir: Path | None = None,
    ) -> Models:
        """Return the cost models of a model on prepared data."""
        # Trials may cut conversations to different numbers of rounds: without a number, assume the longest.
        longest = max((rounds.max_rounds for rounds in data.rounds), default=None)

        def lengths(seq_len: int, max_rounds: int | None) -> LengthProfile:
            return length_profile(data, seq_len, max_rounds=max_rounds or longest)

        return cls(
            model,
            lengths,
            eval_lengths=lambda seq_len: length_profile(data, seq_len, Split.EVAL),
            num_evaluations=num_evaluations,
            answers=answers,
            learned=learned,
            cache_dir=cache_dir,
        )

    def rows(
        self, seq_len: int, max_rounds: int | None, precision: Precision, device: DeviceProfile
    ) -> LengthProfile:
        """Return the training examples as long as the rows that a device makes of them."""
        lengths = self.lengths(seq_len, max_rounds)
        return self._padded(lengths) if compiles_per_shape(precision, device.kind) else lengths

    def _predict(
        self, recipe: StepRecipe, micro_batch: int, seq_len: int, device: DeviceProfile
    ) -> MemoryEstimate:
        """Predict the memory of a step on this data's lengths: a planner.Estimator."""
        lengths = self.rows(seq_len, recipe.max_rounds, recipe.precision, device)
        evaluation = self._evaluation(recipe, micro_batch, seq_len, device)
        memory = estimate(
            self.model,
            recipe,
            micro_batch,
            lengths,
            device,
            calibration=self.learned.memory,
            cache_dir=self.cache_dir,
            evaluation=evaluation,
        )
        memory = replace(memory, longest=lengths.longest)
        if compiles_per_shape(recipe.precision, device.kind):
            evaluated = None if evaluation is None else evaluation.lengths
            rows = Rows(micro_batch=micro_batch, lengths=lengths, evaluated=evaluated)
            memory = self._with_kernels(memory, recipe, rows, device)
        if memory.untraced:
            memory = replace(memory, floor_bytes=self._floor_bytes(memory, recipe))
        trains_shards = recipe.sharding is Sharding.FSDP and recipe.adapter is None
        is_split = trains_shards and self.model.has_tied_embeddings
        reason = why_tie_not_sharded(self.model.vocab_size, recipe.data_parallel) if is_split else ""
        if not reason:
            return memory
        way_out = "Train replicas (DDP), or use a number of devices that divides the rows."
        return replace(memory, refused=reason, way_out=way_out)

    def _with_kernels(
        self, memory: MemoryEstimate, recipe: StepRecipe, rows: Rows, device: DeviceProfile
    ) -> MemoryEstimate:
        """Return a step's memory with what its device compiles; without a bound where that is unknown."""
        taken = kernels(self.model, recipe, rows) if device.supports_bf16 else None
        if taken is not None:
            return with_kernels(memory, taken)
        untraced = (*memory.untraced, HOST_KERNELS)
        return replace(memory, untraced=untraced, way_out="Use --precision fp32.")

    def _floor_bytes(self, guess: MemoryEstimate, recipe: StepRecipe) -> int:
        """Return the bytes of weights and optimizer state of a step that could not be traced.

        The closed form reads shapes from the configuration, in which a user's own model may use other names;
        the result never exceeds what the real parameters take.
        """
        parts = dict(guess.components)
        shards = recipe.data_parallel if recipe.sharding is Sharding.FSDP else 1
        weight_bytes = self.model.num_parameters * recipe.precision.weight_bytes
        if recipe.method is Method.QLORA:
            weight_bytes = self.model.num_parameters // 2
        state_bytes = 8 * num_trained(self.model, recipe)
        return min(parts.get("parameters", 0), weight_bytes // shards) + min(
            parts.get("optimizer state", 0), state_bytes // shards
        )

    def _evaluation(
        self, recipe: StepRecipe, micro_batch: int, seq_len: int, device: DeviceProfile
    ) -> Evaluation | None:
        """Return what a trial evaluates; None if there are no evaluation examples."""
        lengths = None if self.eval_lengths is None else self.eval_lengths(recipe.eval_seq_len or seq_len)
        if lengths is None or not lengths.lengths:
            return None
        if compiles_per_shape(recipe.precision, device.kind):
            lengths = self._padded(lengths)
        at_once = recipe.eval_micro_batch or min(micro_batch, MAX_EVAL_MICRO_BATCH)
        return Evaluation(micro_batch=at_once, lengths=lengths)

    def _predict_step(
        self, recipe: StepRecipe, micro_batch: int, seq_len: int, device: DeviceProfile, num_threads: int
    ) -> ThroughputEstimate:
        """Predict the seconds of an optimizer step on this data's lengths, corrected by earlier trials."""
        cold = self.uncorrected_step(recipe, micro_batch, seq_len, device, num_threads=num_threads)
        ratio = self.speed_ratio(recipe, device, num_threads)
        return cold if ratio is None else like_measured(cold, ratio)

    def uncorrected_step(
        self, recipe: StepRecipe, micro_batch: int, seq_len: int, device: DeviceProfile, *, num_threads: int
    ) -> ThroughputEstimate:
        """Predict the seconds of an optimizer step on this data's lengths by the device's rates alone."""
        rows = self.rows(seq_len, recipe.max_rounds, recipe.precision, device)
        step = predict_step_s(
            self.model,
            recipe,
            micro_batch,
            rows,
            device,
            num_threads=num_threads,
            plain_head=recipe.has_full_logits,
        )
        given = self.lengths(seq_len, recipe.max_rounds)
        if rows is given:
            return step
        # What rows are padded to is no work that anybody asked for.
        real = sum(given.lengths) / sum(rows.lengths)
        return replace(step, tokens_per_s=real * step.tokens_per_s)

    def speed_ratio(self, recipe: StepRecipe, device: DeviceProfile, num_threads: int) -> float | None:
        """Return the speed of similar trials over the uncorrected prediction; None if there were none."""
        return self.learned.speed.ratio(
            KindOfRun(
                model_fingerprint=self.model.fingerprint,
                device_name=device.name,
                num_threads=num_threads,
                method=recipe.method,
                precision=recipe.precision,
            )
        )

    def speed(
        self,
        recipe: StepRecipe,
        micro_batch: int,
        settings: TrainingSettings,
        device: DeviceProfile,
        num_threads: int,
    ) -> StepSpeed:
        """Predict the speed of a run with its evaluations: a planner.SpeedModel."""
        step = self.step(recipe, micro_batch, settings.seq_len, device, num_threads)
        num_steps = max(1, settings.num_train_examples // settings.effective_batch_size)
        ratio = self.speed_ratio(recipe, device, num_threads) or 1.0
        evaluation_s = self.evaluation_s(
            settings.seq_len, device, num_threads, precision=recipe.precision, micro_batch=micro_batch
        )
        run_time = RunTime(
            start_s=predict_start_s(self.model, recipe, step),
            training_s=num_steps * step.step_s,
            num_evaluations=self.num_evaluations,
            evaluation_s=evaluation_s / ratio,
            answers_s=self.answers_s(device, num_threads, precision=recipe.precision) / ratio,
            checkpoint_s=predict_checkpoint_s(self.model, recipe),
        )
        return StepSpeed(
            tokens_per_s=step.tokens_per_s,
            run_s=run_time.total_s,
            device_share=busy_share(step),
            run_time=run_time,
            correction=ratio,
        )

    def evaluation_s(
        self,
        seq_len: int,
        device: DeviceProfile,
        num_threads: int,
        *,
        precision: Precision,
        micro_batch: int,
    ) -> float:
        """Predict the seconds of one evaluation; 0 if there are no evaluation examples."""
        if self.eval_lengths is None:
            return 0.0
        return predict_evaluation_s(
            self.model,
            precision,
            min(micro_batch, MAX_EVAL_MICRO_BATCH),
            self._padded(self.eval_lengths(seq_len))
            if compiles_per_shape(precision, device.kind)
            else self.eval_lengths(seq_len),
            device,
            num_threads=num_threads,
        )

    def answers_s(self, device: DeviceProfile, num_threads: int, *, precision: Precision) -> float:
        """Predict the seconds of answering the prompts once; 0 if there are none.

        Assumes that some answer in each batch reaches the maximum length.
        """
        if self.answers is None:
            return 0.0
        batch = min(self.answers.num_prompts, ANSWER_BATCH)
        batch_s = predict_generation_s(
            self.model,
            precision,
            device,
            batch=batch,
            prompt_length=self.answers.mean_prompt_tokens,
            num_new_tokens=self.answers.max_new_tokens,
            num_threads=num_threads,
        )
        return batch_s * self.answers.num_prompts / batch


def busy_share(step: ThroughputEstimate) -> float:
    """Return the share of a step in which the device computes: neither Python overhead nor communication."""
    waiting = ("launching kernels", "communication between GPUs")
    idle_s = sum(seconds for part, seconds in step.parts if part in waiting)
    return min(1.0, max(0.0, 1.0 - idle_s / step.step_s))
