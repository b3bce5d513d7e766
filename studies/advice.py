"""Rules over the measurements of a run that give the advice an attentive person would.  Pure.

Thresholds are relative to the run itself, since no loss or gradient norm is right for every model.  Each
rule returns one line of advice, or an empty string.  The caller keeps track of what has been shown.
"""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from autosft.profiles.units import gib
from autosft.studies.trial import Measurement

#: Minimum number of reports before a trend is judged, and the minimum share of the run they must span.
MIN_REPORTS = 15
MIN_SHARE = 0.3
#: Minimum relative fall of the loss in a run that learns (in guide 1 it fell by 12 to 24 %).
MIN_FALL = 0.02
#: A relative fall over the whole run that nobody would call none: while it is possible, nothing is said.
CLEAR_FALL = 0.1
#: Standard errors of the fall that are allowed for: more than the usual two, since every report asks again.
NUM_ERRORS = 2.5
#: Minimum relative rise of the evaluation loss over its minimum, over two evaluations.
MIN_RISE = 0.01
#: Gradient norms of a steady run stay within this factor of their median (guide 1: 0.7 to 1.0).
NORM_FACTOR = 10.0
#: Maximum relative loss of throughput before it is reported.
MAX_SLOWDOWN = 0.2
#: Minimum window that throughput is measured over: a process that starts next to the run slows it briefly.
MIN_STRETCH_S = 1.0
#: Steps take so many times their processor time, over so many reports, before it is said.
MIN_SLOWDOWN = 3.0
NUM_STRETCHES = 3
HOT_C = 80.0
#: Maximum share of a device's memory that other processes may take before it is reported.
MIN_TAKEN_BYTES = 512 << 20


