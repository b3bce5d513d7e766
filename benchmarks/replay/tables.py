"""Tables of learning curves: settings -> losses at shares of a run.

Our own format (`benchmarks/data/curves_*.jsonl.gz`) is JSON lines.  The first describes the task:

    {"task": str, "dimensions": {NAME: DIMENSION}, "default": {NAME: value}, "shares": [float, ...]}

where DIMENSION is `{"low", "high", "log"}` or `{"values": [...]}`; each of the others is a run:

    {"parameters": {NAME: value}, "seed": int, "losses": [float | null, ...], "cost": float | absent}

Of runs of the same settings with several seeds, a replay draws one, and is judged by their mean.  Losses are
positive and smaller is better; null is a diverged run.  `read_tables` also reads what others publish, and
tells it by what is in a file, not by its name: curves of tuning as `nicholaslourie/opda` keeps them
(accuracies, several validation sets), tasks of TaskSet (settings of an optimizer, losses on several splits),
and sweeps without curves.
"""

from __future__ import annotations

import gzip
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from autosft.studies.search.dimensions import Choices, Dimension, Range, Value

#: Evaluations of a run that a replay sees, as evenly spaced as the table permits.
NUM_EVALUATIONS = 8


class TableError(ValueError):
    """A file of JSON that holds no table of a known kind."""


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
    """Return all tables in a folder (or one file), by name of file; a sweep has one for each model.

    Raises TableError for a file of JSON that is none of the kinds, and OSError for one that cannot be read.
    """
    found: list[Table] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
        if path.name.removesuffix(".gz").endswith((".json", ".jsonl")):
            found += _read(path)
    return found


def _read(path: Path) -> list[Table]:
    rows = _rows(path)
    name = path.name.split(".json")[0].split(".results")[0]
    first = rows[0] if rows and isinstance(rows[0], dict) else {}
    if "dimensions" in first:
        return [_own(rows)]
    if "learning_curves" in first:
        return [_tuning(name, rows)]
    if "hp" in first:
        return [_taskset(name.removeprefix("taskset_"), rows)]
    if "test_nll" in first:
        return _sweep(rows)
    raise TableError(f"{path}: neither curves nor a sweep of a known kind; the first row has {sorted(first)}")


def _rows(path: Path) -> list[Any]:
    """Return a file's rows: JSON lines, or one list."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as content:
        text = content.read()
    try:
        if text.lstrip().startswith("["):
            rows: list[Any] = json.loads(text)
            return rows
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise TableError(f"{path}: neither a JSON list nor JSON lines: {error}") from error


def _number(value: Any) -> float:
    """Return a loss; what is missing, no number or not positive is NaN, as of a diverged run."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) and number > 0 else math.nan


def _own(rows: list[Any]) -> Table:
    header, *runs = rows
    dimensions = {name: _dimension(given) for name, given in header["dimensions"].items()}
    by_settings: dict[str, list[Any]] = defaultdict(list)
    for run in runs:
        by_settings[json.dumps(run["parameters"], sort_keys=True)].append(run)
    found = tuple(
        Row(
            parameters=same[0]["parameters"],
            runs=_seeds(header["shares"], [each["losses"] for each in same]),
            cost=same[0].get("cost", 1.0),
        )
        for same in by_settings.values()
    )
    return _table(header["task"], dimensions, found, header["default"])


def _seeds(shares: Sequence[float], seeds: Sequence[Sequence[float | None]]) -> tuple[Run, ...]:
    """Return runs of the same settings, judged by the mean over their seeds."""
    losses = [tuple(_number(loss) for loss in each) for each in seeds]
    judged = tuple(sum(at) / len(at) for at in zip(*losses, strict=True))
    return tuple(Run(shares=tuple(shares), losses=each, judged=judged) for each in losses)


def _dimension(given: dict[str, Any]) -> Dimension:
    if "values" in given:
        return Choices(values=tuple(given["values"]))
    return Range(low=given["low"], high=given["high"], log=given.get("log", False))


#: Settings of published tunings, by their names there: ours, and what was searched.
_TUNED: dict[str, tuple[str, Dimension]] = {
    "learning_rate": ("learning_rate", Range(low=1e-6, high=1e-3, log=True)),
    "num_train_epochs": ("num_train_epochs", Range(low=1, high=4)),
    "train_batch_size": ("effective_batch_size", Range(low=16, high=64)),
    "cls_drop_out": ("dropout", Range(low=0.0, high=0.3)),
}
_NO_SETTINGS = frozenset({"iteration", "total_model_steps", "warmup_steps", "seed", "learning_curves"})


