"""Memory that trials of a model have used, and what it implies for later trials.  Pure.

Most steps are traced, and their predictions hold.  Two kinds of run teach more than a calibration does:

- **A step that cannot be traced.**  Its first trial measures itself; the peak, with a margin, is the estimate
  of every later trial that needs no more.  A larger micro batch, longer examples or a larger evaluation batch
  are bounded by a line from what does not depend on them (weights and optimizer state) through the peak;
  attention may grow with the square of the length, so lengths are scaled by their square.
- **A step that used more than its bound**, or ran out of memory under it: the prediction is wrong for
  all steps of its kind (because of a user's loss, for example).  The measured excess is added to the
  prediction, scaled in the same way; until a trial has run to measure it, trials of the kind measure
  themselves.

A step that ran out of memory is not retried with as many rows or more.  Limits: a measured peak is assumed to
hold for all devices of the same name, whatever library versions it was measured with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from autosft.profiles.recipe import (
    AdapterSettings,
    ByteRange,
    Checkpointing,
    MemoryEstimate,
    Sharding,
    StepRecipe,
)
from autosft.profiles.units import gib

#: The upper bound exceeds the measured peak by this share and this many bytes: runs of the same step vary.
MARGIN_RATIO = 1.10
MARGIN_BYTES = 32 << 20
#: Share of its peak of live tensors that the caching allocator was measured to need on top, under a cap.
FRAGMENTATION_RATIO = 1.25
#: `MemoryEstimate.method` of an estimate that rests on measured trials alone.
MEASURED = "measured"
#: Maximum evaluation batch (`cost_models`); used if a study has not pinned its own.
MAX_EVAL_MICRO_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """Memory that one attempt used, next to its prediction."""

    recipe: StepRecipe
    micro_batch: int
    longest: int  # tokens of its longest training example
    device_name: str
    cap_bytes: int  # limit of its allocator
    peak_bytes: int | None  # live tensors on CUDA, resident memory on the CPU
    reserved_bytes: int | None  # by CUDA's caching allocator
    out_of_memory: bool
    predicted: MemoryEstimate
    while_evaluating: bool = False  # it ran out in an evaluation, where fewer training rows would not help
    measured_itself: bool = False  # its cap was all free memory

    @property
    def held_bytes(self) -> int | None:
        """Return a cap under which the run would have succeeded; None if nothing was measured."""
        if self.peak_bytes is None or self.reserved_bytes is None:
            return self.peak_bytes
        return min(self.reserved_bytes, int(self.peak_bytes * FRAGMENTATION_RATIO))

    @property
    def is_informative(self) -> bool:
        """Whether it says more than that the prediction held."""
        if self.out_of_memory:
            return True
        held = self.held_bytes
        was_predicted = not self.predicted.untraced and not rests_on_trials(self.predicted)
        return held is not None and (not was_predicted or held > self.predicted.need.upper_bytes)

    @property
    def refutes_prediction(self) -> bool:
        """Whether the run showed that its step uses more than predicted."""
        held = self.held_bytes or 0
        return self.out_of_memory or held > self.predicted.need.upper_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredMemory:
    """The runs of one model that add information to its predictions."""

    runs: tuple[MeasuredRun, ...] = ()

    def with_run(self, run: MeasuredRun) -> MeasuredMemory:
        """Return the knowledge after one more run; the same object if that adds nothing."""
        if not run.is_informative or any(_says_as_much(other, run) for other in self.runs):
            return self
        others = tuple(other for other in self.runs if not _says_as_much(run, other))
        return MeasuredMemory(runs=(*others, run))

    def estimate(
        self, predicted: MemoryEstimate, recipe: StepRecipe, micro_batch: int, seq_len: int, device_name: str
    ) -> MemoryEstimate:
        """Return the estimate of a step according to trials; `predicted` if they imply nothing.

        `untraced` is empty if measurements bound the step, and otherwise names what is unknown: then only a
        trial that measures itself may run it.
        """
        if not self.runs or predicted.refused:
            return predicted
        asked = _Asked(recipe=recipe, micro_batch=micro_batch, longest=predicted.longest or seq_len)
        same_device = [run for run in self.runs if run.device_name == device_name]
        if predicted.untraced:
            akin = [run for run in same_device if _kind(run.recipe) == _kind(recipe)]
            bounds = [_bound_by_line(run, predicted, asked) for run in akin if not run.out_of_memory]
        else:
            akin = [run for run in same_device if _loss_kind(run.recipe) == _loss_kind(recipe)]
            if not any(run.refutes_prediction for run in akin):
                return predicted
            bounds = [_bound_by_excess(run, predicted, asked) for run in akin if not run.out_of_memory]
        ran_out = [run for run in akin if run.out_of_memory and not run.while_evaluating]
        need = _tightest([bound for bound in bounds if bound is not None])
        if need is None:
            return replace(predicted, untraced=predicted.untraced or (_why_refuted(ran_out),))
        evaluating = [run for run in akin if run.while_evaluating and _evaluates_as_much(asked, run)]
        beyond = [run for run in ran_out if _is_beyond(asked, run)] + evaluating
        if any(need.median_bytes <= run.cap_bytes for run in beyond):
            return replace(predicted, untraced=predicted.untraced or (_why_refuted(ran_out),))
        return _as_measured(predicted, need, num_runs=len(bounds))

    def known_need_bytes(self, recipe: StepRecipe, micro_batch: int, longest: int, device_name: str) -> int:
        """Return a lower bound on a step's need, from measured steps that are no larger; 0 without any."""
        asked = _Asked(recipe=recipe, micro_batch=micro_batch, longest=longest)
        return max(
            (
                run.held_bytes or 0
                for run in self.runs
                if not run.out_of_memory
                and run.device_name == device_name
                and _kind(run.recipe) == _kind(recipe)
                and _is_beyond(asked, run)
            ),
            default=0,
        )

    def ran_out(self, recipe: StepRecipe, micro_batch: int, longest: int, device_name: str) -> bool:
        """Whether a step needs at least as much as one that ran out of memory."""
        asked = _Asked(recipe=recipe, micro_batch=micro_batch, longest=longest)
        if any(_is_beyond(asked, run) for run in self._of_memory(recipe, longest, device_name)):
            return True
        return any(
            _evaluates_as_much(asked, run)
            for run in self.runs
            if run.out_of_memory
            and run.while_evaluating
            and run.measured_itself
            and run.device_name == device_name
            and _loss_kind(run.recipe) == _loss_kind(recipe)
            and _is_spread_alike(recipe, run.recipe)
        )

    def rows_that_ran_out(self, recipe: StepRecipe, longest: int, device_name: str) -> int | None:
        """Return the smallest micro batch that ran out of memory, distributed alike; None if none did."""
        return min(
            (run.micro_batch for run in self._of_memory(recipe, longest, device_name)),
            default=None,
        )

    def guess_that_ran_out(self, recipe: StepRecipe, device_name: str) -> int | None:
        """Return the smallest prediction for a step of its kind that ran out of memory, None if none did."""
        return min(
            (
                run.predicted.need.median_bytes
                for run in self.runs
                if run.out_of_memory
                and not run.while_evaluating
                and run.device_name == device_name
                and _loss_kind(run.recipe) == _loss_kind(recipe)
            ),
            default=None,
        )

    def has_run_out(self, device_name: str) -> bool:
        """Whether anything ran out of memory on a device of this name."""
        return any(run.out_of_memory and run.device_name == device_name for run in self.runs)

    def _of_memory(self, recipe: StepRecipe, longest: int, device_name: str) -> list[MeasuredRun]:
        """Return the runs out of memory with examples no longer than these, distributed in the same way."""
        return [
            run
            for run in self.runs
            if run.out_of_memory
            and not run.while_evaluating
            and run.device_name == device_name
            and run.longest <= longest
            and _loss_kind(run.recipe) == _loss_kind(recipe)
            and _is_spread_alike(recipe, run.recipe)
        ]