class Cause(enum.Enum):
    """What was noticed; reported at most once per trial, or once per study where the machine is the cause."""

    LOSS_NOT_FALLING = "loss not falling"
    OVERFITTING = "overfitting"
    GRADIENT_NORM = "gradient norm"
    SLOWER = "slower"
    MEMORY_TAKEN = "memory taken"
    BUSY = "busy machine"

    @property
    def is_of_machine(self) -> bool:
        return self in (Cause.SLOWER, Cause.MEMORY_TAKEN, Cause.BUSY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One line for the user: what was observed, and what to do about it."""

    trial: int
    step: int
    cause: Cause
    message: str


def watch(reports: Sequence[Measurement], *, max_grad_norm: float = 1.0) -> Iterator[Advice]:
    """Yield the advice that one attempt's reports give rise to; `reports` are in order of arrival."""
    if not reports:
        return
    last = reports[-1]
    for cause, message in (
        (Cause.LOSS_NOT_FALLING, loss_not_falling(reports)),
        (Cause.OVERFITTING, overfitting(reports)),
        (Cause.GRADIENT_NORM, gradient_norm(reports, max_grad_norm=max_grad_norm)),
        (Cause.SLOWER, slower(reports)),
        (Cause.BUSY, busy(reports)),
    ):
        if message:
            yield Advice(trial=last.trial, step=last.step, cause=cause, message=message)


def training_losses(reports: Sequence[Measurement]) -> list[tuple[int, float]]:
    """Return (step, loss) of the progress reports, one per step."""
    found = {
        report.step: report.loss
        for report in reports
        if report.loss is not None and math.isfinite(report.loss)
    }
    return sorted(found.items())


def loss_not_falling(reports: Sequence[Measurement]) -> str:
    """Compare the first third of the losses with the last; said only where noise cannot hide a clear fall.

    A loss that fell within its first steps and stayed there has fallen.
    """
    losses = training_losses(reports)
    if len(losses) < MIN_REPORTS or losses[-1][0] - losses[0][0] < MIN_SHARE * reports[-1].num_steps:
        return ""
    values = [loss for _, loss in losses]
    third = len(values) // 3
    # A spike is no trend, so medians.
    before, now = statistics.median(values[:third]), statistics.median(values[-third:])
    fall, error = before - now, error_of_fall(values, num_each=third)
    # What falls slowly may still have far to fall: at this pace, between the middles of the thirds.
    share = (losses[-third // 2][0] - losses[third // 2][0]) / reports[-1].num_steps
    if fall > MIN_FALL * abs(before) or fall + NUM_ERRORS * error > CLEAR_FALL * abs(before) * share:
        return ""
    if statistics.median(values[:3]) - now > CLEAR_FALL * abs(before):
        return ""
    return (
        f"the training loss is not falling: {before:.3g} at the start, {now:.3g} now, step {losses[-1][0]} "
        f"of {reports[-1].num_steps}. See with autosft data show that the answers are what is learned; then "
        "try three times the learning rate, or more epochs."
    )


def error_of_fall(values: Sequence[float], *, num_each: int) -> float:
    """Return the standard error of the difference of two medians of `num_each` values, for normal noise.

    The noise is estimated from the differences of neighbours: neither a trend nor a spike counts.
    """
    differences = [abs(after - before) for before, after in pairwise(values)]
    noise = 1.4826 * statistics.median(differences) / math.sqrt(2)
    return math.sqrt(math.pi / 2) * noise * math.sqrt(2 / num_each)


def overfitting(reports: Sequence[Measurement]) -> str:
    """Detect an evaluation loss that rose over two evaluations while the training loss fell."""
    evaluations = [
        (report.step, value)
        for report in reports
        if report.is_evaluation and (value := report.metric("eval_loss")) is not None
    ]
    if len(evaluations) < 3:
        return ""
    best_step, best = min(evaluations, key=lambda evaluation: evaluation[1])
    after = [value for step, value in evaluations if step > best_step]
    if len(after) < 2 or min(after[-2:]) < best * (1 + MIN_RISE):
        return ""
    losses = dict(training_losses(reports))
    at_best = [loss for step, loss in losses.items() if step <= best_step][-3:]
    since = [loss for step, loss in losses.items() if step > best_step][-3:]
    if not at_best or not since or statistics.mean(since) >= statistics.mean(at_best):
        return ""
    return (
        f"overfitting: the evaluation loss has risen from {best:.4g} at step {best_step} to {after[-1]:.4g}, "
        "while the training loss falls. The earlier checkpoint is kept; fewer epochs, a smaller learning "
        "rate or more data would help."
    )


def gradient_norm(reports: Sequence[Measurement], *, max_grad_norm: float = 1.0) -> str:
    """Detect norms that leave the run's usual range, or that are always clipped to less than a tenth."""
    norms = [
        report.grad_norm for report in reports if report.grad_norm is not None and not report.is_evaluation
    ]
    if any(not math.isfinite(norm) for norm in norms[-3:]):
        return (
            "the gradient norm is not finite: a smaller learning rate, a longer warm-up, or bf16 instead of "
            "fp16 would help."
        )
    norms = [norm for norm in norms if math.isfinite(norm)]
    if len(norms) < MIN_REPORTS:
        return ""
    usual, recent = statistics.median(norms), norms[-3:]
    if min(recent) > NORM_FACTOR * usual:
        return (
            f"the gradient norm has grown to {recent[-1]:.3g}, {recent[-1] / usual:.0f} times its usual "
            f"{usual:.3g}: the run is about to diverge. A smaller learning rate or a longer warm-up helps."
        )
    if max(recent) < usual / NORM_FACTOR:
        return (
            f"the gradient norm has fallen to {recent[-1]:.3g}, a {usual / max(recent[-1], 1e-30):.0f}th of "
            f"its usual {usual:.3g}: nothing more is learned. Fewer epochs would do."
        )
    if max_grad_norm > 0 and min(norms[-MIN_REPORTS:]) > NORM_FACTOR * max_grad_norm:
        return (
            f"gradients are clipped to less than a tenth at every step (norm {recent[-1]:.3g}, clipped at "
            f"{max_grad_norm:g}): they decide by direction alone. A larger effective batch helps."
        )
    return ""


def paces(reports: Sequence[Measurement]) -> list[float]:
    """Return tokens per second over consecutive windows of at least `MIN_STRETCH_S`, in order.

    Time spent on evaluations is excluded: an evaluation is reported at the step of the report before it.
    """
    found = []
    num_tokens, seconds = 0, 0.0
    for before, after in pairwise(reports):
        if after.num_tokens > before.num_tokens and after.elapsed_s > before.elapsed_s:
            num_tokens += after.num_tokens - before.num_tokens
            seconds += after.elapsed_s - before.elapsed_s
        if seconds >= MIN_STRETCH_S:
            found.append(num_tokens / seconds)
            num_tokens, seconds = 0, 0.0
    return found


def slower(reports: Sequence[Measurement]) -> str:
    """Compare the latest throughput with the best that the run has sustained, and look for the reason."""
    found = paces(reports)
    if len(found) < MIN_REPORTS:
        return ""
    window = 5
    held = [statistics.median(found[start : start + window]) for start in range(len(found) - window + 1)]
    best, now = max(held), held[-1]
    if now > (1 - MAX_SLOWDOWN) * best:
        return ""
    last = reports[-1]
    text = f"{now:,.0f} tokens/s, {1 - now / best:.0%} slower than before"
    reasons = ", ".join(last.throttle_reasons or ())
    heat = "" if last.temperature_c is None else f" at {last.temperature_c:.0f} °C"
    if reasons:
        return f"{text}: the GPU slows itself down{heat} ({reasons}). Cool it, or plug the machine in."
    if last.temperature_c is not None and last.temperature_c >= HOT_C:
        return f"{text}{heat}: let air in, or lower the power limit for a steady pace."
    return f"{text}{heat}. Something else may use the machine, or its power mode has changed: autosft doctor."


def busy(reports: Sequence[Measurement]) -> str:
    """Tell when steps on a CPU take much longer than the processor works for them."""
    known = [report.slowdown for report in reports if report.slowdown is not None][-NUM_STRETCHES:]
    if len(known) < NUM_STRETCHES or min(known) < MIN_SLOWDOWN:
        return ""
    return (
        f"steps take {statistics.median(known):.0f} times as long as the processor works for them: other "
        "programs use the machine, and what is predicted of time is too short by that much."
    )


def memory_taken(*, free_before_bytes: int, promised_bytes: int, free_bytes: int, holders: str) -> str:
    """Detect that a device has less free memory than at the start, minus what running trials may use.

    `holders` names the other processes on it; empty if they are not known.
    """
    taken = free_before_bytes - promised_bytes - free_bytes
    if taken < max(MIN_TAKEN_BYTES, free_before_bytes // 20):
        return ""
    who = f" ({holders})" if holders else ""
    return (
        f"another process has taken {gib(taken)} of the device's memory{who}: trials to come may not fit. "
        "Close it, or it will be waited for."
    )
