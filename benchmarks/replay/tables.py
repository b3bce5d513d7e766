"""Tables of learning curves: settings -> losses at shares of a run.

Our own format (`benchmarks/data/curves_*.jsonl.gz`) is JSON lines.  The first describes the task:

    {"task": str, "dimensions": {NAME: DIMENSION}, "default": {NAME: value}, "shares": [float, ...]}

where DIMENSION is `{"low", "high", "log"}` or `{"values": [...]}`; each of the others is a run:

    {"parameters": {NAME: value}, "seed": int, "losses": [float | null, ...], "cost": float | absent}

Of runs of the same settings with several seeds, a replay draws one.  Losses are
positive and smaller is better; null is a diverged run.  `read_tables` also reads the kinds in
`../shared/curves`: files named `deberta*.jsonl.gz`, `taskset*.json.gz` and `*sweep*.jsonl`.
"""

from __future__ import annotations

import gzip
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosft.studies.search.dimensions import Choices, Dimension, Range, Value

#: Evaluations of a run that a replay sees, as evenly spaced as the table permits.
NUM_EVALUATIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One recorded run: losses to choose by and losses to judge by, at shares of it."""

    shares: tuple[float, ...]
    losses: tuple[float, ...]  # NaN: diverged
    judged: tuple[float, ...]  # on other examples, or the same as `losses`


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Settings, and the runs that were recorded with them."""

    parameters: dict[str, Value]
    runs: tuple[Run, ...]
    cost: float = 1.0  # of a full run, in mean full runs of the table


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """All that was recorded of a task."""

    name: str
    dimensions: dict[str, Dimension]
    rows: tuple[Row, ...]
    default: int  # the row nearest to the rule-based configuration
    has_judge: bool  # whether `judged` are other examples than `losses`


def read_tables(folder: Path) -> list[Table]:
    """Return all tables in a folder, by name of file; a sweep has one for each model."""
    found: list[Table] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("deberta"):
            found.append(_deberta(path))
        elif path.name.startswith("taskset"):
            found.append(_taskset(path))
        elif path.suffix == ".jsonl" and "sweep" in path.name:
            found += _sweep(path)
        elif path.name.endswith(".jsonl.gz"):
            found.append(_own(path))
    return found


def _lines(path: Path) -> Iterator[Any]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _own(path: Path) -> Table:
    header, *runs = _lines(path)
    dimensions = {name: _dimension(given) for name, given in header["dimensions"].items()}
    by_settings: dict[str, list[Any]] = defaultdict(list)
    for run in runs:
        by_settings[json.dumps(run["parameters"])].append(run)
    rows = tuple(
        Row(
            parameters=json.loads(key),
            runs=tuple(_same(header["shares"], each["losses"]) for each in same),
            cost=same[0].get("cost", 1.0),
        )
        for key, same in by_settings.items()
    )
    return _table(header["task"], dimensions, rows, header["default"])


def _same(shares: Sequence[float], losses: Sequence[float | None]) -> Run:
    numbers = tuple(math.nan if loss is None else float(loss) for loss in losses)
    return Run(shares=tuple(shares), losses=numbers, judged=numbers)


def _dimension(given: dict[str, Any]) -> Dimension:
    if "values" in given:
        return Choices(values=tuple(given["values"]))
    return Range(low=given["low"], high=given["high"], log=given.get("log", False))


def _deberta(path: Path) -> Table:
    """Read the tuning curves of DeBERTaV3 on MultiNLI: chosen on matched, judged on mismatched examples."""
    dimensions: dict[str, Dimension] = {
        "learning_rate": Range(low=1e-6, high=1e-3, log=True),
        "num_train_epochs": Range(low=1, high=4),
        "effective_batch_size": Range(low=16, high=64),
        "warmup_ratio": Range(low=0.0, high=0.6),
        "dropout": Range(low=0.0, high=0.3),
    }
    found = list(_lines(path))
    mean_epochs = sum(row["num_train_epochs"] for row in found) / len(found)
    rows = []
    for row in found:
        matched, other = (row["learning_curves"][name] for name in ("matched", "mismatched"))
        at = _spread(len(matched))
        steps = row["total_model_steps"]
        run = Run(
            shares=tuple(min(1.0, matched[index][0] / steps) for index in at),
            losses=tuple(1 - matched[index][1] for index in at),
            judged=tuple(1 - other[index][1] for index in at),
        )
        parameters = {
            "learning_rate": row["learning_rate"],
            "num_train_epochs": row["num_train_epochs"],
            "effective_batch_size": row["train_batch_size"],
            "warmup_ratio": row["warmup_steps"] / steps,
            "dropout": row["cls_drop_out"],
        }
        rows.append(Row(parameters=parameters, runs=(run,), cost=row["num_train_epochs"] / mean_epochs))
    default = {
        "learning_rate": 2e-5,
        "num_train_epochs": 3,
        "effective_batch_size": 32,
        "warmup_ratio": 0.1,
        "dropout": 0.1,
    }
    return _table("deberta", dimensions, tuple(rows), default, has_judge=True)