def _tuning(name: str, found: list[Any]) -> Table:
    """Read tuning curves of accuracies: chosen on the first validation set, judged on the second.

    A run's steps are its cost.  DeBERTaV3 on MultiNLI: matched and mismatched examples.
    """
    steps = [row.get("total_model_steps") or _last_step(row) for row in found]
    epochs = [float(row.get("num_train_epochs", 1)) for row in found]
    costs = epochs if len(set(epochs)) > 1 else [float(each) for each in steps]
    keys = sorted(
        {key for row in found for key, value in row.items() if key not in _NO_SETTINGS and _is_number(value)}
    )
    keys = [key for key in keys if len({row.get(key) for row in found}) > 1]
    dimensions: dict[str, Dimension] = {}
    for key in keys:
        own, known = _TUNED.get(key, (key, None))
        dimensions[own] = _around([float(row[key]) for row in found if row.get(key) is not None], known)
    if any(row.get("warmup_steps") for row in found):
        dimensions["warmup_ratio"] = Range(low=0.0, high=0.6)
    rows = []
    for row, whole, cost in zip(found, steps, costs, strict=True):
        chosen, judged, *_ = [*row["learning_curves"].values()] * 2
        at = _spread(min(len(chosen), len(judged)))
        run = Run(
            shares=tuple(min(1.0, chosen[index][0] / whole) for index in at),
            losses=tuple(_number(1 - chosen[index][1]) for index in at),
            judged=tuple(_number(1 - judged[index][1]) for index in at),
        )
        parameters = {_TUNED.get(key, (key, None))[0]: row[key] for key in keys if row.get(key) is not None}
        if "warmup_ratio" in dimensions:
            parameters["warmup_ratio"] = min(0.6, (row.get("warmup_steps") or 0) / whole)
        rows.append(Row(parameters=parameters, runs=(run,), cost=cost * len(costs) / sum(costs)))
    default: dict[str, Value] = {
        "learning_rate": 2e-5,
        "num_train_epochs": 3,
        "effective_batch_size": 32,
        "warmup_ratio": 0.1,
        "dropout": 0.1,
    }
    has_judge = all(len(row["learning_curves"]) > 1 for row in found)
    return _table(name.split("-", maxsplit=1)[0], dimensions, tuple(rows), default, has_judge=has_judge)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _last_step(row: Any) -> float:
    return float(max(point[0] for curve in row["learning_curves"].values() for point in curve))


def _around(values: list[float], known: Dimension | None = None) -> Dimension:
    """Return the range of values, on a logarithmic scale if they are spread over more than two decades."""
    if isinstance(known, Range) and known.low <= min(values) and max(values) <= known.high:
        return known
    low, high = min(values), max(values)
    return Range(low=low, high=high, log=low > 0 and high / low > 100)


def _taskset(name: str, found: list[Any]) -> Table:
    """Read a task of TaskSet: chosen on validation, judged on test examples.

    Momenta are read as what they lack to 1, which is what matters of them.
    """
    settings = [
        {
            key: max(1 - value, 1e-6) if key.startswith("beta") else value
            for key, value in row["hp"].items()
            if _is_number(value)
        }
        for row in found
    ]
    dimensions = {key: _around([float(row[key]) for row in settings if key in row]) for key in settings[0]}
    rows = []
    for row, parameters in zip(found, settings, strict=True):
        losses = row["valid"]["loss"]
        judged = row.get("test", row["valid"])["loss"]
        last = min(len(losses), len(judged)) - 1
        at = sorted({round(last * step / NUM_EVALUATIONS) for step in range(1, NUM_EVALUATIONS + 1)} - {0})
        run = Run(
            shares=tuple(index / last for index in at),
            losses=tuple(_number(losses[index]) for index in at),
            judged=tuple(_number(judged[index]) for index in at),
        )
        rows.append(Row(parameters=parameters, runs=(run,)))
    default = {"learning_rate": 1e-3, "beta1": 0.1, "beta2": 1e-3, "epsilon": 1e-8, "l1": 1e-8, "l2": 1e-8}
    return _table(name, dimensions, tuple(rows), default, has_judge="test" in found[0])


def _sweep(rows: list[Any]) -> list[Table]:
    """Read a sweep over learning rate and rank, without curves: a table of each model."""
    by_model: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        by_model[row["model"]].append(row)
    tables = []
    for model, found in sorted(by_model.items()):
        of_model = tuple(
            Row(
                parameters={"learning_rate": row["learning_rate"], "lora_rank": row["lora_rank"]},
                runs=_seeds((1.0,), [[row["test_nll"]]]),
            )
            for row in found
        )
        dimensions: dict[str, Dimension] = {
            key: Range(low=min(values), high=max(values), log=True)
            for key in ("learning_rate", "lora_rank")
            if (values := [row.parameters[key] for row in of_model])
        }
        tables.append(
            _table(f"sweep {model}", dimensions, of_model, {"learning_rate": 3e-4, "lora_rank": 16})
        )
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
    known = {key: dimensions[key].nearest(value) for key, value in default.items() if key in dimensions}
    wanted = unit(dimensions, known)
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


def with_evaluations(table: Table, most: int) -> Table:
    """Return a table of whose runs fewer evaluations are seen, evenly spread, the end included."""

    def fewer(run: Run) -> Run:
        number = len(run.shares)
        at = [math.ceil(number * step / min(most, number)) - 1 for step in range(1, min(most, number) + 1)]
        return Run(
            **{each.name: tuple(getattr(run, each.name)[index] for index in at) for each in fields(run)}
        )

    rows = tuple(replace(row, runs=tuple(fewer(run) for run in row.runs)) for row in table.rows)
    return replace(table, rows=rows)
