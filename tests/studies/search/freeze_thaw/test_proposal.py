"""From records to decisions: what counts as paused, as running, as over; what new settings are drawn from."""

from __future__ import annotations

import dataclasses
import math

import pytest

from autosft.profiles.recipe import Method
from autosft.studies.search.dimensions import Choices, Fixed
from autosft.studies.search.freeze_thaw.features import Features, mean_rate
from autosft.studies.search.freeze_thaw.proposal import NUM_STARTUP, Rules, as_loss, curves_of, decide_next
from autosft.studies.search.space import complete, settings_from
from autosft.studies.store.study_state import new_trial
from autosft.studies.trial import Measurement, TrialRecord, TrialState
from tests.studies.study_examples import space, spec

SPACE = space()
RULES = Rules(space=SPACE, metric="eval_loss", minimize=True, num_evaluations=4, seed=0)


def measurement(trial: int, evaluation: int, value: float) -> Measurement:
    return Measurement(
        trial=trial,
        attempt=1,
        step=evaluation,
        num_steps=4,
        num_tokens=evaluation,
        loss=None,
        grad_norm=None,
        learning_rate=None,
        tokens_per_s=None,
        peak_allocated_bytes=None,
        peak_reserved_bytes=None,
        metrics=(("eval_loss", value),),
        evaluation=evaluation,
    )


def trial(number: int, rate: float, values: tuple[float, ...], state: TrialState) -> TrialRecord:
    parameters = complete(SPACE, {"learning_rate": rate})
    made = new_trial(number, settings_from(SPACE, parameters, spec().fixed), parameters, origin="sampler")
    measured = tuple(measurement(number, at, value) for at, value in enumerate(values, 1))
    return dataclasses.replace(
        made, state=state, measurements=measured, value=min(values) if values else None
    )


TRIALS = [
    trial(0, 1.4e-4, (2.0, 1.7, 1.6, 1.5), TrialState.COMPLETED),
    trial(1, 4.2e-4, (1.9,), TrialState.PAUSED),
    trial(2, 4.7e-5, (2.4,), TrialState.STOPPED),
    trial(3, 1e-3, (), TrialState.INFEASIBLE),
    trial(4, 1.1e-3, (math.nan,), TrialState.COMPLETED),
    trial(5, 3e-4, (), TrialState.RUNNING),
    trial(6, 2e-4, (), TrialState.FAILED),
]


def test_records_become_curves() -> None:
    features = Features.over(SPACE.searched())
    curves = {curve.key: curve for curve in curves_of(RULES, TRIALS, features=features, paused={1})}
    assert set(curves) == {0, 1, 2, 3, 4, 5}, "a failure says nothing of the settings"
    assert [curves[key].next_share for key in range(6)] == [None, 0.5, None, None, None, 0.25]
    assert [key for key, curve in curves.items() if curve.is_running] == [5]
    assert [key for key, curve in curves.items() if curve.has_diverged] == [3, 4]
    assert curves[0].shares == (0.25, 0.5, 0.75, 1.0)


def test_a_paused_trial_or_new_settings_are_chosen() -> None:
    found = decide_next(RULES, TRIALS, paused={1}, may_start=False)
    assert found.trial == 1
    assert found.parameters is None
    found = decide_next(RULES, TRIALS, paused=(), may_start=True)
    assert found.trial is None
    assert found.parameters is not None
    assert complete(SPACE, found.parameters) == found.parameters
    assert found == decide_next(RULES, TRIALS, paused=(), may_start=True)


def test_the_first_trials_are_drawn_without_a_model() -> None:
    first = decide_next(RULES, TRIALS[: NUM_STARTUP - 1], paused=(1,), may_start=True)
    assert (first.trial, first.choice) == (None, None)
    assert first.parameters is not None


@pytest.mark.parametrize("method", [Method.FULL, Method.LORA])
def test_what_is_proposed_is_new_and_in_the_space(method: Method) -> None:
    made = space(method=Choices(values=("full", "lora"))) if method is Method.LORA else SPACE
    rules = dataclasses.replace(RULES, space=made)
    trials: list[TrialRecord] = []
    for number in range(12):
        found = decide_next(rules, trials, paused=(), may_start=True).parameters
        assert found is not None
        assert complete(made, found) == found
        assert tuple(found.items()) not in {each.parameters for each in trials}
        settings = settings_from(made, found, spec().fixed)
        asked = new_trial(number, settings, found, origin="sampler")
        loss = 1.5 + abs(math.log10(settings.learning_rate / 3e-4))
        trials.append(
            dataclasses.replace(
                asked, state=TrialState.COMPLETED, value=loss, measurements=(measurement(number, 4, loss),)
            )
        )


def test_a_space_in_which_everything_is_fixed_needs_no_features() -> None:
    fixed = {name: Fixed(value=dimension.start()) for name, dimension in SPACE.searched().items()}
    rules = dataclasses.replace(RULES, space=space(**fixed))
    trials = [dataclasses.replace(each, parameters=()) for each in TRIALS]
    found = decide_next(rules, trials, paused={1}, may_start=True)
    assert found.parameters == {}
    assert decide_next(rules, trials, paused={1}, may_start=False).trial == 1


def test_schedules_and_batches_of_the_same_mean_rate_are_alike() -> None:
    base = {"learning_rate": 1e-4, "effective_batch_size": 16, "warmup_ratio": 0.0, "lr_scheduler": "linear"}
    assert mean_rate(base) == pytest.approx(0.5e-4 / 4)
    constant = {**base, "lr_scheduler": "constant_with_warmup", "warmup_ratio": 0.2}
    assert mean_rate(constant) == pytest.approx(0.9e-4 / 4)
    assert mean_rate({**base, "effective_batch_size": 64, "learning_rate": 2e-4}) == mean_rate(base)


@pytest.mark.parametrize(
    ("value", "minimize", "loss"),
    [(1.5, True, 1.5), (0.9, False, 0.1), (1.0, False, 1e-4), (4.0, False, 0.25)],
)
def test_metrics_become_losses(value: float, minimize: bool, loss: float) -> None:
    assert as_loss(value, minimize=minimize) == pytest.approx(loss)
