"""What the samplers propose, and what they are shown."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from autosft.studies.search import sampling
from autosft.studies.search.dimensions import Choices, Fixed, Range
from autosft.studies.search.parsing import parse_dimension
from autosft.studies.search.sampling import num_startup_trials, propose, seed_for
from autosft.studies.search.space import FixedSettings, SearchSpace, complete, settings_from
from autosft.studies.trial import Measurement, TrialRecord, TrialState
from tests.studies.study_examples import space

#: Two dimensions are enough to see what a sampler does, and quick.
SMALL = space(
    warmup_ratio=Fixed(value=0.1),
    weight_decay=Fixed(value=0.0),
    lr_scheduler=Fixed(value="cosine"),
    learning_rate=Range(low=1e-5, high=1e-2, log=True),
    effective_batch_size=Choices(values=(8, 16, 32, 64)),
)


def trial(
    number: int,
    parameters: dict[str, float | int | str],
    value: float | None,
    state: TrialState = TrialState.COMPLETED,
    where: SearchSpace = SMALL,
) -> TrialRecord:
    measurements = (
        ()
        if value is None
        else (
            Measurement(
                trial=number,
                attempt=1,
                step=10,
                num_steps=10,
                num_tokens=1000,
                loss=value,
                grad_norm=None,
                learning_rate=None,
                tokens_per_s=None,
                peak_allocated_bytes=None,
                peak_reserved_bytes=None,
                metrics=(("eval_loss", value),),
                evaluation=1,
            ),
        )
    )
    return TrialRecord(
        number=number,
        state=state,
        settings=settings_from(where, parameters, FixedSettings(num_train_examples=10)),
        parameters=tuple(parameters.items()),
        origin="sampler",
        plan=None,
        num_attempts=1,
        value=value,
        best_step=None,
        best_checkpoint=None,
        failure=None,
        message="",
        measurements=measurements,
        started_at=None,
        finished_at=None,
    )


def run(
    judge: Callable[[dict[str, float | int | str]], tuple[float | None, TrialState]],
    *,
    num: int,
    of: int,
    where: SearchSpace = SMALL,
    maximize: bool = False,
) -> list[TrialRecord]:
    trials: list[TrialRecord] = []
    for number in range(num):
        parameters = propose(where, trials, maximize=maximize, num_trials=of, seed=0)
        assert complete(where, parameters) == parameters, "a proposal is inside the space and complete"
        trials.append(trial(number, parameters, *judge(parameters), where=where))
    return trials


def distance(parameters: dict[str, float | int | str]) -> float:
    """A loss that is least at a learning rate of 1e-3 and a batch of 32."""
    batch = 0.0 if parameters["effective_batch_size"] == 32 else 0.3
    return 1.0 + abs(math.log10(float(parameters["learning_rate"])) + 3) + batch


@pytest.mark.parametrize(
    ("num_trials", "num_startup"), [(1, 0), (3, 1), (12, 4), (24, 8), (30, 10), (3000, 10)]
)
def test_at_most_a_third_is_random(num_trials: int, num_startup: int) -> None:
    assert num_startup_trials(num_trials) == num_startup


def test_seeds_differ_by_study_and_by_trial() -> None:
    seeds = {seed_for(study, number) for study in range(20) for number in range(20)}
    assert len(seeds) == 400


@pytest.mark.slow
@pytest.mark.parametrize("num_trials", [12, 60])
@pytest.mark.parametrize("maximize", [False, True])
def test_both_samplers_learn_and_are_deterministic(num_trials: int, maximize: bool) -> None:
    def judge(parameters: dict[str, float | int | str]) -> tuple[float, TrialState]:
        loss = distance(parameters)
        return (-loss if maximize else loss), TrialState.COMPLETED

    num = min(num_trials, 20)
    trials = run(judge, num=num, of=num_trials, maximize=maximize)
    start = num_startup_trials(num_trials)
    losses = [distance(dict(item.parameters)) for item in trials]
    assert sum(losses[-5:]) / 5 < sum(losses[:start]) / start
    for number in (0, num - 1):
        again = propose(SMALL, trials[:number], maximize=maximize, num_trials=num_trials, seed=0)
        assert again == dict(trials[number].parameters)


@pytest.mark.slow
@pytest.mark.parametrize("num_trials", [12, 60])
def test_what_ran_out_of_memory_is_seldom_asked_again(num_trials: int) -> None:
    """The large batches do not fit, and are where the loss would be best: no value tells the sampler."""

    def judge(parameters: dict[str, float | int | str]) -> tuple[float | None, TrialState]:
        if int(parameters["effective_batch_size"]) >= 32:
            return None, TrialState.INFEASIBLE
        return distance(parameters), TrialState.COMPLETED

    trials = run(judge, num=12 if num_trials == 12 else 30, of=num_trials)
    later = trials[-6:]
    assert sum(item.state is TrialState.INFEASIBLE for item in later) <= 2


@pytest.mark.slow
def test_stopped_trials_teach_both_samplers() -> None:
    """Optuna's Gaussian process ignores pruned trials; a study in which most are stopped still learns."""

    def judge(parameters: dict[str, float | int | str]) -> tuple[float, TrialState]:
        loss = distance(parameters)
        return loss, TrialState.COMPLETED if loss < 1.2 else TrialState.STOPPED

    trials = run(judge, num=12, of=12)
    losses = [distance(dict(item.parameters)) for item in trials]
    assert min(losses[6:]) < 1.2
    assert sum(losses[-4:]) < sum(losses[:4])


