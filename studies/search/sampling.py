"""What to try next: the one place where Optuna's samplers are chosen.

`propose` is a pure function of a study's trials.  It shows them to a sampler in an in-memory study, so that
asking never touches the database, and the same trials always give the same answer: a driver that was killed
while asking gets the same proposal again.
"""

from __future__ import annotations

import functools
import hashlib
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from autosft.studies.search.dimensions import Choices, Dimension, Range, Value
from autosft.studies.search.settings import SETTINGS
from autosft.studies.search.space import SearchSpace, active
from autosft.studies.trial import TrialRecord, TrialState

if TYPE_CHECKING:
    import optuna

#: Below this many trials a Gaussian process gains more from each; its time grows faster than TPE's.
GP_BELOW_NUM_TRIALS = 25

#: Number of trials a sampler is shown: the best and the latest.  TPE's default weights ramp the others down
#: to zero, and its time grows with them.
MAX_SHOWN_BEST = 30
MAX_SHOWN_LATEST = 120

_MAX_REDRAWS = 20


def num_startup_trials(num_trials: int) -> int:
    """Return how many of a study's first trials are drawn without a model: at most a third, at most 10.

    Queued trials (the default configuration, its neighbours) count towards them.
    """
    return min(num_trials // 3, 10)


def seed_for(study_seed: int, number: int) -> int:
    """Return a seed specific to a trial: two samplers with the same seed propose the same values."""
    digest = hashlib.sha256(f"{study_seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:4])


def propose(
    space: SearchSpace, trials: Sequence[TrialRecord], *, maximize: bool, num_trials: int, seed: int
) -> dict[str, Value]:
    """Return parameters for trial number `len(trials)` of a study of `num_trials`.

    The first ones are random (`num_startup_trials`).  Studies of fewer than 25 trials then use a Gaussian
    process; larger ones, and those with dimensions that depend on the method, use multivariate TPE with
    constant liar.  Settings that ran out of memory are shown as a violated constraint.  Parameters that were
    tried before are drawn again, since the same settings give the same result; they repeat only if everything
    nearby has been tried.
    """
    import optuna

    quieten()
    number = len(trials)
    use_gp = num_trials < GP_BELOW_NUM_TRIALS and not space.is_conditional
    tried = {trial.parameters for trial in trials}  # all in the order of the space
    random_only = number < num_startup_trials(num_trials)
    for redraw in range(_MAX_REDRAWS):
        own_seed = seed_for(seed, number) + redraw
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # grouping is "experimental"; infinite values are clipped
            if random_only or redraw:
                sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=own_seed)
            else:
                sampler = _model_sampler(use_gp=use_gp, seed=own_seed)
            study = optuna.create_study(direction="maximize" if maximize else "minimize", sampler=sampler)
            if not (random_only or redraw):
                study.add_trials(_shown(space, trials, maximize=maximize, to_gp=use_gp))
            proposed = _draw(study.ask(), space)
        if tuple(proposed.items()) not in tried:
            break
    return proposed


def quieten() -> None:
    """Stop Optuna from logging a line per study and trial to the terminal, which belongs to the live view."""
    import optuna

    if optuna.logging.get_verbosity() < optuna.logging.ERROR:
        optuna.logging.set_verbosity(optuna.logging.ERROR)


def _model_sampler(*, use_gp: bool, seed: int) -> optuna.samplers.BaseSampler:
    from optuna.samplers import GPSampler, TPESampler

    # One finished trial is enough for either: the number of startup trials is decided by trial number above,
    # since counting finished ones would let a wide machine draw an entire study at random.
    if use_gp:
        return GPSampler(seed=seed, n_startup_trials=1, warn_independent_sampling=False)
    return TPESampler(seed=seed, n_startup_trials=1, multivariate=True, group=True, constant_liar=True)


def distributions(dimensions: Mapping[str, Dimension]) -> dict[str, optuna.distributions.BaseDistribution]:
    """Return Optuna's distribution of each searched dimension."""
    return {name: _distribution(name, dimension) for name, dimension in dimensions.items()}


@functools.cache
def _distribution(name: str, dimension: Dimension) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choices):
        return CategoricalDistribution(dimension.values)
    assert isinstance(dimension, Range)
    low, high = dimension.low, dimension.top
    if SETTINGS[name].is_whole:
        return IntDistribution(int(low), int(high), log=dimension.log, step=int(dimension.step or 1))
    return FloatDistribution(low, high, log=dimension.log, step=dimension.step)


