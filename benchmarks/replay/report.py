"""Replays every searcher over every table, and prints what it took."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from replay.searchers import SEARCHERS, Given
from replay.simulate import SMALLEST_TOLERANCE, Trace, best_of, replay, tolerances
from replay.tables import Table, read_tables, with_evaluations

#: Replays of a searcher whose proposals take long: one in so many.
_SLOWER = 5
#: Tokens at which the regret is printed, in full runs, and at which it is written as JSON.
REGRET_AT = (5, 10, 20)
CURVE_AT = (1, 2, 3, 4, 5, 7, 10, 14, 20, 30, 40, 60)
#: What a searcher is compared with the others.
OURS = "ours"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What replays of one searcher on one table took."""

    tokens: tuple[tuple[float, float, float], ...]  # (interquartile mean, low, high) to each tolerance
    never: float  # share of replays that did not reach 1 % within the budget
    regret: tuple[float, ...]  # median at REGRET_AT
    judged: float  # median judged regret at the last of them
    within_noise: float  # share of replays whose winner is judged within the tight tolerance there
    of_default: float  # share of the tokens to 1 % that the default run takes, in the mean
    cpu_s: float  # per replay


def run(arguments: argparse.Namespace) -> None:
    tables = [table for folder in arguments.tables for table in read_tables(folder)]
    if not arguments.sweeps:
        tables = [table for table in tables if len(table.rows[0].runs[0].shares) > 1]
    tables = [with_evaluations(table, arguments.evaluations) for table in tables]
    every = tables
    if arguments.only:
        tables = [table for table in tables if any(word in table.name for word in arguments.only)]
    for table in tables:
        _describe(table)
        for workers in arguments.workers:
            print(f"\n{_header(workers)}")
            reached: dict[str, list[float]] = {}
            for name in arguments.searchers or SEARCHERS:
                make, is_slow = SEARCHERS[name]
                number = max(3, arguments.replays // _SLOWER) if is_slow else arguments.replays
                if arguments.slow_replays and is_slow:
                    number = arguments.slow_replays
                relative = relative_of(table, every)
                if "earlier" in name and relative is None:
                    continue
                started = time.process_time()
                traces = [
                    replay(
                        table,
                        make(Given(table=table, seed=seed, workers=workers, relative=relative)),
                        workers=workers,
                        seed=seed,
                        budget=arguments.budget,
                        enough=min(arguments.budget, REGRET_AT[-1]),
                    )
                    for seed in range(number)
                ]
                cpu_s = (time.process_time() - started) / number
                summary = summarise(table, traces, budget=arguments.budget, cpu_s=cpu_s)
                print(_row(name, number, summary), flush=True)
                reached[name] = [min(trace.reached(SMALLEST_TOLERANCE), arguments.budget) for trace in traces]
                if arguments.json:
                    _append(arguments.json, table, name, workers, traces, summary)
            print_advantage(reached)


def relative_of(table: Table, tables: Sequence[Table]) -> Table | None:
    """Return another table with the same settings, whose runs a study may have seen before; None: no such."""
    same = [
        each
        for each in tables
        if each.name != table.name and each.dimensions.keys() == table.dimensions.keys()
    ]
    return same[0] if same else None


def print_advantage(reached: dict[str, list[float]]) -> None:
    """Print our tokens to 1 % over those of each other searcher, with 95 % intervals from bootstrapping."""
    if OURS not in reached:
        return
    for name, other in reached.items():
        if name != OURS:
            ratio, low, high = ratio_of(reached[OURS], other)
            print(f"{OURS} / {name}: {ratio:.2f} ({low:.2f}-{high:.2f})", flush=True)


def ratio_of(
    ours: Sequence[float], others: Sequence[float], *, num_draws: int = 1000
) -> tuple[float, float, float]:
    """Return the ratio of two interquartile means, and its 95 % interval from bootstrapping."""
    one, other = np.sort(np.array(ours)), np.sort(np.array(others))
    draw = np.random.default_rng(0)
    ratios = np.sort(
        [
            _middle(np.sort(draw.choice(one, len(one)))) / _middle(np.sort(draw.choice(other, len(other))))
            for _ in range(num_draws)
        ]
    )
    ends = float(ratios[int(0.025 * num_draws)]), float(ratios[int(0.975 * num_draws) - 1])
    return _middle(one) / _middle(other), *ends


def summarise(table: Table, traces: Sequence[Trace], *, budget: float, cpu_s: float) -> Summary:
    wanted = (SMALLEST_TOLERANCE, *tolerances(table))
    last = REGRET_AT[-1]
    return Summary(
        tokens=tuple(
            interquartile([min(trace.reached(each), budget) for trace in traces]) for each in wanted
        ),
        never=statistics.fmean(trace.reached(SMALLEST_TOLERANCE) > budget for trace in traces),
        regret=tuple(statistics.median(trace.regret_at(at) for trace in traces) for at in REGRET_AT),
        judged=statistics.median(trace.regret_at(last, judged=True) for trace in traces),
        within_noise=statistics.fmean(trace.regret_at(last, judged=True) <= wanted[1] for trace in traces),
        of_default=statistics.fmean(
            min(1.0, table.rows[table.default].cost / min(trace.reached(SMALLEST_TOLERANCE), budget))
            for trace in traces
        ),
        cpu_s=cpu_s,
    )


def interquartile(values: Sequence[float], *, num_draws: int = 1000) -> tuple[float, float, float]:
    """Return the mean of the middle half, and its 95 % interval from bootstrapping."""
    found = np.sort(np.array(values))
    draws = np.random.default_rng(0).integers(len(found), size=(num_draws, len(found)))
    means = np.sort([_middle(np.sort(found[draw])) for draw in draws])
    return _middle(found), float(means[int(0.025 * num_draws)]), float(means[int(0.975 * num_draws) - 1])


def _middle(ordered: np.ndarray) -> float:
    quarter = len(ordered) // 4
    return float(ordered[quarter : len(ordered) - quarter].mean())


def _describe(table: Table) -> None:
    tight, loose = tolerances(table)
    best = best_of(table, [row.runs[0] for row in table.rows])[0]
    default = table.rows[table.default].runs[0]
    at_default = min(loss for loss in default.losses if math.isfinite(loss)) / best - 1
    print(
        f"\n## {table.name}: {len(table.rows)} settings, tolerances {tight:.1%} and {loose:.1%}; "
        f"the default takes {table.rows[table.default].cost:.2g} full runs, its regret is {at_default:.1%}"
    )


def _header(workers: int) -> str:
    regrets = " | ".join(f"regret at {at}" for at in REGRET_AT)
    names = f"{workers} worker{'s' * (workers > 1)} | replays | 1 % | tight | loose | never | {regrets}"
    names += " | judged | within noise | default | CPU s"
    return f"| {names} |\n|{'---|' * (names.count('|') + 1)}"


def _row(name: str, number: int, summary: Summary) -> str:
    tokens = " | ".join(f"{mean:.1f} ({low:.1f}-{high:.1f})" for mean, low, high in summary.tokens)
    regrets = " | ".join(f"{regret:.1%}" for regret in summary.regret)
    return (
        f"| {name} | {number} | {tokens} | {summary.never:.0%} | {regrets} | {summary.judged:.1%} "
        f"| {summary.within_noise:.0%} | {summary.of_default:.0%} | {summary.cpu_s:.1f} |"
    )


def _reached(traces: Sequence[Trace]) -> list[float]:
    return [trace.reached(SMALLEST_TOLERANCE) for trace in traces]


def _rounded(regrets: Iterable[float]) -> float:
    return round(statistics.median(regrets), 5)


def _append(
    path: Path, table: Table, name: str, workers: int, traces: Sequence[Trace], summary: Summary
) -> None:
    line = {
        "table": table.name,
        "searcher": name,
        "workers": workers,
        "replays": len(traces),
        "tolerances": [SMALLEST_TOLERANCE, *tolerances(table)],
        "tokens": [list(each) for each in summary.tokens],
        "never": summary.never,
        "reached": [round(each, 3) if math.isfinite(each) else None for each in _reached(traces)],
        "regret_at": {str(at): _rounded(trace.regret_at(at) for trace in traces) for at in CURVE_AT},
        "judged": summary.judged,
        "of_default": round(summary.of_default, 3),
        "within_noise": summary.within_noise,
        "cpu_s": round(summary.cpu_s, 2),
    }
    with path.open("a") as lines:
        lines.write(json.dumps(line) + "\n")