NOTHING_MEASURED = MeasuredMemory()


def measured_memory(runs: Iterable[MeasuredRun]) -> MeasuredMemory:
    """Combine the measurements of several runs."""
    memory = NOTHING_MEASURED
    for run in runs:
        memory = memory.with_run(run)
    return memory


def rests_on_trials(memory: MemoryEstimate) -> bool:
    """Whether an estimate was measured, or corrected by measurements of trials."""
    return MEASURED in memory.method


# Comparing a step with a run


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    recipe: StepRecipe
    micro_batch: int
    longest: int


def _kind(recipe: StepRecipe) -> object:
    """Return what two steps must share for one to bound the other's memory."""
    return (
        _loss_kind(recipe),
        recipe.checkpointing,
        recipe.sharding,
        recipe.data_parallel,
        recipe.optimizer,
        recipe.generation,
        None if recipe.adapter is None else replace(recipe.adapter, rank=1, alpha=1.0, dropout=0.0),
    )


def _loss_kind(recipe: StepRecipe) -> object:
    """Return what determines whether a prediction is wrong in the same way."""
    return (
        recipe.method,
        recipe.precision,
        recipe.attention,
        recipe.padding_free,
        recipe.loss,
        recipe.trainer,
    )


def _is_spread_alike(recipe: StepRecipe, other: StepRecipe) -> bool:
    """Whether a device holds at least as much of `recipe` as of `other`, which ran out of memory.

    A replica (DDP) holds as much as a single device; a shard holds less the more devices there are.
    """
    if recipe.sharding is Sharding.FSDP:
        return other.sharding is Sharding.FSDP and recipe.data_parallel <= other.data_parallel
    return True


