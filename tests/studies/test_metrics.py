"""One row a metric: what is known, refused and renamed, and what a further row makes without another line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from typer.main import get_command

from autosft.commands import tune as tune_command
from autosft.commands.flags import with_request_flags
from autosft.profiles.errors import UserError
from autosft.studies.metrics import METRICS, Evidence, Metric, find_metric
from autosft.studies.request import read_request
from autosft.studies.results.final_scores import interval_of
from autosft.studies.results.losses import ExampleLosses
from autosft.studies.results.summary import best_trial
from autosft.studies.trial import TrialJob
from autosft.studies.values import CheckpointScore, Direction
from autosft.workers.scoring.evaluation import Evaluation
from tests.scheduler.study_loop import opened as loop_opened
from tests.scheduler.study_loop import study_run, tune
from tests.studies.study_examples import opened, space
from tests.workers.scripted import Script

SUMS = {"loss_sums": (10.0, 40.0, 24.0), "num_tokens": (10, 20, 12), "num_correct": (4, 3, 6)}
EVALUATION = Evaluation(**SUMS)  # type: ignore[arg-type]

BITS = Metric(
    name="eval_bits_saved",
    direction=Direction.MAXIMIZE,
    summary="bits a scored token below eight",
    sums=lambda of: [8 * n - s / math.log(2) for s, n in zip(of.loss_sums, of.num_tokens, strict=True)],
)


@pytest.fixture
def one_more(monkeypatch: pytest.MonkeyPatch) -> Metric:
    monkeypatch.setitem(METRICS, BITS.name, BITS)
    return BITS


def test_values_and_directions() -> None:
    expected = {"eval_loss": 74 / 42, "eval_perplexity": math.exp(74 / 42), "eval_token_accuracy": 13 / 42}
    measured = dict(EVALUATION.metrics())
    assert {name: measured[name] for name in expected} == pytest.approx(expected)
    assert measured["eval_tokens"] == 42
    assert {name for name, metric in METRICS.items() if not metric.minimize} == {
        "eval_token_accuracy",
        "ifeval",
    }


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_every_row_has_a_value_and_an_interval_around_it(metric: Metric) -> None:
    if metric.evidence is Evidence.TOKENS:
        value, interval = metric.value(EVALUATION), metric.interval(EVALUATION)
    else:
        value, interval = 0.25, metric.share_interval(0.25, 40)
    assert interval is not None
    assert interval.value == pytest.approx(value)
    assert interval.low < value < interval.high


UNKNOWN = {
    "--metric": {"metric": "eval_accuracy"},
    "--final-metric": {"final_metric": "eval_accuracy"},
    "--target": {"target": "eval_accuracy=0.5"},
}


@pytest.mark.parametrize("flag", UNKNOWN)
def test_an_unknown_metric_is_an_error_that_names_the_known(flag: str) -> None:
    with pytest.raises(UserError) as raised:
        read_request(UNKNOWN[flag], None)
    assert str(raised.value).startswith(f"{flag} eval_accuracy")
    assert "eval_loss" in str(raised.value)
    assert flag == "--target" or all(name in str(raised.value) for name in METRICS)


def test_a_metric_of_prompts_is_not_a_final_metric() -> None:
    with pytest.raises(UserError, match="not computed from the evaluation examples"):
        read_request({"final_metric": "ifeval"}, None)


def test_earlier_names_still_name_the_metric(sqlite_url: str) -> None:
    request = read_request({"metric": "perplexity", "target": "perplexity=7.5"}, None)
    assert (request.metric, request.target_value()) == ("eval_perplexity", 7.5)
    from autosft.studies.store.records import open_records

    records = open_records(sqlite_url)
    study = opened(records)
    study.ask(now=1.0)
    kept = CheckpointScore(
        trial=0,
        step=10,
        examples="final",
        metric="perplexity",
        value=7.0,
        low=None,
        high=None,
        num_examples=None,
        recorded_at=0.0,
    )
    study.add_scores([kept, replace(kept, metric="hellaswag acc")])
    assert [score.metric for score in study.scores()] == ["eval_perplexity", "hellaswag acc"]
    records.close()


def test_another_row_is_measured_requested_and_shown(one_more: Metric, tmp_path: Path) -> None:
    assert dict(EVALUATION.metrics())[one_more.name] == pytest.approx(8 - 74 / 42 / math.log(2))
    interval = interval_of(ExampleLosses(step=1, **SUMS), one_more.name)  # type: ignore[arg-type]
    assert interval is not None
    assert interval.low < interval.value < interval.high
    file = tmp_path / "study.yaml"
    file.write_text(f"metric: {one_more.name}\ntarget: {one_more.name}=3\n")
    request = read_request({"final_metric": one_more.name}, file)
    assert (request.metric, request.final_metric) == (one_more.name, one_more.name)
    from autosft.scheduler.loop.target import passes_target
    from tests.scheduler.loop.test_target import evaluation

    run = study_run(tmp_path, num_trials=1, metric=one_more.name, minimize=False, target=5.0)
    folder = tmp_path / "trials" / "0000" / "evaluations"
    folder.mkdir(parents=True)
    (folder / "1.json").write_text(json.dumps({"step": 1, **SUMS}))
    assert not passes_target(run, evaluation(**{one_more.name: 5.4})), "its interval reaches below"
    assert passes_target(replace(run, target=2.0), evaluation(**{one_more.name: 5.4}))

    @with_request_flags
    def command(**given: object) -> None:
        """Do nothing."""

    import typer

    app = typer.Typer()
    app.command()(command)
    flags = {param.name: param.metavar for param in get_command(app).params}
    assert one_more.name in flags["metric"]
    assert one_more.name in flags["final_metric"]
    assert one_more.name not in {p.name: p.metavar for p in get_command(tune_command.app).params}["metric"]


@pytest.mark.usefixtures("quick_optuna")
def test_a_whole_study_by_another_row_finds_its_best(
    one_more: Metric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.scheduler import study_loop

    made = study_loop.spec
    monkeypatch.setattr(
        study_loop, "spec", lambda **given: made(metric=one_more.name, direction=one_more.direction, **given)
    )

    def script(job: TrialJob) -> Script:
        return Script(
            num_steps=8, metric=one_more.name, eval_losses=tuple(job.trial + i for i in range(1, 5))
        )

    run = study_run(tmp_path, num_trials=4, num_slots=1, metric=one_more.name, minimize=one_more.minimize)
    with loop_opened(tmp_path / "studies.db") as records:
        tune(run, records, script)
        trials = records.trials()
        best = best_trial(trials, maximize=not find_metric(one_more.name).minimize)
        assert best is not None
        assert (best.number, best.value) == (3, 7.0)
        assert space() == records.spec.space
