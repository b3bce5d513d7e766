"""The page of a report: facts and figures in one HTML file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from autosft.profiles.errors import UserError
from autosft.profiles.units import GIB, gib
from autosft.studies.formatting import end_reason, format_metric, format_number, last_step
from autosft.studies.report import figures
from autosft.studies.report.facts import (
    StudyReport,
    headline,
    running_s,
    sentences,
)
from autosft.studies.report.time_line import time_line
from autosft.studies.results.outlook import effect_rows
from autosft.studies.results.summary import peak_bytes
from autosft.studies.search.dimensions import Fixed
from autosft.studies.search.importance import MIN_RESULTS
from autosft.studies.trial import TrialRecord


def write_report(path: Path, report: StudyReport) -> None:
    """Write the report atomically.  Raises UserError if the path cannot be written."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(render(report), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written: {error.strerror}.", remedy="Choose another path with --output."
        ) from error


def render(report: StudyReport) -> str:
    """Return the page, including plotly's script, styles and data."""
    import jinja2
    from plotly.offline import get_plotlyjs

    here = files("autosft.studies.report")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((here / "page.html.jinja").read_text(encoding="utf-8"))
    drawn = [
        figures.learning_curves(report),
        figures.training_losses(report),
        figures.importance_bars(report),
        *figures.slices(report),
        time_line(report),
        figures.memory(report),
        *figures.trade_offs(report),
    ]
    by_name = {figure.name: figure for figure in drawn if figure is not None}
    data = {
        "figures": {name: {"data": figure.data, "layout": figure.layout} for name, figure in by_name.items()},
        "table": trials_table(report),
    }
    return template.render(
        report=report,
        spec=report.spec,
        best=report.summary.best,
        headline=headline(report),
        sentences=list(sentences(report)),
        settings=settings_rows(report),
        figures=by_name,
        slices=[figure for name, figure in by_name.items() if name.startswith("slice-")],
        trade_offs=[figure for name, figure in by_name.items() if name.startswith("pareto-")],
        effects=effect_rows(report.outlook.effects),
        min_results=MIN_RESULTS,
        scores=score_rows(report),
        environment=environment_rows(report),
        written_at=time.strftime("%Y-%m-%d %H:%M", time.localtime(report.written_at)),
        version=version("autosft"),
        style=(here / "style.css").read_text(encoding="utf-8"),
        script=(here / "script.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        data=for_script(data),
    )


def for_script(value: object) -> str:
    """Return JSON that is safe inside a script element: no `</script>` can end it early."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


# Tables


def settings_rows(report: StudyReport) -> list[tuple[str, str, str, str]]:
    """Return the best configuration as rows: setting, best value, default value, searched range."""
    best, default = report.summary.best, report.summary.default
    if best is None:
        return []
    of_best, of_default = dict(best.parameters), dict(default.parameters) if default else {}
    rows = []
    for name, dimension in report.spec.space.items:
        if name in of_best:
            value: Any = of_best[name]
        elif isinstance(dimension, Fixed) and hasattr(best.settings, name):
            value = getattr(best.settings, name)
            if value is None:
                continue
        else:
            continue
        searched = "" if isinstance(dimension, Fixed) else str(dimension)
        rows.append(
            (name.replace("_", " "), format_value(value), format_value(of_default.get(name)), searched)
        )
    if (plan := best.plan) is not None:
        if report.spec.pinned.padding_free:
            rows.append(("padding", "none: micro batches are rows of examples", "", ""))
        made = f"{plan.micro_batch} x {plan.gradient_accumulation} accumulated x {plan.data_parallel} devices"
        rows.append(("micro batch", made, "", f"planned for {plan.device_name}"))
    return rows


def score_rows(report: StudyReport) -> list[tuple[str, str, str, str, str]]:
    """Return all scores of checkpoints as rows: trial and step, examples, metric, value, interval."""
    return [
        (
            f"trial {score.trial} step {score.step}",
            "kept for the end" if score.examples == "final" else score.examples,
            score.metric,
            format_metric(score.value),
            ""
            if score.low is None or score.high is None
            else f"{format_metric(score.low)} to {format_metric(score.high)}",
        )
        for score in report.scores
    ]


def trials_table(report: StudyReport) -> dict[str, Any]:
    """Return all trials as rows of plain values, which the page sorts and filters.

    A column is a heading and whether it is right-aligned; a cell is the displayed text and, if different, its
    sort key.
    """
    names = list(dict.fromkeys(name for trial in report.trials for name, _ in trial.parameters))
    columns = [
        ["trial", True],
        ["state", False],
        [report.spec.metric, True],
        ["step", True],
        ["device time, min", True],
        ["predicted, GiB", True],
        ["measured, GiB", True],
        ["attempts", True],
        *([name.replace("_", " "), True] for name in names),
        ["origin", False],
        ["why", False],
    ]
    return {
        "columns": columns,
        "rows": [trial_cells(report, trial, names) for trial in report.trials],
        "best": None if report.summary.best is None else report.summary.best.number,
        "ascending": report.minimize,
    }


def trial_cells(report: StudyReport, trial: TrialRecord, names: list[str]) -> list[Any]:
    attempts = report.attempts_of(trial.number)
    parameters = dict(trial.parameters)
    seconds, peak = running_s(attempts), peak_bytes(attempts, trial)
    predicted = None
    if trial.plan is not None and not trial.plan.measures_itself:
        predicted = trial.plan.estimate.allocated.median_bytes
    return [
        trial.number,
        trial.state.value,
        cell(trial.value, format_metric(trial.value)),
        last_step(trial) or None,
        None if seconds is None else cell(seconds, f"{seconds / 60:.1f}"),
        None if predicted is None else cell(predicted, f"{predicted / GIB:.2f}"),
        None if peak is None else cell(peak, f"{peak / GIB:.2f}"),
        trial.num_attempts,
        *(
            cell(value, format_number(value)) if isinstance(value := parameters.get(name), float) else value
            for name in names
        ),
        trial.origin,
        end_reason(trial),
    ]


def cell(value: float | None, shown: str) -> list[Any] | None:
    """Return a cell that is sorted by its value and displays text; infinite values come last."""
    if value is None:
        return None
    return [shown, value if abs(value) < float("inf") else None]


def environment_rows(report: StudyReport) -> list[tuple[str, str]]:
    """Return what a result depends on besides its settings, as rows."""
    spec = report.spec
    kept: Mapping[str, Any] = spec.environment if isinstance(spec.environment, Mapping) else {}
    rows = [
        ("model", f"{spec.model} (sha256 {spec.model_fingerprint[:16]}…)"),
        ("data", f"{spec.data} (sha256 {spec.data_fingerprint[:16]}…)"),
        (
            "measured on",
            f"the same evaluation tokens for every trial (sha256 {spec.pinned.eval_fingerprint[:16]}…), "
            f"cut at {spec.pinned.eval_seq_len} tokens",
        ),
        ("precision", f"{spec.pinned.precision.value}, attention {spec.pinned.attention}"),
        ("seed", str(spec.seed)),
    ]
    for device in (kept.get("hardware") or {}).get("devices", ()):
        rows.append(
            (
                "device",
                f"{device['name']} on {device['node']}, {gib(device['total_bytes'])} ({device['uuid']})",
            )
        )
    packages = kept.get("packages") or {}
    if packages:
        rows.append(("packages", ", ".join(f"{name} {version}" for name, version in packages.items())))
    if kept.get("python"):
        rows.append(("system", f"Python {kept['python']}, {kept.get('system', '')}"))
    if git := kept.get("git"):
        rows.append(("git", git["commit"] + (" with changes" if git["is_changed"] else "")))
    return [*rows, ("database", report.database)]


def format_value(value: object) -> str:
    if value is None:
        return ""
    value = getattr(value, "value", value)
    return format_number(value) if isinstance(value, float) else str(value)