def test_a_wide_machine_does_not_draw_a_study_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen slots ask for sixteen trials before most have finished: the third one knows of the first."""
    models: list[bool] = []
    chosen = sampling._model_sampler
    monkeypatch.setattr(
        sampling, "_model_sampler", lambda **options: (models.append(True), chosen(**options))[1]
    )
    trials = [trial(0, {"learning_rate": 1e-3, "effective_batch_size": 32}, 1.0)]
    for number in range(1, 16):
        parameters = propose(SMALL, trials, maximize=False, num_trials=30, seed=0)
        trials.append(trial(number, parameters, None, TrialState.RUNNING))
    assert len(models) == 16 - num_startup_trials(30)


@pytest.mark.slow
def test_running_trials_are_not_asked_again() -> None:
    trials = [trial(0, {"learning_rate": 1e-3, "effective_batch_size": 32}, 1.0)]
    for number in range(1, 8):
        parameters = propose(SMALL, trials, maximize=False, num_trials=12, seed=0)
        trials.append(trial(number, parameters, None, TrialState.RUNNING))
    assert len({item.parameters for item in trials}) == 8


def test_a_small_space_is_tried_whole_before_anything_repeats() -> None:
    tiny = space(
        learning_rate=Choices(values=(1e-4, 1e-3)),
        warmup_ratio=Fixed(value=0.1),
        weight_decay=Fixed(value=0.0),
        lr_scheduler=Fixed(value="cosine"),
        effective_batch_size=Choices(values=(8, 16, 32)),
    )
    trials = run(lambda _: (1.0, TrialState.COMPLETED), num=8, of=8, where=tiny)
    assert len({item.parameters for item in trials[:6]}) == 6


def test_a_space_with_conditions_draws_only_what_counts() -> None:
    both = space(
        method=parse_dimension("method", "full, lora"),
        lora_rank=Choices(values=(4, 8)),
        lora_alpha_ratio=Fixed(value=2.0),
    )
    trials = run(lambda p: (distance(p), TrialState.COMPLETED), num=12, of=12, where=both)
    methods = {dict(item.parameters)["method"] for item in trials}
    assert methods == {"full", "lora"}
    for item in trials:
        parameters = dict(item.parameters)
        assert ("lora_rank" in parameters) == (parameters["method"] == "lora")


def test_a_failed_trial_has_no_influence() -> None:
    good = [trial(0, {"learning_rate": 1e-3, "effective_batch_size": 32}, 1.0)]
    failed = trial(1, {"learning_rate": 1e-4, "effective_batch_size": 8}, None, TrialState.FAILED)
    [shown] = sampling._shown(SMALL, [*good, failed], maximize=False, to_gp=False)
    assert shown.params == dict(good[0].parameters)


def test_a_long_study_shows_its_best_and_its_latest() -> None:
    many = [
        trial(
            number, {"learning_rate": 1e-3, "effective_batch_size": 32}, 1.0 + (number * 7919 % 2000) / 1000
        )
        for number in range(2000)
    ]
    shown = sampling._shown(SMALL, many, maximize=False, to_gp=False)
    assert len(shown) == sampling.MAX_SHOWN_BEST + sampling.MAX_SHOWN_LATEST
    assert min(item.value for item in shown) == 1.0
    assert [item.value for item in shown[-3:]] == [item.value for item in many[-3:]]
