"""Importance of settings: Optuna's parameter importances over our records."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from autosft.studies.search.sampling import distributions, quieten
from autosft.studies.search.space import SearchSpace, active
from autosft.studies.trial import TrialRecord, TrialState

#: With fewer results, an importance is a guess.
MIN_RESULTS = 8
#: Minimum number of good trials for PED-ANOVA (its own documentation), and the shares that may count as good.
_NUM_GOOD, _SHARES = 5, (0.1, 0.5)


def importances(
    space: SearchSpace, trials: Sequence[TrialRecord], *, maximize: bool
) -> tuple[tuple[str, float], ...]:
    """Return each searched setting's importance for being among the best trials, 0..1, largest first.

    PED-ANOVA (Watanabe et al. 2023) as implemented by Optuna: how far the settings of good trials differ from
    those of all trials.  "Good" is the best tenth, or more if that would be fewer than five trials.  Stopped
    trials count with their last value, so a setting that learns slowly but well is underrated.  Empty below
    `MIN_RESULTS` trials with a finite value, and if too many trials have the same value to separate the good
    ones.
    """
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState as OptunaState
    from optuna.trial import create_trial

    results = [
        (trial.value, dict(trial.parameters))
        for trial in trials
        if trial.state in (TrialState.COMPLETED, TrialState.STOPPED)
        and trial.value is not None
        and math.isfinite(trial.value)
    ]
    if len(results) < MIN_RESULTS:
        return ()
    quieten()
    study = optuna.create_study(direction="maximize" if maximize else "minimize")
    for value, parameters in results:
        searched = active(space, parameters)
        study.add_trial(
            create_trial(
                state=OptunaState.COMPLETE,
                value=value,
                params={name: parameters[name] for name in searched},
                distributions=distributions(searched),
            )
        )
    least, most = _SHARES
    share = min(most, max(least, _NUM_GOOD / len(results)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("error", message="Target and region quantiles select the same")
        evaluator = PedAnovaImportanceEvaluator(target_quantile=share)
        try:
            found = get_param_importances(study, evaluator=evaluator)
        except UserWarning:  # Optuna would report all settings as equally important
            return ()
    return tuple((name, value) for name, value in found.items() if math.isfinite(value))
