"""Plain lines, JSON lines, and the choice between them."""

from __future__ import annotations

import io
import json
from contextlib import closing
from dataclasses import replace

import pytest

from autosft.commands.choose_output import choose_output
from autosft.commands.tune import stdout_kept
from autosft.scheduler import events as events_module
from autosft.scheduler.events import Note, StudyEvent, TrialEnded, TrialMeasured, TrialStarted, Waiting
from autosft.studies.formatting import (
    format_count,
    format_duration,
    format_metric,
    format_number,
    format_settings,
)
from autosft.studies.trial import FailureKind, TrialState
from autosft.studies.wire import from_plain
from autosft.ui.output import JsonLines, PlainLines, conclusion_facts
from autosft.ui.progress import Progress, about, describe_forecast, memory_text, predicted_end, time_left_s
from tests.cli.study_script import (
    CONCLUSION,
    OPENED,
    forecast,
    measurement,
    record,
    study_events,
    trial_events,
)

MIB = 1 << 20
GIB = 1 << 30


def class_of(name: str) -> type:
    return getattr(events_module, "".join(part.capitalize() for part in name.split("_")))


def test_json_lines_carry_every_event_and_end_with_the_conclusion():
    stream = io.StringIO()
    output = JsonLines(stream, clock=lambda: 17.0)
    events = list(study_events())
    for event in events:
        output(event)
    output.conclude(CONCLUSION, heading="study demo", facts=conclusion_facts(CONCLUSION))

    *lines, last = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line.pop("time") for line in lines] == [17.0] * len(events)
    assert [from_plain(class_of(line.pop("event")), line) for line in lines] == events
    assert last["event"] == "conclusion"
    assert last["best_checkpoint"] == str(CONCLUSION.best_checkpoint)
    assert last["best_parameters"] == [list(pair) for pair in CONCLUSION.best_parameters]


def test_json_lines_are_standard_json_for_values_that_json_lacks():
    stream = io.StringIO()
    lost = replace(measurement(0, 38, value=float("nan")), loss=float("inf"))
    JsonLines(stream)(TrialMeasured(measurement=lost))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    line = json.loads(stream.getvalue(), parse_constant=refuse)
    assert from_plain(TrialMeasured, {"measurement": line["measurement"]}).measurement.loss == float("inf")


def test_plain_lines_tell_evaluations_and_ends_but_no_mere_progress():
    stream = io.StringIO()
    output = PlainLines(stream, clock=lambda: 0.0)
    for event in study_events(2):
        output(event)
    lines = stream.getvalue().splitlines()
    assert sum(line.startswith("trial 0 step") for line in lines) == 4
    assert "trial 0 step 38/150, eval_loss 1.6877, loss 1.9986, 9.1k tokens/s, memory 283/420M" in lines
    assert "trial 1 completed: eval_loss 0.9471 at step 150; 2 of 2 finished" in lines
    assert "untuned model: eval_loss 2.5131" in lines
    better = ", better than untuned: loss lower by 2.01 ± 0.11 nats per token"
    assert all(line.endswith(better) for line in lines if line.startswith("best so far"))
    assert lines.index("  " + OPENED.plan_lines[0]) < lines.index(
        "trial 0 starts on AMD EPYC: default, lr 1e-3"
    )


def test_plain_lines_say_why_a_trial_failed():
    stream = io.StringIO()
    output = PlainLines(stream)
    failed = record(3, TrialState.FAILED, failure=FailureKind.ERROR, message="KeyError: 'x'. Log: t.log.")
    for event in (
        OPENED,
        TrialStarted(record=record(3), attempt=2, device_names=("GPU 0",)),
        TrialEnded(record=failed),
    ):
        output(event)
    text = stream.getvalue()
    assert "(attempt 2)" in text
    assert "trial 3 failed (error); 0 of 12 finished" in text
    assert "  KeyError: 'x'. Log: t.log." in text


def test_plain_lines_say_once_what_is_waited_for():
    stream = io.StringIO()
    output = PlainLines(stream)
    first, later = Waiting(message="Waiting. Pid 7, 2 min."), Waiting(message="Waiting. Pid 7, 1 min.")
    start = TrialStarted(record=record(0), attempt=1, device_names=("GPU 0",))
    for event in (OPENED, first, later, start, later):
        output(event)
    waits = [line for line in stream.getvalue().splitlines() if line.startswith("waiting")]
    assert waits == ["waiting: Pid 7, 2 min.", "waiting: Pid 7, 1 min."]


@pytest.mark.parametrize("output_class", [PlainLines, JsonLines])
def test_quiet_outputs_show_the_conclusion_only(output_class):
    stream = io.StringIO()
    output = output_class(stream, quiet=True)
    for event in study_events(2):
        output(event)
    assert stream.getvalue() == ""
    output.conclude(CONCLUSION, heading="study demo", facts=conclusion_facts(CONCLUSION))
    assert str(CONCLUSION.best_checkpoint) in stream.getvalue()


