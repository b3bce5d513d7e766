"""One search over one table on a virtual clock, with several workers."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from replay.tables import Run, Table

#: Every tolerance is at least 1 % of the best loss.
SMALLEST_TOLERANCE = 0.01


@dataclass(slots=True)
class Trial:
    """A trial of a replay."""

    number: int
    row: int
    run: Run
    cost: float
    evaluations: int = 0  # measured so far
    is_running: bool = False
    is_over: bool = False  # ran to its end, or was stopped for good
    is_protected: bool = False  # runs to its end, whatever the searcher says

    @property
    def shares(self) -> tuple[float, ...]:
        return self.run.shares[: self.evaluations]

    @property
    def losses(self) -> tuple[float, ...]:
        return self.run.losses[: self.evaluations]

    @property
    def next_share(self) -> float | None:
        return None if self.is_over else self.run.shares[self.evaluations]


@dataclass(frozen=True, slots=True)
class Start:
    """Start a trial with a row's settings."""

    row: int


@dataclass(frozen=True, slots=True)
class GoOn:
    """Go on with a paused trial."""

    trial: int


class Searcher(Protocol):
    """What decides in a replay.  `trials` is everything so far, in the order in which trials began."""

    def next(self, trials: list[Trial]) -> Start | GoOn | None:
        """Return what a free worker does; None: nothing, until another one has a result."""
        ...

    def keeps(self, trials: list[Trial], trial: Trial) -> bool:
        """Return whether a trial that was just evaluated keeps its worker."""
        ...


@dataclass(slots=True)
class Trace:
    """What a replay cost and found: (tokens in full runs, regret, judged regret) after every evaluation.

    The regret is that of the best checkpoint so far, relative to the best of the table; judged, on the other
    examples of a table that has them, relative to what an exhaustive search would choose; otherwise by
    the mean over seeds.
    """

    points: list[tuple[float, float, float]] = field(default_factory=list)
    num_started: int = 0

    def reached(self, tolerance: float) -> float:
        """Return the tokens at which the regret first was within a tolerance; infinity if it never was."""
        return next((cost for cost, regret, _ in self.points if regret <= tolerance), math.inf)

    def regret_at(self, cost: float, *, judged: bool = False) -> float:
        """Return the regret after so many tokens; that of nothing is infinite."""
        last = next((point for point in reversed(self.points) if point[0] <= cost + 1e-9), None)
        return math.inf if last is None else last[2 if judged else 1]


def best_of(table: Table, runs: Sequence[Run]) -> tuple[float, float]:
    """Return the best loss of the runs that a replay may see, one of each row, and what to judge it by.

    On a table with other examples to judge by, that is the judged loss of the same checkpoint: an exhaustive
    search would choose it.  With several seeds it is the best mean over seeds, which no search can know.
    """
    found = [
        (loss, judged)
        for run in runs
        for loss, judged in zip(run.losses, run.judged, strict=True)
        if math.isfinite(loss) and math.isfinite(judged)
    ]
    best, chosen = min(found)
    return best, chosen if table.has_judge else min(judged for _, judged in found)


def replay(
    table: Table, searcher: Searcher, *, workers: int, seed: int, budget: float, enough: float
) -> Trace:
    """Replay a search until its budget, in full runs; after `enough` tokens also once it is at the best.

    Every search starts with the default row, which always runs in full.  Of the runs of a row with several
    seeds, one is drawn for the whole replay; the regret is relative to the best of those that were drawn.
    """
    draw = random.Random(seed)
    runs = [draw.choice(row.runs) for row in table.rows]
    best, best_judged = best_of(table, runs)
    trace, trials = Trace(), []
    events: list[tuple[float, int, int]] = []  # (time, order, trial)
    spent = now = 0.0
    order = 0
    incumbent = (math.inf, math.inf)
    free = workers
    taken: set[int] = set()

    def work(trial: Trial) -> None:
        nonlocal spent, order
        done = trial.shares[-1] if trial.evaluations else 0.0
        step = (trial.run.shares[trial.evaluations] - done) * trial.cost
        trial.is_running = True
        order += 1
        heapq.heappush(events, (now + step, order, trial.number))

    while True:
        while free and spent + 1e-9 < budget:
            if not trials:
                action: Start | GoOn | None = Start(table.default)
            elif len(trials) < len(table.rows) or any(
                not each.is_over and not each.is_running for each in trials
            ):
                action = searcher.next(trials)
            else:
                action = None
            if action is None:
                break
            if isinstance(action, Start):
                assert action.row not in taken
                taken.add(action.row)
                row = table.rows[action.row]
                trial = Trial(len(trials), action.row, runs[action.row], row.cost, is_protected=not trials)
                trials.append(trial)
            else:
                trial = trials[action.trial]
                assert not trial.is_over
                assert not trial.is_running
            work(trial)
            free -= 1
        if not events:
            return trace
        now, _, number = heapq.heappop(events)
        trial = trials[number]
        done = trial.shares[-1] if trial.evaluations else 0.0
        spent += (trial.run.shares[trial.evaluations] - done) * trial.cost
        trial.evaluations += 1
        trial.is_running = False
        loss, judged = trial.losses[-1], trial.run.judged[trial.evaluations - 1]
        # What has diverged ends there, whoever searches.
        trial.is_over = trial.evaluations == len(trial.run.shares) or not math.isfinite(loss)
        if math.isfinite(loss) and loss < incumbent[0]:
            incumbent = (loss, judged if math.isfinite(judged) else math.inf)
        trace.points.append((spent, incumbent[0] / best - 1, incumbent[1] / best_judged - 1))
        trace.num_started = len(trials)
        keeps = searcher.keeps(trials, trial)
        if not trial.is_over and (trial.is_protected or keeps):
            work(trial)
        else:
            free += 1
        if spent >= budget or (spent >= enough and trace.points[-1][1] <= SMALLEST_TOLERANCE):
            return trace


def tolerances(table: Table) -> tuple[float, float]:
    """Return two tolerances of a table's regret: its noise but at least 1 %, and three times that.

    The noise is the standard deviation of log losses of the same settings, between seeds or, without seeds,
    between the examples to choose and to judge by, of the best tenth of the runs.
    """
    finals = sorted(
        (row.runs[0].losses[-1], index)
        for index, row in enumerate(table.rows)
        if math.isfinite(row.runs[0].losses[-1])
    )
    good = [table.rows[index] for _, index in finals[: max(8, len(finals) // 10)]]
    differences = []
    for row in good:
        pairs = [(run.losses[-1], run.judged[-1]) for run in row.runs] if table.has_judge else []
        if not table.has_judge and len(row.runs) > 1:
            pairs = [(row.runs[0].losses[-1], row.runs[1].losses[-1])]
        differences += [
            math.log(one / other)
            for one, other in pairs
            if one > 0 and other > 0 and math.isfinite(one + other)
        ]
    noise = 0.0
    if len(differences) > 2:
        mean = sum(differences) / len(differences)
        noise = math.sqrt(sum((each - mean) ** 2 for each in differences) / (len(differences) - 1) / 2)
    tight = max(SMALLEST_TOLERANCE, noise)
    return tight, 3 * tight
