"""The figures of a report, as plotly's plain JSON.

Each uses as few traces as possible: a thousand trials are a single trace with gaps, not a thousand traces.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from autosft.profiles.recipe import ByteRange
from autosft.studies.formatting import format_settings
from autosft.studies.report.facts import StudyReport, running_s
from autosft.studies.report.plotting import (
    MANY,
    Figure,
    Json,
    dots,
    finite,
    layout_of,
    short,
    unit_for,
    with_log_ticks,
)
from autosft.studies.results.summary import peak_bytes
from autosft.studies.search.dimensions import Choices, Range
from autosft.studies.trial import FailureKind, TrialRecord, TrialState

#: Outcomes of attempts that ran out of memory.
OUT_OF_MEMORY = (
    FailureKind.OUT_OF_MEMORY.value,
    FailureKind.EVALUATION_OUT_OF_MEMORY.value,
    FailureKind.HOST_OUT_OF_MEMORY.value,
)

NUM_SLICES = 4  # number of settings with a separate figure
NUM_BARS = 12  # number of settings whose importance is shown


def learning_curves(report: StudyReport) -> Figure:
    """Plot the metric over training tokens: all trials in grey, the best and the default on top."""
    metric = report.spec.metric
    best, default = report.summary.best, report.summary.default
    special = {trial.number for trial in (best, default) if trial is not None}
    lines = [trial for trial in report.trials if trial.number not in special]
    others = _curves(lines, metric, name="other trials", color="@faint", width=1, in_legend=bool(lines))
    data = [others | ({} if len(lines) < MANY else {"mode": "lines", "opacity": 0.35})]
    if default is not None and default is not best:
        data.append(
            _curves([default], metric, name=f"default (trial {default.number})", color="@second", width=2)
        )
    if best is not None:
        data.append(_curves([best], metric, name=f"best (trial {best.number})", color="@accent", width=2.5))
    data += _predicted_ends(report)
    return Figure(
        name="curves",
        caption=f"{metric} at every evaluation; a line that ends early was stopped"
        + (", and the bars are where it would have ended (95 %)." if report.outlook.ends else "."),
        height_px=380,
        data=data,
        layout=layout_of(x="training tokens", y=metric, y_log=_spans_decades(data)),
    )


def _predicted_ends(report: StudyReport) -> list[Json]:
    """Return where trials that were paused or stopped would have ended, at the tokens of a full run."""
    tokens = [trial.measurements[-1].num_tokens for trial in report.trials if trial.measurements]
    if not report.outlook.ends or not tokens:
        return []
    ends = report.outlook.ends
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "predicted ends",
            "x": [max(tokens)] * len(ends),
            "y": [short(end.end) for _, end in ends],
            "error_y": {
                "type": "data",
                "symmetric": False,
                "array": [short(end.high - end.end) for _, end in ends],
                "arrayminus": [short(end.end - end.low) for _, end in ends],
                "thickness": 1,
                "width": 0,
                "color": "@faint",
            },
            "marker": {"color": "@faint", "size": 5},
            "text": [f"trial {number}" for number, _ in ends],
            "hovertemplate": "%{text}: %{y} predicted<extra></extra>",
        }
    ]


def training_losses(report: StudyReport) -> Figure | None:
    """Plot the training loss of the best and the default trial, step by step."""
    best = report.summary.best
    data = []
    for number, reports in report.training:
        is_best = best is not None and number == best.number
        points = [step for step in reports if step.loss is not None and math.isfinite(step.loss)]
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"{'best' if is_best else 'default'} (trial {number})",
                "x": [point.num_tokens for point in points],
                "y": [short(point.loss) for point in points],
                "line": {"color": "@accent" if is_best else "@second", "width": 1.5},
                "hovertemplate": "%{y:.4f} at %{x:,} tokens",
            }
        )
    if not any(trace["x"] for trace in data):
        return None
    return Figure(
        name="training",
        caption="Training loss, averaged between reports.",
        height_px=300,
        data=data,
        layout=layout_of(x="training tokens", y="training loss"),
    )


def importance_bars(report: StudyReport) -> Figure | None:
    """Plot the importance of each searched setting for being among the best."""
    if not report.importances:
        return None
    shown = report.importances[:NUM_BARS][::-1]
    names = [name.replace("_", " ") for name, _ in shown]
    shares = [100 * share for _, share in shown]
    layout = layout_of(x="importance, %", y=None)
    layout["yaxis"]["showgrid"] = False
    layout["xaxis"]["rangemode"] = "tozero"
    return Figure(
        name="importances",
        caption="PED-ANOVA: how far the good trials' settings are from all trials'.",
        height_px=max(160, 28 * len(names) + 70),
        data=[
            {
                "type": "bar",
                "orientation": "h",
                "x": [short(share) for share in shares],
                "y": names,
                "marker": {"color": "@accent"},
                "hovertemplate": "%{y}: %{x:.0f} %<extra></extra>",
                "showlegend": False,
            }
        ],
        layout=layout,
    )


def slices(report: StudyReport) -> list[Figure]:
    """Plot the metric over each of the most important settings."""
    names = [name for name, _ in report.importances] or list(report.spec.space.searched())
    results = [trial for trial in _results(report) if finite(trial.value) is not None]
    best = report.summary.best
    figures: list[Figure] = []
    for name in names:
        points = [(dict(trial.parameters).get(name), trial) for trial in results]
        points = [(value, trial) for value, trial in points if value is not None]
        if len({value for value, _ in points}) < 2:
            continue
        if len(figures) == NUM_SLICES:
            break
        dimension = report.spec.space.searched().get(name)
        is_log = isinstance(dimension, Range) and dimension.log
        is_category = isinstance(dimension, Choices) or any(isinstance(value, str) for value, _ in points)
        layout = layout_of(
            x=name.replace("_", " "),
            y=report.spec.metric,
            x_log=is_log,
        )
        if is_log and not is_category:
            numbers = [float(value) for value, _ in points if isinstance(value, int | float)]
            layout["xaxis"] = with_log_ticks(layout["xaxis"], numbers)
        if is_category:
            layout["xaxis"]["type"] = "category"
            values = {value for value, _ in points}
            layout["xaxis"]["categoryorder"] = "array"
            layout["xaxis"]["categoryarray"] = [
                str(value) for value in sorted(values, key=lambda value: (isinstance(value, str), value))
            ]
        figures.append(
            Figure(
                name=f"slice-{name}",
                caption="",
                height_px=260,
                data=[
                    {
                        "type": "scatter",
                        "mode": "markers",
                        "x": [str(value) if is_category else value for value, _ in points],
                        "y": [short(trial.value) for _, trial in points],
                        "text": [f"trial {trial.number}" for _, trial in points],
                        "marker": {
                            **dots(len(points)),
                            "color": ["@accent" if trial is best else "@point" for _, trial in points],
                        },
                        "hovertemplate": "%{text}: %{y:.4f} at %{x}<extra></extra>",
                        "showlegend": False,
                    }
                ],
                layout=layout,
            )
        )
    return figures


#: A trial with its predicted range and measured peak, in bytes.
MemoryPoint = tuple[TrialRecord, ByteRange, int]


def memory(report: StudyReport) -> Figure | None:
    """Plot measured memory over predicted memory."""
    points: list[MemoryPoint] = []
    for trial in report.trials:
        peak = peak_bytes(report.attempts_of(trial.number), trial)
        if trial.plan is not None and peak and not trial.plan.measures_itself:
            points.append((trial, trial.plan.estimate.allocated, peak))
    if not points:
        return None
    most = max(max(range_.upper_bytes, peak) for _, range_, peak in points)
    unit, unit_bytes = unit_for(most)
    low = 0.9 * min(min(range_.median_bytes, peak) for _, range_, peak in points) / unit_bytes
    high = 1.05 * most / unit_bytes
    diagonal = {
        "type": "scatter",
        "mode": "lines",
        "name": "measured = predicted",
        "x": [short(low), short(high)],
        "y": [short(low), short(high)],
        "line": {"color": "@muted", "dash": "dot", "width": 1},
        "hoverinfo": "skip",
    }
    return Figure(
        name="memory",
        caption="Peak of each trial over the predicted median"
        + ("; its line reaches to the predicted bound." if len(points) < MANY else "."),
        height_px=360,
        data=[*memory_traces(report, points, unit=unit, unit_bytes=unit_bytes), diagonal],
        layout=layout_of(x=f"predicted, {unit}", y=f"measured, {unit}"),
    )


def memory_traces(
    report: StudyReport, points: Sequence[MemoryPoint], *, unit: str, unit_bytes: int
) -> Iterator[Json]:
    """Yield a trace for each outcome that occurs: within the bound, above it, out of memory."""
    out_of_memory = {attempt.trial for attempt in report.attempts if attempt.outcome in OUT_OF_MEMORY}
    kinds: dict[str, tuple[str, str, list[MemoryPoint]]] = {
        "within its bound": ("@accent", "circle", []),
        "passed its bound": ("@second", "circle", []),
        "ran out of memory": ("@bad", "x", []),
    }
    for trial, predicted, peak in points:
        kind = "within its bound" if peak <= predicted.upper_bytes else "passed its bound"
        kinds["ran out of memory" if trial.number in out_of_memory else kind][2].append(
            (trial, predicted, peak)
        )
    for legend, (color, symbol, chosen) in kinds.items():
        if not chosen:
            continue
        medians = [range_.median_bytes / unit_bytes for _, range_, _ in chosen]
        yield {
            "type": "scatter",
            "mode": "markers",
            "name": legend,
            "x": [short(median) for median in medians],
            "y": [short(peak / unit_bytes) for _, _, peak in chosen],
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [
                    short(range_.upper_bytes / unit_bytes - median)
                    for (_, range_, _), median in zip(chosen, medians, strict=True)
                ],
                "arrayminus": [0] * len(chosen),
                "color": "@faint",
                "thickness": 1,
                "width": 0,
                "visible": len(points) < MANY,
            },
            "text": [
                f"trial {trial.number}, micro batch {trial.plan.micro_batch if trial.plan else '?'}"
                for trial, _, _ in chosen
            ],
            "marker": dots(len(points)) | {"color": color, "symbol": symbol},
            "hovertemplate": "%{text}<br>measured %{y:.4g}, predicted %{x:.4g} " + f"{unit}<extra></extra>",
        }


def trade_offs(report: StudyReport) -> list[Figure]:
    """Plot quality over time and over memory, with the Pareto front."""
    results = [trial for trial in _results(report) if finite(trial.value) is not None]
    peaks = {trial.number: peak_bytes(report.attempts_of(trial.number), trial) for trial in results}
    unit, unit_bytes = unit_for(max((peak or 0 for peak in peaks.values()), default=0))
    costs: dict[str, tuple[str, Mapping[int, float | None]]] = {
        "time": ("device time, min", {trial.number: _minutes(report, trial) for trial in results}),
        "peak": (
            f"measured memory, {unit}",
            {number: peak / unit_bytes if peak else None for number, peak in peaks.items()},
        ),
    }
    figures = []
    for name, (title, cost) in costs.items():
        points = [
            (cost[trial.number], trial.value, trial) for trial in results if cost[trial.number] is not None
        ]
        if not points:
            continue
        front = pareto([(x, y) for x, y, _ in points], minimize=report.minimize)  # type: ignore[misc]
        others = [point for i, point in enumerate(points) if i not in front]
        front_points = sorted((points[i] for i in front), key=lambda point: point[0] or 0.0)
        data = [
            {
                "type": "scatter",
                "mode": "markers",
                "name": "other trials",
                "x": [short(x) for x, _, _ in others],
                "y": [short(y) for _, y, _ in others],
                "text": [_label(trial) for _, _, trial in others],
                "marker": {"color": "@point", **dots(len(others))},
                "hovertemplate": "%{text}<br>%{y:.4f} at %{x:.3g}<extra></extra>",
            },
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "none is better in both",
                "x": [short(x) for x, _, _ in front_points],
                "y": [short(y) for _, y, _ in front_points],
                "text": [_label(trial) for _, _, trial in front_points],
                "line": {"color": "@accent", "width": 1.5, "shape": "hv"},
                "marker": {"color": "@accent", "size": 8},
                "hovertemplate": "%{text}<br>%{y:.4f} at %{x:.3g}<extra></extra>",
            },
        ]
        figures.append(
            Figure(
                name=f"pareto-{name}",
                caption="",
                height_px=320,
                data=data,
                layout=layout_of(x=title, y=report.spec.metric),
            )
        )
    return figures


def pareto(points: Sequence[tuple[float, float]], *, minimize: bool) -> set[int]:
    """Return the indices of the Pareto-optimal points in (cost, value); the first in a tie."""
    sign = 1 if minimize else -1
    front: set[int] = set()
    best = math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1], i)):
        if sign * points[i][1] < best:
            best = sign * points[i][1]
            front.add(i)
    return front


# Parts


def _curves(
    trials: Iterable[TrialRecord], metric: str, *, name: str, color: str, width: float, in_legend: bool = True
) -> Json:
    """Return a single trace of all the trials' curves, with gaps between them."""
    x: list[float | None] = []
    y: list[float | None] = []
    text: list[str] = []
    for trial in trials:
        for measurement in trial.measurements:
            value = finite(measurement.metric(metric))
            if value is not None:
                x.append(measurement.num_tokens)
                y.append(short(value))
                text.append(f"trial {trial.number}, step {measurement.step}")
        x.append(None)
        y.append(None)
        text.append("")
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": x,
        "y": y,
        "text": text,
        "connectgaps": False,
        "line": {"color": color, "width": width},
        "marker": {"color": color, "size": width + 2.5},
        "hovertemplate": "%{text}: %{y:.4f}<extra></extra>",
        "showlegend": in_legend,
    }


def _results(report: StudyReport) -> list[TrialRecord]:
    return [trial for trial in report.trials if trial.state in (TrialState.COMPLETED, TrialState.STOPPED)]


def _label(trial: TrialRecord) -> str:
    return f"trial {trial.number}: {format_settings(trial.parameters, {})}"


def _minutes(report: StudyReport, trial: TrialRecord) -> float | None:
    seconds = running_s(report.attempts_of(trial.number))
    return None if seconds is None else seconds / 60


def _spans_decades(data: Sequence[Json]) -> bool:
    values = [value for trace in data for value in trace["y"] if value is not None]
    return bool(values) and min(values) > 0 and max(values) > 30 * min(values)
