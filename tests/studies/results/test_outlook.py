"""What a study's curves say: predicted ends, effects of settings, whether going on is worth it."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from autosft.studies.results.outlook import (
    MIN_TRIALS,
    GoingOn,
    Outlook,
    describe_going_on,
    effect_rows,
    outlook_of,
)
from autosft.studies.search.space import complete
from autosft.studies.trial import TrialRecord, TrialState
from tests.studies.search.freeze_thaw.test_proposal import RULES, SPACE, trial

BEST_RATE = 3e-4


def loss_at(rate: float, evaluation: int) -> float:
    return math.exp(0.3 * math.log10(rate / BEST_RATE) ** 2) * (1 + 0.2 * (4 / evaluation - 1))


def trials(number: int = 16) -> list[TrialRecord]:
    """Rates over two decades, in which every third trial ran to its end; weight decay matters not at all."""
    draw = random.Random(0)
    found = []
    for at in range(number):
        rate = float(f"{10 ** draw.uniform(-4.8, -2.9):.3g}")
        upto = 4 if at % 3 == 0 else 1 + at % 2
        state = TrialState.COMPLETED if upto == 4 else TrialState.STOPPED
        made = trial(at, rate, tuple(loss_at(rate, each) for each in range(1, upto + 1)), state)
        parameters = complete(
            SPACE, {**dict(made.parameters), "weight_decay": round(draw.uniform(0, 0.1), 2)}
        )
        found.append(dataclasses.replace(made, parameters=tuple(parameters.items())))
    return found


def test_the_setting_that_matters_is_told_from_one_that_does_not() -> None:
    effects = {effect.name: effect for effect in outlook_of(RULES, trials()).effects}
    rate = effects["learning_rate"]
    assert rate == max(effects.values(), key=lambda effect: effect.worse)
    assert rate.is_seen
    assert abs(math.log10(float(rate.best) / BEST_RATE)) < 0.4
    assert 0 < rate.low < rate.worse < rate.high
    assert effects["weight_decay"].low < 0.02 < rate.low
    assert set(effects) == set(SPACE.searched())


def test_ends_are_predicted_with_intervals_that_hold_them() -> None:
    made = trials()
    ends = dict(outlook_of(RULES, made).ends)
    assert set(ends) == {each.number for each in made if each.state is TrialState.STOPPED}
    held = [
        ends[each.number].low
        <= loss_at(float(dict(each.parameters)["learning_rate"]), 4)
        <= ends[each.number].high
        for each in made
        if each.number in ends
    ]
    assert sum(held) >= 0.8 * len(held)
    assert all(end.low < end.end < end.high for end in ends.values())


def test_a_metric_to_maximise_is_shown_as_itself() -> None:
    rules = dataclasses.replace(RULES, metric="eval_accuracy", minimize=False)
    made = []
    for each in trials():
        steps = tuple(
            dataclasses.replace(step, metrics=(("eval_accuracy", 1 - (step.metric("eval_loss") or 1) / 9),))
            for step in each.measurements
        )
        accuracy = max(step.metric("eval_accuracy") or 0.0 for step in steps)
        made.append(dataclasses.replace(each, measurements=steps, value=accuracy))
    ends = outlook_of(rules, made).ends
    assert ends
    assert all(0.5 < end.low < end.end < end.high < 1 for _, end in ends)


@pytest.mark.parametrize("number", [0, 1, MIN_TRIALS - 1])
def test_too_few_trials_say_nothing(number: int) -> None:
    assert outlook_of(RULES, trials(number)) == Outlook()


def test_after_the_best_was_found_going_on_is_not_worth_it() -> None:
    """Sixty trials on a bowl without noise: nothing is left to be found."""
    going_on = outlook_of(RULES, trials(60)).going_on
    assert going_on is not None
    assert 0 <= going_on.gain < 0.01
    assert describe_going_on(going_on).startswith("not worth it" if not going_on.is_worth_it else "worth it")


SAID = {
    "within noise": (GoingOn(gain=0.001, noise=0.004), "not worth it"),
    "beyond noise": (GoingOn(gain=0.02, noise=0.004), "worth it"),
}


@pytest.mark.parametrize(("going_on", "said"), SAID.values(), ids=SAID.keys())
def test_what_going_on_promises_is_compared_with_noise(going_on: GoingOn, said: str) -> None:
    assert describe_going_on(going_on).startswith(said)
    assert describe_going_on(None) == ""


def test_effects_are_rows_of_text() -> None:
    rows = effect_rows(outlook_of(RULES, trials()).effects)
    assert rows[0][0] == "learning rate"
    assert "%" in rows[0][3]
    assert any(row[3].startswith("none seen") for row in rows)
