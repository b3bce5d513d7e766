"""The searchers that are compared."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autosft.scheduler.decide.pruning import Decision, PruningRule, decide
from autosft.studies.search.dimensions import Choices, Range
from autosft.studies.search.freeze_thaw.choose import Candidates, Choice, choose
from autosft.studies.search.freeze_thaw.curves import Curve, Earlier
from autosft.studies.search.freeze_thaw.features import Features
from autosft.studies.search.freeze_thaw.proposal import NUM_STARTUP, NUM_STARTUP_KNOWN
from autosft.studies.search.sampling import GP_BELOW_NUM_TRIALS, num_startup_trials, seed_for
from replay.simulate import GoOn, Searcher, Start, Trial
from replay.tables import Table, nearest, unit

if TYPE_CHECKING:
    import optuna

#: Trials of a study of today's searcher before it is continued with a larger --trials.
_TODAY_TRIALS = 20


class FreezeThaw:
    """Ours: `autosft.studies.search.freeze_thaw`, with rows of the table as candidates."""

    def __init__(
        self, table: Table, seed: int, *, pauses: bool = True, earlier: tuple[Earlier, ...] = ()
    ) -> None:
        self.table, self.seed, self.pauses, self.earlier = table, seed, pauses, earlier
        self.features = Features.over(table.dimensions)
        self.places = [unit(table.dimensions, row.parameters) for row in table.rows]
        self.priors = self.features.priors()
        self.of_rows = np.array([self.features.of(row.parameters) for row in table.rows])
        self.first = float(np.median([row.runs[0].shares[0] for row in table.rows]))
        self.costs = np.array([row.cost for row in table.rows])

    def next(self, trials: list[Trial]) -> Start | GoOn | None:
        taken = {trial.row for trial in trials}
        rows = [row for row in range(len(self.table.rows)) if row not in taken]
        if len(rows) > 400:
            rows = sorted(random.Random(seed_for(self.seed, len(trials))).sample(rows, 400))
        if (neighbour := neighbour_of_default(self.table, self.places, trials)) is not None:
            return Start(neighbour)
        if len(trials) < (NUM_STARTUP_KNOWN if self.earlier else NUM_STARTUP) and rows:
            return Start(random.Random(seed_for(self.seed, len(trials))).choice(rows))
        choice = self.choice(trials, rows)
        if choice is None:  # nothing was measured yet
            is_open = rows and not any(trial.evaluations for trial in trials)
            return Start(random.Random(seed_for(self.seed, len(trials))).choice(rows)) if is_open else None
        if choice.curve is not None:
            return GoOn(choice.curve)
        return None if choice.candidate is None else Start(rows[choice.candidate])

    def choice(self, trials: list[Trial], rows: list[int]) -> Choice | None:
        return choose(
            [
                Curve(
                    key=trial.number,
                    features=tuple(self.of_rows[trial.row]),
                    shares=trial.shares,
                    values=trial.losses,
                    next_share=trial.next_share,
                    is_running=trial.is_running,
                    cost=trial.cost,
                )
                for trial in trials
            ],
            Candidates(
                features=self.of_rows[rows],
                first_share=self.first if self.pauses else 1.0,
                costs=self.costs[rows],
            ),
            priors=self.priors,
            earlier=self.earlier,
        )

    def keeps(self, trials: list[Trial], trial: Trial) -> bool:
        return not self.pauses


def _earlier(given: Given, *, misleads: bool = False) -> tuple[Earlier, ...]:
    """Return 20 full runs of a related table, of half of which the first evaluations were seen.

    What misleads has the losses of the best run in the place of those of the worst one, and so on.
    """
    relative = given.relative
    assert relative is not None
    rows = random.Random(given.seed).sample(range(len(relative.rows)), min(20, len(relative.rows)))
    features = Features.over(relative.dimensions)
    runs = [relative.rows[row].runs[0] for row in rows]
    if misleads:
        by_end = sorted(range(len(runs)), key=lambda at: _or_infinity(runs[at].losses[-1]))
        place = dict(zip(by_end, reversed(by_end), strict=True))
        runs = [runs[place[at]] for at in range(len(runs))]
    curves = []
    for number, (row, run) in enumerate(zip(rows, runs, strict=True)):
        seen = len(run.shares) if number % 2 else 2
        curves.append(
            Curve(
                key=number,
                features=features.of(relative.rows[row].parameters),
                shares=run.shares[:seen],
                values=run.losses[:seen],
            )
        )
    return (Earlier(curves=tuple(curves), likeness=0.9),)


class Random:
    """Rows at random, in full."""

    def __init__(self, table: Table, seed: int) -> None:
        self.rows = list(range(len(table.rows)))
        random.Random(seed).shuffle(self.rows)

    def next(self, trials: list[Trial]) -> Start | GoOn | None:
        taken = {trial.row for trial in trials}
        return next((Start(row) for row in self.rows if row not in taken), None)

    def keeps(self, trials: list[Trial], trial: Trial) -> bool:
        return True


class PromotionAsha:
    """Asynchronous successive halving with promotions (Li et al. 2020, algorithm 2), a short one of our own.

    Rungs at the evaluations 1, eta, eta^2, ..., and the end; rows at random.
    """

    def __init__(self, table: Table, seed: int, *, eta: int = 3) -> None:
        self.eta, self.sample = eta, Random(table, seed)

    def rungs(self, trial: Trial) -> list[int]:
        last, found = len(trial.run.shares), []
        at = 1
        while at < last:
            found.append(at)
            at *= self.eta
        return [*found, last]

    def next(self, trials: list[Trial]) -> Start | GoOn | None:
        most = max(len(self.rungs(trial)) for trial in trials)
        for rung in reversed(range(most - 1)):
            reached = sorted(
                (_or_infinity(trial.run.losses[self.rungs(trial)[rung] - 1]), trial.number)
                for trial in trials
                if rung < len(self.rungs(trial)) and trial.evaluations >= self.rungs(trial)[rung]
            )
            for _, number in reached[: len(reached) // self.eta]:
                trial = trials[number]
                if (
                    not trial.is_over
                    and not trial.is_running
                    and trial.evaluations == self.rungs(trial)[rung]
                ):
                    return GoOn(number)
        return self.sample.next(trials)

    def keeps(self, trials: list[Trial], trial: Trial) -> bool:
        return trial.evaluations not in self.rungs(trial)


class Optuna:
    """A sampler and a pruner of Optuna; what is sampled is moved to the nearest row that was not tried."""

    def __init__(
        self,
        table: Table,
        *,
        sampler: optuna.samplers.BaseSampler,
        pruner: optuna.pruners.BasePruner | None = None,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore")
        self.table, self.prunes = table, pruner is not None
        self.places = [unit(table.dimensions, row.parameters) for row in table.rows]
        self.study = optuna.create_study(sampler=sampler, pruner=pruner or optuna.pruners.NopPruner())
        self.trials: dict[int, optuna.Trial] = {}

    def _begin(self, number: int, row: int | None, taken: set[int]) -> int:
        if row is not None:
            self.study.enqueue_trial(self.table.rows[row].parameters, skip_if_exists=False)
        trial = self.study.ask(distributions(self.table))
        if row is None:
            row = nearest(unit(self.table.dimensions, trial.params), self.places, without=taken)
            for name, value in self.table.rows[row].parameters.items():
                distribution = distributions(self.table)[name]
                self.study._storage.set_trial_param(  # told what was really run
                    trial._trial_id, name, distribution.to_internal_repr(value), distribution
                )
        self.trials[number] = trial
        return row

    def next(self, trials: list[Trial]) -> Start | GoOn | None:
        if not self.trials:
            self._begin(0, trials[0].row, set())
        if len(trials) == len(self.table.rows):
            return None
        return Start(self._begin(len(trials), None, {trial.row for trial in trials}))

    def keeps(self, trials: list[Trial], trial: Trial) -> bool:
        import optuna

        if not self.trials:
            self._begin(0, trials[0].row, set())
        told = self.trials[trial.number]
        loss = trial.losses[-1]
        loss = loss if math.isfinite(loss) else 1e6
        told.report(loss, trial.evaluations)
        if trial.is_over:
            self.study.tell(
                told, min(_or_infinity(each) if math.isfinite(each) else 1e6 for each in trial.losses)
            )
            return False
        if self.prunes and not trial.is_protected and told.should_prune():
            trial.is_over = True
            self.study.tell(told, state=optuna.trial.TrialState.PRUNED)
            return False
        return True


class Today(Optuna):
    """What autosft did before: its samplers by number of trial, and stopping at rungs (4 evaluations).

    The default, three times and a third of its learning rate, a third of the first 20 at random, then a
    Gaussian process below 25 trials and TPE beyond, as in a study that is continued with a larger --trials.
    """

    def __init__(self, table: Table, seed: int) -> None:
        import optuna

        self.seed = seed
        super().__init__(table, sampler=optuna.samplers.RandomSampler(seed=seed))
        self.rule = PruningRule()

    def next(self, trials: list[Trial]) -> Start | GoOn | None:
        import optuna

        number, seed = len(trials), seed_for(self.seed, len(trials))
        if (row := neighbour_of_default(self.table, self.places, trials)) is not None:
            if not self.trials:
                self._begin(0, trials[0].row, set())
            return Start(self._begin(number, row, set()))
        if number < num_startup_trials(_TODAY_TRIALS):
            self.study.sampler = optuna.samplers.RandomSampler(seed=seed)
        elif number < GP_BELOW_NUM_TRIALS:
            self.study.sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=1)
        else:
            self.study.sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=1, multivariate=True, group=True, constant_liar=True
            )
        return super().next(trials)

    def keeps(self, trials: list[Trial], trial: Trial) -> bool:
        import optuna

        if not super().keeps(trials, trial):
            return False
        rung = trial.evaluations * self.rule.num_rungs / len(trial.run.shares)
        if rung != int(rung):
            return True
        peers = [
            each.run.losses[trial.evaluations - 1]
            for each in trials
            if each.number != trial.number and each.evaluations >= trial.evaluations
        ]
        decision = decide(
            rung=int(rung),
            value=_or_infinity(trial.losses[-1]),
            peers=[_or_infinity(peer) for peer in peers],
            rule=self.rule,
            minimize=True,
            is_protected=trial.is_protected,
        )
        if decision is Decision.CONTINUE:
            return True
        trial.is_over = True
        told, loss = self.trials[trial.number], min(_or_infinity(each) for each in trial.losses)
        if trial.number < GP_BELOW_NUM_TRIALS:  # as `sampling` shows it to the Gaussian process
            self.study.tell(told, loss if math.isfinite(loss) else 1e6)
        else:
            self.study.tell(told, state=optuna.trial.TrialState.PRUNED)
        return False


def neighbour_of_default(
    table: Table, places: Sequence[Sequence[float]], trials: Sequence[Trial]
) -> int | None:
    """Return what a study tries right after the default: three times and a third of its learning rate."""
    if len(trials) not in (1, 2) or "learning_rate" not in table.dimensions:
        return None
    default = table.rows[trials[0].row].parameters
    wanted = float(default["learning_rate"]) * (3 if len(trials) == 1 else 1 / 3)
    rate = table.dimensions["learning_rate"].nearest(wanted)  # type: ignore[arg-type]
    place = unit(table.dimensions, {**default, "learning_rate": rate})
    return nearest(place, places, without={trial.row for trial in trials})


def distributions(table: Table) -> dict[str, optuna.distributions.BaseDistribution]:
    """Return Optuna's distributions of a table's settings."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return {
        name: CategoricalDistribution(dimension.values)
        if isinstance(dimension, Choices)
        else FloatDistribution(dimension.low, dimension.high, log=dimension.log)
        for name, dimension in table.dimensions.items()
        if isinstance(dimension, Choices | Range)
    }