def _evaluated(recipe: StepRecipe, micro_batch: int) -> int:
    return recipe.eval_micro_batch or min(micro_batch, MAX_EVAL_MICRO_BATCH)


def _is_beyond(asked: _Asked, run: MeasuredRun) -> bool:
    """Whether a step needs at least as much, in every respect, as one that ran out of memory."""
    recipe, other = asked.recipe, run.recipe
    is_spared = recipe.checkpointing is not Checkpointing.OFF and other.checkpointing is Checkpointing.OFF
    return (
        not is_spared
        and recipe.optimizer == other.optimizer
        and _is_spread_alike(recipe, other)
        and _rank(recipe.adapter) >= _rank(other.adapter)
        and asked.micro_batch >= run.micro_batch
        and asked.longest >= run.longest
        and _evaluated(recipe, asked.micro_batch) >= _evaluated(other, run.micro_batch)
    )


def _evaluates_as_much(asked: _Asked, run: MeasuredRun) -> bool:
    return _evaluated(asked.recipe, asked.micro_batch) >= _evaluated(run.recipe, run.micro_batch)


def _rank(adapter: AdapterSettings | None) -> int:
    return 0 if adapter is None else adapter.rank


def _scale(asked: _Asked, run: MeasuredRun) -> float:
    """Return the factor by which a step's batch-dependent memory can exceed a run's; 1 if nothing is larger.

    Linear in rows and in the adapter's rank, quadratic in the length, as attention may be.
    """
    rows = max(1.0, asked.micro_batch / run.micro_batch)
    length = max(1.0, asked.longest / max(1, run.longest)) ** 2
    evaluated = _evaluated(asked.recipe, asked.micro_batch) / _evaluated(run.recipe, run.micro_batch)
    eval_length = max(1.0, (asked.recipe.eval_seq_len or 1) / (run.recipe.eval_seq_len or 1)) ** 2
    rank = max(1.0, _rank(asked.recipe.adapter) / max(1, _rank(run.recipe.adapter)))
    return max(rows * length, evaluated * eval_length) * rank


def _bound_by_line(run: MeasuredRun, predicted: MemoryEstimate, asked: _Asked) -> ByteRange | None:
    """Bound a step by a line from its constant memory through the peak of a run of its kind."""
    held = run.held_bytes
    if held is None:
        return None
    scale = _scale(asked, run)
    floor = min(predicted.floor_bytes, held)
    median = floor + int((held - min(run.predicted.floor_bytes or floor, held)) * scale)
    median = max(median, held) if scale == 1.0 else median
    median += _gradients_kept(run, predicted, asked)
    upper = upper_bytes(median)
    if median <= held:
        upper = max(held, min(upper, run.cap_bytes))  # the run did succeed under its cap
    return ByteRange(median_bytes=median, upper_bytes=upper)