def _taskset(path: Path) -> Table:
    """Read a task of TaskSet: chosen on validation, judged on test examples."""
    with gzip.open(path, "rt") as content:
        found = json.load(content)
    names = list(found[0]["hp"])
    dimensions: dict[str, Dimension] = {}
    for name in names:
        values = [row["hp"][name] for row in found]
        is_log = min(values) > 0 and max(values) / min(values) > 100
        if name.startswith("beta"):  # near 1, where 1 - beta is what matters
            values, is_log = [max(1 - value, 1e-6) for value in values], True
        dimensions[name] = Range(low=min(values), high=max(values), log=is_log)
    rows = []
    for row in found:
        losses, judged = row["valid"]["loss"], row["test"]["loss"]
        last = len(losses) - 1
        at = [round(last * step / NUM_EVALUATIONS) for step in range(1, NUM_EVALUATIONS + 1)]
        run = Run(
            shares=tuple(index / last for index in at),
            losses=tuple(float(losses[index]) for index in at),
            judged=tuple(float(judged[index]) for index in at),
        )
        parameters = {
            name: max(1 - value, 1e-6) if name.startswith("beta") else value
            for name, value in row["hp"].items()
        }
        rows.append(Row(parameters=parameters, runs=(run,)))
    default = {"learning_rate": 1e-3, "beta1": 0.1, "beta2": 1e-3, "epsilon": 1e-8, "l1": 1e-8, "l2": 1e-8}
    return _table(
        path.name.removeprefix("taskset_").removesuffix(".json.gz"),
        dimensions,
        tuple(rows),
        default,
        has_judge=True,
    )


def _sweep(path: Path) -> list[Table]:
    """Read a sweep over learning rate and rank, without curves: a table of each model with enough rows."""
    by_model: dict[str, list[Any]] = defaultdict(list)
    for row in _lines(path):
        by_model[row["model"]].append(row)
    tables = []
    for model, found in sorted(by_model.items()):
        rows = tuple(
            Row(
                parameters={"learning_rate": row["learning_rate"], "lora_rank": row["lora_rank"]},
                runs=(_same((1.0,), (row["test_nll"],)),),
            )
            for row in found
        )
        dimensions: dict[str, Dimension] = {
            name: Range(low=min(values), high=max(values), log=True)
            for name in ("learning_rate", "lora_rank")
            if (values := [row.parameters[name] for row in rows])
        }
        tables.append(_table(f"sweep {model}", dimensions, rows, {"learning_rate": 3e-4, "lora_rank": 16}))
    return tables


def _spread(number: int) -> list[int]:
    """Return at most NUM_EVALUATIONS places out of so many, evenly spread, the last one included."""
    most = min(number, NUM_EVALUATIONS)
    return [math.ceil(number * step / most) - 1 for step in range(1, most + 1)]


def _table(
    name: str,
    dimensions: dict[str, Dimension],
    rows: tuple[Row, ...],
    default: dict[str, Value],
    *,
    has_judge: bool = False,
) -> Table:
    places = [unit(dimensions, row.parameters) for row in rows]
    wanted = unit(
        dimensions,
        {key: dimensions[key].nearest(value) for key, value in default.items() if key in dimensions},
    )  # type: ignore[arg-type]
    return Table(
        name=name, dimensions=dimensions, rows=rows, default=nearest(wanted, places), has_judge=has_judge
    )


def unit(dimensions: dict[str, Dimension], parameters: dict[str, Value]) -> tuple[float, ...]:
    """Return settings as a point of the unit cube; choices are 0 or 1 each, what is missing is low."""
    place: list[float] = []
    for name, dimension in dimensions.items():
        value = parameters.get(name)
        if isinstance(dimension, Choices):
            place += [float(value == choice) for choice in dimension.values]
        elif isinstance(dimension, Range):
            low, high = dimension.low, dimension.high
            here = low if value is None else float(value)
            if high == low:
                place.append(0.0)
            elif dimension.log:
                place.append(math.log(max(here, low) / low) / math.log(high / low))
            else:
                place.append((here - low) / (high - low))
    return tuple(place)


def nearest(
    wanted: Sequence[float],
    places: Sequence[Sequence[float]],
    *,
    without: frozenset[int] | set[int] = frozenset(),
) -> int:
    """Return the index of the nearest place."""
    return min(
        (index for index in range(len(places)) if index not in without),
        key=lambda index: (math.dist(wanted, places[index]), index),
    )