def _draw(trial: optuna.Trial, space: SearchSpace) -> dict[str, Value]:
    """Draw the method first and then the settings that apply to it, as readable numbers inside the space."""
    drawn: dict[str, Value] = {}
    names = sorted(space.searched(), key=lambda name: name != "method")
    for name in names:
        if name in active(space, drawn):
            drawn[name] = _suggest(trial, name, space.searched()[name])
    return {name: drawn[name] for name in space.searched() if name in drawn}


def _suggest(trial: optuna.Trial, name: str, dimension: Dimension) -> Value:
    if isinstance(dimension, Choices):
        chosen: Value = trial.suggest_categorical(name, dimension.values)  # type: ignore[assignment]
        return chosen
    assert isinstance(dimension, Range)
    low, high = dimension.low, dimension.top
    if SETTINGS[name].is_whole:
        step = int(dimension.step or 1)
        return trial.suggest_int(name, int(low), int(high), log=dimension.log, step=step)
    value = trial.suggest_float(name, low, high, log=dimension.log, step=dimension.step)
    # Three digits: 3.48e-4 and 3.4812e-4 learn the same, and people copy these numbers.
    return dimension.nearest(value if dimension.step else float(f"{value:.3g}"))


# --- what a sampler is shown ----------------------------------------------------------------------


def _shown(
    space: SearchSpace, trials: Sequence[TrialRecord], *, maximize: bool, to_gp: bool
) -> list[optuna.trial.FrozenTrial]:
    known = [trial for trial in trials if trial.state is not TrialState.FAILED]
    if len(known) > MAX_SHOWN_BEST + MAX_SHOWN_LATEST:
        earlier, latest = known[:-MAX_SHOWN_LATEST], known[-MAX_SHOWN_LATEST:]
        best = sorted(earlier, key=lambda trial: _rank(trial, maximize=maximize))[:MAX_SHOWN_BEST]
        known = sorted(best, key=lambda trial: trial.number) + latest
    values = [trial.value for trial in known if trial.value is not None and math.isfinite(trial.value)]
    neutral = statistics.median(values) if values else 0.0
    constrained = any(trial.state is TrialState.INFEASIBLE for trial in known)
    return [
        _as_optuna(space, trial, to_gp=to_gp, neutral=neutral, constrained=constrained) for trial in known
    ]


def _rank(trial: TrialRecord, *, maximize: bool) -> float:
    if trial.value is None or trial.state is TrialState.INFEASIBLE:
        return math.inf
    return -trial.value if maximize else trial.value


def _as_optuna(
    space: SearchSpace, trial: TrialRecord, *, to_gp: bool, neutral: float, constrained: bool
) -> optuna.trial.FrozenTrial:
    """Show one trial to a sampler.

    TPE reads pruned trials by their last value and step, and violated constraints of any trial.  The Gaussian
    process reads COMPLETE trials only, so stopped trials are shown to it as complete with their value (that
    of a shorter run: no better than it would have become), and infeasible ones with the median, which is
    neutral, and their constraint.
    """
    from optuna.trial import TrialState as OptunaState
    from optuna.trial import create_trial

    states = {
        TrialState.COMPLETED: OptunaState.COMPLETE,
        TrialState.STOPPED: OptunaState.COMPLETE if to_gp else OptunaState.PRUNED,
        TrialState.INFEASIBLE: OptunaState.COMPLETE if to_gp else OptunaState.PRUNED,
    }
    state = states.get(trial.state, OptunaState.RUNNING)
    value = neutral if trial.state is TrialState.INFEASIBLE else trial.value
    if trial.state is TrialState.STOPPED and value is None:  # before its first evaluation: no information
        value = neutral
    steps = {step.num_tokens: step for step in trial.measurements}
    parameters = dict(trial.parameters)
    infeasible = trial.state is TrialState.INFEASIBLE
    return create_trial(
        state=state,
        value=value if state is OptunaState.COMPLETE else None,
        params=parameters,
        distributions=distributions(active(space, parameters)),
        intermediate_values={max(steps): value} if steps and value is not None and not infeasible else {},
        constraints={"memory": 1.0 if infeasible else -1.0} if constrained else None,
    )