def _bound_by_excess(run: MeasuredRun, predicted: MemoryEstimate, asked: _Asked) -> ByteRange | None:
    """Bound a step by its prediction plus a run's scaled excess over its own prediction."""
    held = run.held_bytes
    if held is None:
        return None
    before = run.predicted.uncalibrated_bytes or run.predicted.need.median_bytes
    excess = int(max(0, held - before) * _scale(asked, run))
    median = predicted.need.median_bytes + excess
    upper = max(predicted.need.upper_bytes, upper_bytes(median))
    return ByteRange(median_bytes=median, upper_bytes=upper)


def upper_bytes(held_bytes: int) -> int:
    """Return the upper bound of a step that was measured to hold so many bytes."""
    return int(held_bytes * MARGIN_RATIO) + MARGIN_BYTES


def _gradients_kept(run: MeasuredRun, predicted: MemoryEstimate, asked: _Asked) -> int:
    """Return the gradients that coexist with the next forward pass, if the run accumulated none."""
    is_new = asked.recipe.gradient_accumulation > 1 and run.recipe.gradient_accumulation == 1
    return dict(predicted.components).get("gradients", 0) if is_new else 0


def _tightest(bounds: list[ByteRange]) -> ByteRange | None:
    return min(bounds, key=lambda bound: bound.upper_bytes, default=None)


def _as_measured(predicted: MemoryEstimate, need: ByteRange, *, num_runs: int) -> MemoryEstimate:
    """Return an estimate that rests on measured trials."""
    was_traced = not predicted.untraced
    parts = dict(predicted.components)
    parts["activations"] = parts.get("activations", 0) + need.median_bytes - sum(parts.values())
    if parts["activations"] < 0:  # the guess was too large
        share = need.median_bytes / max(1, sum(size for size in dict(predicted.components).values()))
        parts = {name: int(size * share) for name, size in predicted.components}
        parts["activations"] = parts.get("activations", 0) + need.median_bytes - sum(parts.values())
    return replace(
        predicted,
        allocated=need,
        need=need,
        uncapped=ByteRange(
            median_bytes=max(need.median_bytes, predicted.uncapped.median_bytes if was_traced else 0),
            upper_bytes=max(need.upper_bytes, predicted.uncapped.upper_bytes if was_traced else 0),
        ),
        components=tuple(parts.items()),
        method=f"{predicted.method}, corrected by {MEASURED} trials" if was_traced else MEASURED,
        bound_level=predicted.bound_level if was_traced else num_runs / (num_runs + 1),
        num_calibration_rows=num_runs,
        untraced=(),
        way_out="",
        uncalibrated_bytes=predicted.uncalibrated_bytes if was_traced else 0,
    )


def _why_refuted(ran_out: list[MeasuredRun]) -> str:
    if not ran_out:
        return "what evaluating takes (it ran out of memory)"
    least = min(ran_out, key=lambda run: (run.micro_batch, run.cap_bytes))
    return f"what the step takes (micro batch {least.micro_batch} ran out of {gib(least.cap_bytes)})"


def _says_as_much(known: MeasuredRun, run: MeasuredRun) -> bool:
    """Whether a known run implies everything that another does."""
    outcomes = [(each.out_of_memory, each.while_evaluating, each.device_name) for each in (known, run)]
    if outcomes[0] != outcomes[1]:
        return False
    if _coordinates(known) != _coordinates(run):
        return False
    if known.out_of_memory:
        return known.cap_bytes >= run.cap_bytes
    return (known.held_bytes or 0) >= (run.held_bytes or 0)


def _coordinates(run: MeasuredRun) -> object:
    """Return everything that a run's memory depends on."""
    recipe = run.recipe
    return (
        _kind(recipe),
        _rank(recipe.adapter),
        run.micro_batch,
        run.longest,
        recipe.gradient_accumulation > 1,
        _evaluated(recipe, run.micro_batch),
        recipe.eval_seq_len,
    )
