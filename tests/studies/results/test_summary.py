"""What a study came to: gains with their uncertainty, and ties that are called ties."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autosft.profiles.errors import UserError
from autosft.studies.results.final_scores import describe_choice
from autosft.studies.results.losses import ExampleLosses, read_losses
from autosft.studies.results.summary import best_trial, compare, describe_gain, rank_checkpoints, summarise
from autosft.studies.trial import TrialRecord, TrialState
from tests.studies.search.test_sampling import trial as made_trial
from tests.studies.study_examples import evaluation


def losses(values: list[float], tokens: list[int], step: int = 10) -> ExampleLosses:
    return ExampleLosses(step=step, loss_sums=tuple(values), num_tokens=tuple(tokens))


def noisy(mean: float, noise: float, *, seed: int, num: int = 200) -> ExampleLosses:
    """Losses of examples of very different difficulty, the same for every seed, plus noise of the model's."""
    difficulty = random.Random(0)
    own = random.Random(seed)
    tokens = [difficulty.randint(5, 60) for _ in range(num)]
    sums = [(difficulty.uniform(-1, 1) + mean + own.gauss(0, noise)) * count for count in tokens]
    return losses(sums, tokens)


def test_a_difference_is_that_of_the_losses() -> None:
    first, second = losses([10.0, 40.0], [10, 20]), losses([20.0, 46.0], [10, 20])
    assert first.loss == pytest.approx(50 / 30)
    assert compare(first, second).nats_per_token == pytest.approx(second.loss - first.loss)


def test_pairing_sees_what_examples_of_unequal_difficulty_hide() -> None:
    worse, better = noisy(2.0, 0.05, seed=1), noisy(1.9, 0.05, seed=2)
    gain = compare(better, worse)
    assert not gain.is_tie
    assert gain.low < 0.1 < gain.high
    per_example = [loss / count for loss, count in zip(better.loss_sums, better.num_tokens, strict=True)]
    assert gain.standard_error < 0.2 * np.std(per_example) / math.sqrt(len(per_example))


def test_the_same_model_twice_is_a_tie() -> None:
    gain = compare(noisy(2.0, 0.05, seed=1), noisy(2.0, 0.05, seed=2))
    assert gain.is_tie
    assert gain.num_examples == 200
    assert compare(noisy(2.0, 0.0, seed=1), noisy(2.0, 0.0, seed=2)).is_tie


def test_intervals_cover_what_they_promise() -> None:
    covered = sum(
        compare(noisy(2.0, 0.3, seed=seed, num=40), noisy(2.1, 0.3, seed=10_000 + seed, num=40)).low
        <= 0.1
        <= compare(noisy(2.0, 0.3, seed=seed, num=40), noisy(2.1, 0.3, seed=10_000 + seed, num=40)).high
        for seed in range(400)
    )
    assert 0.92 <= covered / 400 <= 0.98


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50), st.integers(1, 50)), min_size=2, max_size=30))
def test_the_standard_error_is_that_of_the_linearised_ratio(rows: list[tuple[float, float, int]]) -> None:
    first, second, tokens = (list(column) for column in zip(*rows, strict=True))
    gain = compare(losses(first, tokens), losses(second, tokens))
    # Taylor linearisation: the mean of residuals over the mean of tokens.
    residuals = np.array(second) - np.array(first) - gain.nats_per_token * np.array(tokens)
    expected = np.std(residuals, ddof=1) / math.sqrt(len(rows)) / np.mean(tokens)
    assert gain.standard_error == pytest.approx(expected, rel=1e-6, abs=1e-9)
    back = compare(losses(second, tokens), losses(first, tokens))
    assert back.nats_per_token == pytest.approx(-gain.nats_per_token, abs=1e-12)


def test_examples_without_tokens_do_not_count_and_one_example_has_no_interval() -> None:
    gain = compare(losses([0.0, 1.0], [0, 10]), losses([0.0, 3.0], [0, 10]))
    assert gain.num_examples == 1
    assert gain.nats_per_token == pytest.approx(0.2)
    assert gain.is_tie


# Studies


def evaluated(
    number: int, values: list[float], *, origin: str = "sampler", state: TrialState = TrialState.COMPLETED
) -> TrialRecord:
    measurements = tuple(evaluation(number, 1, k, value) for k, value in enumerate(values, start=1))
    best = min(measurements, key=lambda measurement: measurement.metric("eval_loss"))
    made = made_trial(number, {"learning_rate": 1e-3, "effective_batch_size": 8}, None, state)
    return dataclasses.replace(
        made, origin=origin, measurements=measurements, value=best.metric("eval_loss"), best_step=best.step
    )


