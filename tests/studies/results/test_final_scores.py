"""The winner on examples that were not used to choose it, with intervals, in values and in words."""

from __future__ import annotations

import math

import pytest

from autosft.studies.intervals import Interval, ratio
from autosft.studies.results.final_scores import Scored, describe_choice, final_scores, interval_of
from autosft.studies.results.losses import ExampleLosses
from autosft.studies.results.summary import RankedCheckpoint
from tests.studies.results.test_summary import losses, noisy


def test_a_metrics_interval_is_around_its_value() -> None:
    evaluation = ExampleLosses(
        step=1, loss_sums=(10.0, 40.0, 24.0), num_tokens=(10, 20, 12), num_correct=(4, 3, 6)
    )
    for metric, value in {
        "eval_loss": 74 / 42,
        "eval_perplexity": math.exp(74 / 42),
        "eval_token_accuracy": 13 / 42,
    }.items():
        found = interval_of(evaluation, metric)
        assert found is not None
        assert found.value == pytest.approx(value)
        assert found.low < value < found.high
        assert found.num_examples == 3
    assert interval_of(evaluation, "ifeval") is None


def test_an_interval_covers_what_it_promises() -> None:
    whole = noisy(2.0, 0.3, seed=0, num=20_000)
    parts = [slice(start, start + 100) for start in range(0, 20_000, 100)]
    covered = sum(
        one.low <= whole.loss <= one.high
        for part in parts
        if (one := ratio(whole.loss_sums[part], whole.num_tokens[part]))
    )
    assert 0.90 <= covered / len(parts) <= 0.99


def test_one_example_has_no_interval() -> None:
    assert ratio([3.0, 0.0], [2, 0]).high == math.inf


def ranking(*tied: tuple[int, int]) -> list[RankedCheckpoint]:
    return [
        RankedCheckpoint(trial=trial, evaluation=1, step=step, value=2.74, behind=None, is_tied=True)
        for trial, step in ((9, 100), *tied)
    ]


CHOSEN_BY = Interval(value=2.74, standard_error=0.19, low=2.36, high=3.12, num_examples=160)


def scored(trial: int, step: int, of: ExampleLosses) -> Scored:
    return Scored(trial=trial, step=step, losses=of)


def test_the_winners_fresh_score_is_reported() -> None:
    finals = final_scores(
        [scored(9, 100, noisy(2.59, 0.1, seed=1)), scored(9, 80, noisy(2.6, 0.1, seed=2))], metric="eval_loss"
    )
    words = describe_choice(ranking((9, 80)), CHOSEN_BY, finals, metric="eval_loss")
    assert words.startswith("trial 9 step 100: eval_loss 2.74 ± 0.38, tied with trial 9 step 80; ")
    assert "; on 200 examples not used to choose: 2.611 ± 0.094." in words
    assert "better" not in words


def test_another_that_is_clearly_better_there_is_named_and_does_not_win() -> None:
    finals = final_scores(
        [scored(9, 100, noisy(2.6, 0.1, seed=1)), scored(4, 80, noisy(2.4, 0.1, seed=2))], metric="eval_loss"
    )
    assert [final.is_better for final in finals] == [False, True]
    words = describe_choice(ranking(), CHOSEN_BY, finals, metric="eval_loss")
    assert words.startswith("trial 9 step 100: ")
    assert "There trial 4 step 80 is better by 0." in words


def test_a_second_metric_is_reported_with_it() -> None:
    own = ExampleLosses(step=1, loss_sums=(1.0, 2.0), num_tokens=(10, 10), num_correct=(7, 9))
    finals = final_scores([scored(9, 100, own)], metric="eval_loss", second_metric="eval_token_accuracy")
    words = describe_choice(ranking(), None, finals, metric="eval_loss", second_metric="eval_token_accuracy")
    assert "not used to choose: 0.15 ± 0.64, eval_token_accuracy 0.8 ± 1.3." in words


def test_many_ties_are_counted() -> None:
    words = describe_choice(ranking(*((1, step) for step in range(6))), None, (), metric="eval_loss")
    assert words == (
        "trial 9 step 100: eval_loss 2.74, "
        "tied with trial 1 step 0, trial 1 step 1, trial 1 step 2 and 3 more."
    )


def test_files_of_older_versions_have_no_accuracy() -> None:
    assert interval_of(losses([1.0, 2.0], [10, 10]), "eval_token_accuracy") is None