def test_a_conclusion_without_a_result_says_so_and_how_to_go_on():
    nothing = replace(
        CONCLUSION,
        num_finished=0,
        is_complete=False,
        best_trial=None,
        best_value=None,
        best_checkpoint=None,
        best_yaml=None,
        gain="",
        answers=None,
        over_untuned=None,
    )
    facts = dict(conclusion_facts(nothing))
    assert facts["best"].startswith("none yet")
    assert set(facts) == {"best", "dashboard", "resume"}


def test_the_conclusion_says_what_tuning_came_to_beside_the_untuned_model():
    facts = dict(conclusion_facts(CONCLUSION))
    assert facts["over untuned"] == (
        "eval_loss 0.5074 against 2.5131 of the untuned model, loss lower by 2.01 ± 0.11 nats per token "
        "(95 % interval over 160 examples, paired)."
    )
    assert facts["gain"] == CONCLUSION.gain, "over the default configuration, in its own line"
    assert list(facts).index("over untuned") < list(facts).index("gain")


def test_trials_that_the_time_budget_cut_are_said_to_be_that():
    facts = dict(conclusion_facts(replace(CONCLUSION, num_finished=4, num_trials=4, num_cut=2)))
    assert "4 of 4 trials finished, 2 of them cut short by the time budget, in" in facts["best"]
    assert "cut short" not in dict(conclusion_facts(CONCLUSION))["best"]


def test_what_user_code_prints_stays_out_of_the_json_lines(capsys):
    with closing(choose_output(as_json=True, quiet=False)) as output, stdout_kept(True):
        print("a loss of the user's says this while it is traced")
        output(Note(message="one"))
    told = capsys.readouterr()
    assert [json.loads(line)["message"] for line in told.out.splitlines()] == ["one"]
    assert told.err == "a loss of the user's says this while it is traced\n"
    with stdout_kept(False):
        print("as usual")
    assert capsys.readouterr().out == "as usual\n"


def test_a_path_with_a_space_is_quoted_for_the_shell():
    facts = dict(conclusion_facts(replace(CONCLUSION, best_yaml="/my studies/best.yaml")))
    assert facts["train again"] == "autosft train '/my studies/best.yaml'"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "flags", "expected"),
    [
        (io.StringIO(), {}, "PlainLines"),
        (io.StringIO(), {"as_json": True}, "JsonLines"),
        (Terminal(), {"as_json": True}, "JsonLines"),
        (Terminal(), {"quiet": True}, "PlainLines"),
        (Terminal(), {}, "LiveView"),
    ],
)
def test_the_output_fits_the_terminal_and_the_flags(stream, flags, expected, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    output = choose_output(**{"as_json": False, "quiet": False, **flags}, stream=stream)
    output.close()
    assert type(output).__name__ == expected


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose_output(as_json=False, quiet=False, stream=Terminal()), PlainLines)


# Progress


def progress_after(events: list[tuple[float, StudyEvent]]) -> Progress:
    progress = Progress()
    for now, event in events:
        progress.apply(event, now=now)
    return progress


def started(number: int) -> TrialStarted:
    return TrialStarted(record=record(number), attempt=1, device_names=("GPU 0",))


def finished(number: int) -> TrialEnded:
    return TrialEnded(record=record(number, TrialState.COMPLETED, value=1.0, best_step=150))


TIME_LEFT = {
    "nothing is known before a trial starts": ([(0, OPENED)], 0, None),
    # predicted 12 s each, one at a time: 12 - 2 left of the running one, and 11 more as long
    "the plan's prediction at first": ([(0, OPENED), (0, started(0))], 2, 10 + 11 * 12),
    # 10 s from step 5 to 55, so 0.2 s a step; 95 steps to go; a trial is then 10.2 + 19 s
    "a running trial's own pace": (
        [
            (0, OPENED),
            (0, started(0)),
            (1, TrialMeasured(measurement=measurement(0, 5, step_s=0.2))),
            (11, TrialMeasured(measurement=measurement(0, 55, step_s=0.2))),
        ],
        11,
        19 + 11 * 30,
    ),
    # its own word, 16 s of it ago; a trial is then 10 + 16 + 14 s
    "what a running trial expects itself": (
        [
            (0, OPENED),
            (0, started(0)),
            (1, TrialMeasured(measurement=measurement(0, 5, step_s=0.2))),
            (10, TrialMeasured(measurement=replace(measurement(0, 50, step_s=0.2), remaining_s=30.0))),
        ],
        26,
        14 + 11 * 40,
    ),
    # one finished in 20 s; one running with 12 s predicted, just started; ten more at 20 s
    "finished trials say how long the next ones take": (
        [(0, OPENED), (0, started(0)), (20, finished(0)), (20, started(1))],
        20,
        12 + 10 * 20,
    ),
    # 12 s predicted for the one that runs; a trial to come takes a half of that, since it may be stopped
    "before the first has ended, pruning counts as planned": (
        [(0, replace(OPENED, expected_share=0.5, num_slots=1)), (0, started(0))],
        0,
        12 + 11 * 6,
    ),
    "two at once take half": (
        [(0, OPENED), (0, started(0)), (20, finished(0)), (20, started(1)), (20, started(2))],
        20,
        (12 + 12 + 9 * 20) / 2,
    ),
    "never beyond the deadline": ([(0, replace(OPENED, deadline=30.0)), (0, started(0))], 10, 20),
    "trials of earlier runs are done": (
        [(0, replace(OPENED, num_finished=11)), (0, started(11))],
        0,
        12,
    ),
}