def by_value(trials: list[TrialRecord], noise: float = 0.01) -> dict[tuple[int, int], ExampleLosses]:
    return {
        (trial.number, at.evaluation): noisy(
            at.metric("eval_loss"), noise, seed=100 * trial.number + at.evaluation
        )
        for trial in trials
        for at in trial.measurements
    }


def summary_of(trials: list[TrialRecord], **options):
    table = by_value(trials)
    return summarise(
        trials,
        lambda trial, k: table.get((trial, k)),
        **{"metric": "eval_loss", "maximize": False, **options},
    )


def test_a_gain_is_reported_with_its_interval() -> None:
    made = summary_of([evaluated(0, [2.5, 2.0], origin="default"), evaluated(1, [2.1, 1.5])])
    assert made.best.number == 1
    assert not made.gain.is_tie
    assert "eval_loss 1.5 against 2 of the default configuration: loss lower by 0." in describe_gain(made)
    assert "200 examples, paired" in describe_gain(made)


WORDS = {
    "nothing yet": ([], "No trial has been evaluated yet."),
    "default is best": (
        [evaluated(0, [1.0], origin="default"), evaluated(1, [2.0])],
        "The default configuration is the best found",
    ),
    "no default": ([evaluated(0, [1.0])], "the default configuration has not been evaluated"),
    "a tie": (
        [evaluated(0, [2.001], origin="default"), evaluated(1, [2.0])],
        "configuration: a tie, loss lower",
    ),
    "only broken ones": ([evaluated(0, [1.0], state=TrialState.FAILED)], "No trial has been evaluated yet."),
}


@pytest.mark.parametrize("case", WORDS)
def test_descriptions(case: str) -> None:
    trials, said = WORDS[case]
    assert said in describe_gain(summary_of(trials))


def test_without_losses_per_example_no_certainty_is_claimed() -> None:
    trials = [evaluated(0, [2.0], origin="default"), evaluated(1, [1.0])]
    made = summarise(trials, lambda *_: None, metric="eval_loss", maximize=False)
    assert made.gain is None
    assert "the uncertainty is not known" in describe_gain(made)
    accuracy = summary_of(trials, metric="eval_token_accuracy", maximize=True)
    assert accuracy.gain is None


def test_every_evaluation_is_a_candidate_and_ties_are_named() -> None:
    trials = [evaluated(0, [2.0, 1.500, 1.502, 1.8]), evaluated(1, [1.501, 3.0])]
    table = by_value(trials, noise=0.05)
    ranking = rank_checkpoints(trials, lambda *key: table.get(key), metric="eval_loss", maximize=False)
    assert [(item.trial, item.evaluation) for item in ranking[:3]] == [(0, 2), (1, 1), (0, 3)]
    assert [item.is_tied for item in ranking] == [True, True, True, False, False, False]
    assert describe_choice(ranking, None, (), metric="eval_loss") == (
        "trial 0 step 20: eval_loss 1.5, tied with trial 1 step 10 and trial 0 step 30."
    )


def test_the_best_trial_is_finite_finished_and_the_earliest_of_equals() -> None:
    trials = [
        evaluated(0, [0.1], state=TrialState.INFEASIBLE),
        evaluated(1, [0.2], state=TrialState.RUNNING),
        dataclasses.replace(evaluated(2, [0.3]), value=-math.inf),
        evaluated(3, [1.0], state=TrialState.STOPPED),
        evaluated(4, [1.0]),
    ]
    assert best_trial(trials, maximize=False).number == 3
    assert best_trial(trials[:3], maximize=False) is None


def test_an_evaluations_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "1.json"
    path.write_text(json.dumps({"step": 10, "loss_sums": [1.5, 2], "num_tokens": [3, 4]}))
    assert read_losses(path) == losses([1.5, 2.0], [3, 4])
    for broken in ("", "[]", '{"step": 1}', '{"step": 1, "loss_sums": ["x"], "num_tokens": [1]}'):
        path.write_text(broken)
        with pytest.raises(UserError, match="does not hold an evaluation"):
            read_losses(path)
    with pytest.raises(UserError, match="does not hold an evaluation"):
        read_losses(tmp_path / "missing.json")
