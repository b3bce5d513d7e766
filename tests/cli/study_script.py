"""A study as a script of events, for looking at outputs without running anything.

`python tests/cli/study_script.py [--seconds 20] [--trials 12] [--plain | --json]` plays it on this terminal.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from autosft.profiles.recipe import ByteRange, Checkpointing, MemoryEstimate, Method, Sharding
from autosft.scheduler.events import (
    AdviceGiven,
    NewBest,
    Note,
    StudyEvent,
    StudyOpened,
    TrialEnded,
    TrialForecast,
    TrialMeasured,
    TrialStarted,
    UntunedScored,
    Waiting,
)
from autosft.scheduler.finish.conclusion import Conclusion
from autosft.studies.intervals import Interval
from autosft.studies.results.over_untuned import OverUntuned
from autosft.studies.results.paired import PairedDifference
from autosft.studies.trial import (
    ExecutionPlan,
    Measurement,
    TrainingSettings,
    TrialRecord,
    TrialState,
)

MIB = 1 << 20
NUM_STEPS = 150
EVALUATIONS = (38, 75, 113, 150)

OVER_UNTUNED = OverUntuned(
    metric="eval_loss",
    untuned=2.5131,
    tuned=0.5074,
    difference=PairedDifference(
        metric="eval_loss",
        gain=Interval(value=2.0057, standard_error=0.05, low=1.8957, high=2.1157, num_examples=160),
        is_loss=True,
        minimize=True,
    ),
)

ESTIMATE = MemoryEstimate(
    allocated=ByteRange(median_bytes=300 * MIB, upper_bytes=380 * MIB),
    need=ByteRange(median_bytes=320 * MIB, upper_bytes=420 * MIB),
    uncapped=ByteRange(median_bytes=350 * MIB, upper_bytes=450 * MIB),
    outside_bytes=0,
    components=(("parameters", 100 * MIB), ("activations", 200 * MIB)),
    peak_phase="loss backward",
    peak_owner="activations",
    method="closed form",
    bound_level=0.95,
    num_calibration_rows=0,
    untraced=(),
)
PLAN = ExecutionPlan(
    device_name="AMD EPYC",
    micro_batch=16,
    gradient_accumulation=2,
    data_parallel=1,
    checkpointing=Checkpointing.OFF,
    sharding=Sharding.NONE,
    num_threads=1,
    memory_cap_bytes=420 * MIB,
    estimate=ESTIMATE,
    predicted_tokens_per_s=9000.0,
    predicted_duration_s=12.0,
    reason="micro batch 16: larger ones are predicted to be no more than 3 % faster.",
)
SETTINGS = TrainingSettings(
    learning_rate=1e-3,
    lr_scheduler="cosine",
    warmup_ratio=0.1,
    weight_decay=0.01,
    effective_batch_size=32,
    seq_len=64,
    method=Method.FULL,
    optimizer="adamw_torch",
    adapter=None,
    num_train_examples=4800,
    max_grad_norm=1.0,
    adam_beta1=0.9,
    adam_beta2=0.999,
    adam_epsilon=1e-8,
    seed=0,
)
OPENED = StudyOpened(
    study="demo",
    plan_lines=(
        "Device: AMD EPYC, 2 cores, 21.4 of 23.5 GiB free: two trials at once, one thread each.",
        "Model: llama, 1,412,096 parameters, full fine-tuning in fp32.",
        "Data: messages, 3,600 examples (median 24 tokens, longest 57); length 64 cuts nothing.",
        "Fits: micro batch 16 x 2 = 32 examples a step, 320 MiB (at most 420 MiB) of 9.6 GiB.",
        "12 trials of 150 steps, evaluated four times; hopeless ones are stopped early.",
    ),
    num_trials=12,
    num_finished=0,
    metric="eval_loss",
    minimize=True,
    deadline=None,
)


def record(number: int, state: TrialState = TrialState.RUNNING, **changes: object) -> TrialRecord:
    """Return a trial with plausible settings."""
    rate = (1e-3, 3e-3, 3.3e-4)[number] if number < 3 else 1e-4 * 1.7 ** (number % 9)
    batch = 32 if number < 3 else (16, 32, 64)[number % 3]
    scheduler = "cosine" if number < 3 else ("cosine", "linear", "constant_with_warmup")[number % 3]
    base = TrialRecord(
        number=number,
        state=state,
        settings=replace(SETTINGS, learning_rate=rate),
        parameters=(
            ("effective_batch_size", batch),
            ("learning_rate", rate),
            ("lr_scheduler", scheduler),
            ("warmup_ratio", 0.1 if number < 3 else 0.02 * (number % 10)),
            ("weight_decay", 0.01 if number < 3 else 0.01 * (number % 7)),
        ),
        origin="default" if number == 0 else "neighbour" if number < 3 else "sampler",
        plan=PLAN,
        num_attempts=1,
        value=None,
        best_step=None,
        best_checkpoint=None,
        failure=None,
        message="",
        measurements=(),
        started_at=0.0,
        finished_at=None,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def measurement(trial: int, step: int, *, value: float | None = None, step_s: float = 0.08) -> Measurement:
    """Return a report; an evaluation where a value is given."""
    return Measurement(
        trial=trial,
        attempt=1,
        step=step,
        num_steps=NUM_STEPS,
        num_tokens=step * 768,
        loss=3.2 * math.exp(-step / (60 + 10 * trial)) + 0.3,
        grad_norm=0.8,
        learning_rate=1e-3,
        tokens_per_s=9123.0 + 37 * trial,
        peak_allocated_bytes=(280 + step // 10) * MIB,
        peak_reserved_bytes=None,
        metrics=() if value is None else (("eval_loss", value), ("eval_tokens", 5321.0)),
        evaluation=None if value is None else EVALUATIONS.index(step) + 1,
        checkpoint=None if value is None else f"/data/studies/demo/trial-{trial:04d}/step-{step}",
        elapsed_s=step * step_s,
    )


def trial_events(number: int, *, stops_after: int | None = None) -> Iterator[StudyEvent]:
    """Yield all events of a trial; stopped by the pruner after evaluation `stops_after`."""
    yield TrialStarted(record=record(number), attempt=1, device_names=("AMD EPYC",))
    value = 2.0
    for step in range(5, NUM_STEPS + 1):
        if step in EVALUATIONS:
            value = 0.45 + abs(5 - number % 8) * 0.11 + 1.6 * math.exp(-step / 45)
            yield TrialMeasured(measurement=measurement(number, step, value=value))
            if step != NUM_STEPS:
                yield forecast(number, end=value - 0.1, goes_on=EVALUATIONS.index(step) + 1 != stops_after)
            if stops_after and EVALUATIONS.index(step) + 1 == stops_after:
                ended = record(number, TrialState.STOPPED, value=value, best_step=step)
                yield TrialEnded(record=ended)
                return
        elif step % 5 == 0:
            yield TrialMeasured(measurement=measurement(number, step))
    yield TrialEnded(record=record(number, TrialState.COMPLETED, value=value, best_step=NUM_STEPS))


def forecast(number: int, *, end: float, goes_on: bool) -> TrialForecast:
    reason = "it promises most per token" if goes_on else "new settings promise 2.3 times as much per token"
    return TrialForecast(
        trial=number,
        end=end,
        low=end - 0.05,
        high=end + 0.06,
        gain=0.01,
        cost=0.3,
        goes_on=goes_on,
        reason=reason,
    )


def study_events(num_trials: int = 12) -> Iterator[StudyEvent]:
    """Yield a whole study, two trials at a time, with a pruned, a waiting and an infeasible one."""
    yield Note(message="Study database: sqlite:////home/ada/.local/share/autosft/studies.db")
    yield Note(message="No --model and --data: running the embedded demo. Its model is made once.")
    yield replace(OPENED, num_trials=num_trials)
    yield UntunedScored(metric="eval_loss", value=2.5131)
    best = math.inf
    for first in range(0, num_trials, 2):
        pair = [
            trial_events(number, stops_after=None if number < 4 else 1 + number % 4 if number % 3 else None)
            for number in range(first, min(first + 2, num_trials))
        ]
        while pair:
            for events in list(pair):
                event = next(events, None)
                if event is None:
                    pair.remove(events)
                    continue
                yield event
                if isinstance(event, TrialMeasured):
                    value = event.measurement.metric("eval_loss")
                    if value is not None and value < best:
                        best = value
                        yield NewBest(
                            trial=event.measurement.trial,
                            value=value,
                            step=event.measurement.step,
                            over_untuned=OVER_UNTUNED.difference,
                        )
        if first == 4:
            yield AdviceGiven(
                trial=first,
                cause="gradient norm",
                message="the gradient norm is 12 times its limit: a lower learning rate or more warm-up.",
            )
            yield Waiting(
                message="AMD EPYC: 18.2 GiB are held by study 'other' (pid 4711) until about 21:04."
            )


CONCLUSION = Conclusion(
    study="demo",
    metric="eval_loss",
    minimize=True,
    num_finished=12,
    num_trials=12,
    is_complete=True,
    best_trial=5,
    best_value=0.5074,
    best_step=150,
    best_checkpoint=Path("/home/ada/.local/share/autosft/studies/demo/trial-0005/step-000150"),
    best_parameters=record(5).parameters,
    best_yaml=Path("/home/ada/.local/share/autosft/studies/demo/best.yaml"),
    gain="eval_loss 0.51 against 1.06 of the default: 0.55 +- 0.04 lower (two standard errors).",
    choice="trial 5 step 150: eval_loss 0.5074 ± 0.031, tied with trial 5 step 113; "
    "on 160 examples not used to choose: 0.5231 ± 0.036.",
    final_scores=(),
    untuned_value=2.5131,
    over_untuned=OVER_UNTUNED,
    answers="11 % of 200 held-out instructions answered right before, 67 % after",
    storage_url="sqlite:////home/ada/.local/share/autosft/studies.db",
    dashboard_command="autosft dashboard",
    resume_command="autosft tune --study demo --trials 24",
    duration_s=83.4,
)


def play() -> None:
    """Play the script on this terminal."""
    from autosft.commands.choose_output import choose_output
    from autosft.ui.output import conclusion_facts

    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--until", type=float, default=1.0, help="share of the events to play")
    given = parser.parse_args()
    events = list(study_events(given.trials))
    output = choose_output(as_json=given.json, quiet=given.quiet)
    started = time.process_time()
    for event in events[: int(len(events) * given.until)]:
        output(event)
        time.sleep(given.seconds / len(events))
    cpu_s = time.process_time() - started
    if given.until < 1:
        time.sleep(30)
    output.conclude(CONCLUSION, heading="study demo", facts=conclusion_facts(CONCLUSION))
    output.close()
    if not given.json:
        print(f"CPU time {cpu_s:.2f} s of {given.seconds:.0f} s")


if __name__ == "__main__":
    play()