@pytest.mark.parametrize(("events", "now", "expected"), TIME_LEFT.values(), ids=TIME_LEFT)
def test_time_left(events, now, expected):
    left = time_left_s(progress_after(events), now=now)
    assert left == (None if expected is None else pytest.approx(expected))


def test_trials_of_earlier_runs_are_known_and_counted_once():
    done = record(0, TrialState.COMPLETED, value=1.2, best_step=150, started_at=100.0, finished_at=130.0)
    better = record(1, TrialState.STOPPED, value=1.1, best_step=75, started_at=100.0, finished_at=120.0)
    left = record(2, TrialState.WAITING)
    opened = replace(OPENED, num_finished=2, earlier=(done, better, left))
    progress = progress_after([(1000, opened), (1000, started(2))])
    assert progress.num_finished == 2
    assert (progress.best.trial, progress.best.value) == (1, 1.1)
    assert [row.number for row in progress.running] == [2]
    assert progress.defaults() == dict(record(0).parameters)
    # 12 s predicted for the running one, nine more at the 25 s that earlier ones took
    assert time_left_s(progress, now=1000) == pytest.approx(12 + 9 * 25)
    progress.apply(finished(2), now=1010)
    assert progress.num_finished == 3


def test_a_retried_trial_counts_once_and_starts_afresh():
    waiting = TrialEnded(record=record(0, TrialState.WAITING))
    progress = progress_after(
        [(0, OPENED), (0, started(0)), (5, waiting), (6, started(0)), (20, finished(0))]
    )
    assert progress.num_finished == 1
    assert progress.rows[0].started_at == 6


def test_an_infeasible_trial_that_never_started_is_finished():
    given_up = TrialEnded(record=record(4, TrialState.INFEASIBLE, message="needs 60 GiB"))
    progress = progress_after([(0, OPENED), (0, given_up)])
    assert progress.num_finished == 1
    assert progress.running == []


# Words

WORDS = [
    (format_number(1e-3), "1e-3"),
    (format_number(0.00142), "1.4e-3"),
    (format_number(0.05), "0.05"),
    (format_number(0.0), "0"),
    (format_number(float("inf")), "inf"),
    (format_number(-2.5e-7), "-2.5e-7"),
    (format_metric(1.06667), "1.0667"),
    (format_metric(123.456), "123.45"),
    (format_metric(float("nan")), "nan"),
    (format_metric(1e9), "1e+09"),
    (format_metric(None), ""),
    (format_count(950), "950"),
    (format_count(999.6), "1.0k"),
    (format_count(12_345), "12.3k"),
    (format_count(999_999), "1.0M"),
    (format_count(123_456), "123k"),
    (memory_text(310 * MIB, 420 * MIB), "310/420M"),
    (memory_text(None, 6 * GIB), "-/6.0G"),
    (memory_text(900 * MIB, 2 * GIB), "0.9/2.0G"),
    (memory_text(None, None), ""),
    (format_duration(40), "40 s"),
    (format_duration(200), "3 min 20 s"),
    (format_duration(3_599), "59 min"),
    (format_duration(7_500), "2 h 05 min"),
    (format_duration(4 * 86_400 + 3_600), "4 d 1 h"),
    (about(41), "about 45 s left"),
    (about(0), "about 5 s left"),
    (about(130), "about 2 min 10 s left"),
    (format_settings((("weight_decay", 0.01), ("learning_rate", 1e-3)), {"weight_decay": 0.01}), "lr 1e-3"),
    (format_settings((("lr_scheduler", "constant_with_warmup"), ("lora_rank", 8)), {}), "constant r 8"),
]


@pytest.mark.parametrize(("words", "expected"), WORDS)
def test_words(words, expected):
    assert words == expected


def test_what_is_expected_of_a_trial_is_said_with_its_interval_and_a_reason() -> None:
    going, paused = forecast(3, end=0.41, goes_on=True), forecast(4, end=0.52, goes_on=False)
    assert predicted_end(going) == "0.4100±0.055"
    assert predicted_end(None) == ""
    said = describe_forecast(paused, "eval_loss")
    assert said.startswith("paused: eval_loss 0.4700 to 0.5800 expected at its end; new settings promise")
    assert describe_forecast(going, "eval_loss").startswith("goes on: ")
    stream = io.StringIO()
    lines = PlainLines(stream)
    for event in study_events():
        lines(event)
    assert "paused: eval_loss" in stream.getvalue()


def test_the_script_covers_every_event():
    kinds = {type(event) for event in study_events()}
    assert kinds == set(events_module.StudyEvent.__args__)
    assert any(isinstance(event, TrialEnded) for event in trial_events(3))