def _or_infinity(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _optuna(
    table: Table, seed: int, *, sampler: str, pruner: str | None = None, workers: int = 1
) -> Searcher:
    import optuna

    pruners = {
        None: lambda: None,
        "median": optuna.pruners.MedianPruner,
        "hyperband": lambda: optuna.pruners.HyperbandPruner(
            min_resource=1, max_resource=len(table.rows[0].runs[0].shares), reduction_factor=3
        ),
    }
    samplers = {
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, constant_liar=workers > 1),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Optuna(table, sampler=samplers[sampler](), pruner=pruners[pruner]())


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a searcher is made for."""

    table: Table
    seed: int
    workers: int
    relative: Table | None  # another table with the same settings


def _ours(given: Given, **changes: Any) -> Searcher:
    return FreezeThaw(given.table, given.seed, **changes)


def _of_optuna(sampler: str, pruner: str | None = None) -> Callable[[Given], Searcher]:
    return lambda given: _optuna(
        given.table, given.seed, sampler=sampler, pruner=pruner, workers=given.workers
    )


#: name -> (what makes the searcher; whether a replay takes long).
SEARCHERS: dict[str, tuple[Callable[[Given], Searcher], bool]] = {
    "ours": (_ours, False),
    "ours + earlier": (lambda given: _ours(given, earlier=_earlier(given)), False),
    "ours + misleading earlier": (lambda given: _ours(given, earlier=_earlier(given, misleads=True)), False),
    "ours, full runs": (lambda given: _ours(given, pauses=False), False),
    "before": (lambda given: Today(given.table, given.seed), True),
    "GP": (_of_optuna("gp"), True),
    "TPE": (_of_optuna("tpe"), False),
    "TPE + median": (_of_optuna("tpe", "median"), False),
    "TPE + Hyperband": (_of_optuna("tpe", "hyperband"), False),
    "Hyperband": (_of_optuna("random", "hyperband"), False),
    "ASHA, promotion": (lambda given: PromotionAsha(given.table, given.seed), False),
    "random": (lambda given: Random(given.table, given.seed), False),
}
