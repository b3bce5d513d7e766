"""The report: one file that says what the study came to, whatever the study holds."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from autosft.profiles.errors import UserError
from autosft.studies.intervals import Interval
from autosft.studies.report import StudyReport, figures, render, report_of, write_report
from autosft.studies.report.facts import in_one_line, sentences
from autosft.studies.report.figures import pareto
from autosft.studies.report.plotting import log_ticks
from autosft.studies.report.time_line import time_line
from autosft.studies.results.outlook import Effect, GoingOn, Outlook, PredictedEnd
from autosft.studies.results.over_untuned import OverUntuned
from autosft.studies.results.paired import PairedDifference
from autosft.studies.search.importance import MIN_RESULTS, importances
from autosft.studies.search.space import default_parameters
from autosft.studies.store.records import open_records
from autosft.studies.trial import FailureKind, TrialState
from autosft.studies.values import CheckpointScore
from tests.studies import study_examples
from tests.studies.report_examples import made_up_report
from tests.studies.study_examples import end, evaluation, opened, start


def data_of(page: str) -> dict[str, Any]:
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return dict(json.loads(text))


SIZES = {"no trial": (0, 6), "one": (1, 6), "three": (3, 6), "every kind of end": (12, 6)}


@pytest.mark.parametrize("case", SIZES)
def test_a_study_of_any_size_has_a_report(case: str) -> None:
    num_trials, num_parameters = SIZES[case]
    report = made_up_report(num_trials, num_parameters)
    page = render(report)
    data = data_of(page)
    assert [row[0] for row in data["table"]["rows"]] == list(range(num_trials))
    assert all(len(row) == len(data["table"]["columns"]) for row in data["table"]["rows"])
    for name in data["figures"]:
        assert f'id="{name}"' in page, "a figure without a place on the page"


def test_what_the_curves_say_is_on_the_page() -> None:
    report = made_up_report(12)
    stopped = next(trial for trial in report.trials if trial.state is TrialState.STOPPED)
    outlook = Outlook(
        effects=(
            Effect(name="learning_rate", best=3e-4, worst=1e-2, worse=0.4, low=0.2, high=0.7),
            Effect(name="weight_decay", best=0.0, worst=0.1, worse=0.01, low=-0.02, high=0.04),
        ),
        ends=((stopped.number, PredictedEnd(end=1.2, low=1.1, high=1.4)),),
        going_on=GoingOn(gain=0.001, noise=0.004),
    )
    report = dataclasses.replace(report, outlook=outlook)
    page = render(report)
    assert "<td>learning rate</td>" in page
    assert "40 % (20 to 70)" in page
    assert "none seen (-2 to 4 %)" in page
    [ends] = [
        line for line in data_of(page)["figures"]["curves"]["data"] if line.get("name") == "predicted ends"
    ]
    assert ends["y"] == [1.2]
    assert ends["error_y"]["array"] == pytest.approx([0.2])
    assert ends["error_y"]["arrayminus"] == pytest.approx([0.1])
    assert any("Going on is not worth it" in sentence for sentence in sentences(report))


@pytest.mark.slow
def test_a_thousand_trials_of_twenty_parameters_stay_small() -> None:
    page = render(made_up_report(1000, 20))
    assert len(page.encode()) < 10e6
    data = data_of(page)
    assert len(data["table"]["rows"]) == 1000
    assert len(data["figures"]["curves"]["data"]) <= 3, "a trace a trial would take seconds to draw"


def test_nothing_is_loaded_from_a_network() -> None:
    page = render(made_up_report(3))
    ours = page[: page.index("<script type=")]
    assert not re.search(r"""(src|href)\s*=|@import|url\(""", ours)


def test_what_users_wrote_cannot_break_out_of_the_page() -> None:
    report = made_up_report(12)
    name = 'x"><script>alert(1)</script>'
    page = render(dataclasses.replace(report, spec=dataclasses.replace(report.spec, name=name)))
    assert "<script>alert" not in page
    [failed] = [trial for trial in report.trials if trial.state is TrialState.FAILED]
    assert "</script>" in failed.message, "the example has lost its point"
    assert any("</script>" in str(row) for row in data_of(page)["table"]["rows"])
    assert "Name three &lt;b&gt;primary&lt;/b&gt;" in page


def test_plotly_knows_every_figure() -> None:
    go = pytest.importorskip("plotly.graph_objects")
    for num_trials in (3, 40):
        for figure in data_of(render(made_up_report(num_trials)))["figures"].values():
            without_page_colours = json.loads(re.sub(r'"@\w+"', '"#123456"', json.dumps(figure)))
            go.Figure(without_page_colours)  # raises for a key or value that plotly does not have


FRONTS = {
    "only one": ([(1.0, 2.0)], {0}),
    "cheaper and better wins": ([(1.0, 1.0), (2.0, 2.0)], {0}),
    "dearer but better stays": ([(1.0, 2.0), (2.0, 1.0)], {0, 1}),
    "of equals the first": ([(1.0, 1.0), (1.0, 1.0)], {0}),
    "same cost, better value": ([(1.0, 2.0), (1.0, 1.0)], {1}),
}


@pytest.mark.parametrize("case", FRONTS)
def test_the_front_holds_what_no_other_beats(case: str) -> None:
    points, front = FRONTS[case]
    assert pareto(points, minimize=True) == front
    assert pareto([(cost, -value) for cost, value in points], minimize=False) == front


def test_attempts_at_one_time_get_lines_of_their_own() -> None:
    report = made_up_report(12)
    figure = time_line(report)
    assert figure is not None
    taken: dict[str, list[tuple[str, float]]] = {}
    for trace in figure.data:
        for line, base, length in zip(trace["y"], trace["base"], trace["x"], strict=True):
            taken.setdefault(line, []).append((base, length))
    assert len(taken) == 2, "two devices, one trial at a time on each"
    assert sum(len(bars) for bars in taken.values()) == 12


def test_memory_beyond_its_bound_is_told_from_memory_within() -> None:
    report = made_up_report(1)
    [[attempt]] = report.attempts_by_trial.values()
    [trial] = report.trials
    assert trial.plan is not None
    bound = trial.plan.estimate.allocated.upper_bytes
    for peak, legend in ((bound, "within its bound"), (bound + 1, "passed its bound")):
        measured = dataclasses.replace(attempt, peak_allocated_bytes=peak)
        figure = figures.memory(dataclasses.replace(report, attempts_by_trial={0: (measured,)}))
        assert figure is not None
        assert [item["name"] for item in figure.data] == [legend, "measured = predicted"]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.4, 0.6, "eval_loss 1.1000 against 1.6000"), (-0.1, 0.6, "Not better than the untuned model beyond")],
)
def test_the_untuned_model_stands_at_the_top(low: float, high: float, said: str, stored: StudyReport) -> None:
    gain = Interval(value=(low + high) / 2, standard_error=0.1, low=low, high=high, num_examples=50)
    found = OverUntuned(
        metric="eval_loss",
        untuned=1.6,
        tuned=1.1,
        difference=PairedDifference(metric="eval_loss", gain=gain, is_loss=True, minimize=True),
    )
    report = dataclasses.replace(stored, untuned=1.6, over_untuned=found)
    assert next(sentences(report)).startswith(said)
    page = render(report)
    assert "the model before tuning" in page
    assert ("a tie" if low < 0 else "95 % interval") in page
    assert "Untuned" not in render(stored), "a study of an earlier version has none"


@pytest.fixture
def stored(sqlite_url: str) -> StudyReport:
    """A study from the database: an early stop, a run out of memory, a best and a default."""
    records = open_records(sqlite_url)
    study = opened(records)
    study.enqueue(default_parameters(study.spec.space), origin="default", now=0.0)
    for number, (losses, state, failure) in enumerate(
        [
            ((1.5, 1.3), TrialState.COMPLETED, None),
            ((1.4, 1.1), TrialState.COMPLETED, None),
            ((1.9,), TrialState.STOPPED, None),
            ((), TrialState.INFEASIBLE, FailureKind.OUT_OF_MEMORY),
        ]
    ):
        study.ask(now=1.0)
        start(study, number, now=10.0 * number)
        for i, loss in enumerate(losses, start=1):
            study.record(evaluation(number, 1, i, loss), now=10.0 * number + i)
        study.end_attempt(end(number, 1, failure=failure), state, now=10.0 * number + 6)
    report = report_of(study, database=records.url, now=100.0)
    records.close()
    return report


def test_a_report_says_what_the_records_say(stored: StudyReport) -> None:
    said = " ".join(sentences(stored))
    assert "1.1 against 1.3 of the default configuration" in said
    assert "4 of 30 trials finished: 2 ran to the end, 1 stopped early, 1 did not fit in memory" in said
    assert "24 s of device time on test device" in said
    rows = data_of(render(stored))["table"]["rows"]
    assert [row[1] for row in rows] == ["completed", "completed", "stopped", "infeasible"]
    assert rows[2][-1] == "stopped early: hopeless against the others at step 10"
    assert rows[3][-1].startswith("out of device memory: ")
    assert data_of(render(stored))["table"]["best"] == 1


def test_scores_on_unseen_examples_are_shown_with_the_best(stored: StudyReport) -> None:
    score = CheckpointScore(
        trial=1,
        step=20,
        examples="final",
        metric="eval_loss",
        value=1.234,
        low=1.2,
        high=1.3,
        num_examples=50,
        recorded_at=1.0,
    )
    page = render(dataclasses.replace(stored, scores=(score,)))
    assert "On unseen examples" in page
    assert "1.2000 to 1.3000" in page
    assert "On 50 examples not used to choose: eval_loss 1.2340, 1.2000 to 1.3000 (95 %)." in page
    of_another = dataclasses.replace(score, trial=0)
    page = render(dataclasses.replace(stored, scores=(of_another,)))
    assert "On unseen examples" not in page
    assert "trial 0 step 20" in page


def test_importance_needs_results_and_finds_what_matters() -> None:
    space = study_examples.space()
    trials = made_up_report(60).trials  # their loss depends on the learning rate and on noise
    assert importances(space, trials[: MIN_RESULTS - 1], maximize=False) == ()
    found = dict(importances(space, trials, maximize=False))
    assert max(found, key=found.__getitem__) == "learning_rate"
    assert sum(found.values()) == pytest.approx(1.0)


def test_importance_is_not_made_up_where_all_trials_are_equal(recwarn: pytest.WarningsRecorder) -> None:
    trials = [dataclasses.replace(trial, value=1.0) for trial in made_up_report(60).trials]
    assert importances(study_examples.space(), trials, maximize=False) == ()
    assert not recwarn.list


def test_a_place_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path / "no" / "folder.html", made_up_report(1))
    path = tmp_path / "report.html"
    write_report(path, made_up_report(1))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


TICKS = [
    ("three decades", 1e-5, 1e-2, [1e-5, 1e-4, 1e-3, 1e-2]),
    ("half a decade", 1.2e-4, 6e-4, [2e-4, 3e-4, 4e-4, 5e-4, 6e-4]),
    ("nearly one value", 1.5e-4, 1.9e-4, [1.5e-4, 1.6e-4, 1.8e-4]),
    ("ten decades", 1e-10, 1.0, [10.0**power for power in range(-10, 1)]),
]


@pytest.mark.parametrize(("name", "low", "high", "some"), TICKS, ids=[item[0] for item in TICKS])
def test_a_logarithmic_axis_has_several_round_ticks(
    name: str, low: float, high: float, some: list[float]
) -> None:
    ticks = log_ticks(low, high)
    assert 3 <= len(ticks) <= 12
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
    assert set(some) <= set(ticks)


def test_the_turns_of_a_prompt_are_told_apart() -> None:
    report = made_up_report(1)
    [shown, *_] = report.answers
    turns = (("system", "Be brief."), ("user", "What is <b>?"))
    page = render(dataclasses.replace(report, answers=(dataclasses.replace(shown, turns=turns),)))
    assert "<dt>system</dt><dd>Be brief.</dd>" in page
    assert "<dt>user</dt><dd>What is &lt;b&gt;?</dd>" in page
    assert 'class="prompt"' not in page


def test_what_a_resumed_attempt_did_again_is_drawn_once() -> None:
    first = [dataclasses.replace(evaluation(0, 1, 1), step=step, evaluation=None) for step in (1, 2, 3, 4)]
    again = [dataclasses.replace(report, attempt=2) for report in first[2:]]
    line = in_one_line([*first, *again])
    assert [(report.attempt, report.step) for report in line] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    assert in_one_line(first) == tuple(first)
