"""`autosft studies list|show`: what is in the study database; the rest is in `study_upkeep`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import typer

from autosft.commands import study_admin, study_control
from autosft.commands.options import AsJson, Command, Quiet, Storage, Study, application, teach, write_json
from autosft.ui.tables import new_table, short_source, show_table

if TYPE_CHECKING:
    from rich.table import Table

    from autosft.studies.store.records import StudyOverview, StudySpec
    from autosft.studies.trial import TrialRecord

app = application()
app.add_typer(study_admin.app)


@app.callback()
def studies() -> None:
    """List, show, compare, rename, delete and export studies, and steer one that runs."""


@app.command(
    "list",
    cls=Command,
    help=teach("List the studies of a database, the newest first.", "autosft studies list"),
)
def list_studies(*, storage: Storage = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the studies of a database, the newest first."""
    from autosft.commands.databases import reading

    with reading(storage) as records:
        overviews, url = records.studies(), records.url
    if as_json:
        write_json([overview_as_plain(one) for one in overviews])
    elif quiet:
        for one in overviews:
            typer.echo(one.spec.name)
    elif not overviews:
        typer.echo(f"{url} holds no studies yet.")
    else:
        show_table(studies_table(overviews))
        typer.echo(f"in {url}")


@app.command(
    "show",
    cls=Command,
    help=teach("Show a study's trials, the best first.", "autosft studies show demo"),
)
def show_study(
    study: Study,
    *,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show a study's trials, the best first."""
    from autosft.commands.databases import reading
    from autosft.studies.wire import to_plain

    with reading(storage) as records:
        found = records.read_study(study)
        spec, trials, advice = found.spec, found.trials(), found.advice()
    if as_json:
        write_json({"study": to_plain(spec), "trials": to_plain(trials), "advice": to_plain(advice)})
        return
    if not quiet:
        for line in study_lines(spec, trials):
            typer.echo(line)
    show_table(trials_table(spec, trials))
    for one in () if quiet else advice:
        typer.echo(f"advice, trial {one.trial} step {one.step}: {one.message}")


def overview_as_plain(overview: StudyOverview) -> dict[str, Any]:
    """Return a line of the list as plain JSON; the whole specification is in `studies show`."""
    spec = overview.spec
    return {
        "study": spec.name,
        "model": spec.model,
        "data": spec.data,
        "metric": spec.metric,
        "direction": spec.direction.value,
        "best_value": overview.best_value,
        "num_trials": spec.num_trials,
        "num_by_state": {state.value: count for state, count in overview.num_by_state.items()},
        "created_at": overview.created_at,
        "is_running": overview.driver is not None,
    }


def studies_table(overviews: tuple[StudyOverview, ...]) -> Table:
    """Lay out the list of studies."""
    from autosft.studies.formatting import format_metric

    table = new_table()
    for heading in ("study", "finished", "best", "metric", "model", "data", "made"):
        table.add_column(
            heading, overflow="fold", justify="right" if heading in ("finished", "best") else "left"
        )
    for one in overviews:
        num_finished = sum(count for state, count in one.num_by_state.items() if state.is_finished)
        table.add_row(
            one.spec.name,
            f"{num_finished}/{one.spec.num_trials}",
            format_metric(one.best_value),
            one.spec.metric,
            short_source(one.spec.model),
            short_source(one.spec.data),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(one.created_at)),
        )
    return table


def study_lines(spec: StudySpec, trials: tuple[TrialRecord, ...]) -> list[str]:
    """Say what a study is about and how far it is."""
    num_finished = sum(one.state.is_finished for one in trials)
    better = "lower" if spec.direction.value == "minimize" else "higher"
    best = best_first(spec, trials)[0] if trials else None
    lines = [
        f"study {spec.name}: {num_finished} of {spec.num_trials} trials finished, "
        f"by {spec.metric} ({better} is better)",
        f"model {spec.model}",
        f"data  {spec.data}",
    ]
    if best is not None and best.value is not None and best.best_checkpoint:
        lines.append(f"best checkpoint {best.best_checkpoint}")
    return [*lines, ""]


def trials_table(spec: StudySpec, trials: tuple[TrialRecord, ...]) -> Table:
    """Lay out the trials of a study, the best first."""
    from autosft.studies.formatting import format_metric, format_settings

    table = new_table()
    table.add_column("#", justify="right")
    table.add_column("state")
    table.add_column(spec.metric, justify="right")
    table.add_column("step", justify="right")
    table.add_column("origin")
    table.add_column("settings", overflow="fold")
    for one in best_first(spec, trials):
        table.add_row(
            str(one.number),
            one.state.value if one.failure is None else f"{one.state.value} ({one.failure.value})",
            format_metric(one.value),
            "" if one.best_step is None else str(one.best_step),
            one.origin,
            format_settings(one.parameters, {}),
        )
    return table


def best_first(spec: StudySpec, trials: tuple[TrialRecord, ...]) -> list[TrialRecord]:
    """Order trials by their value, those without one last."""
    sign = 1 if spec.direction.value == "minimize" else -1
    return sorted(trials, key=lambda one: (one.value is None, sign * (one.value or 0.0), one.number))


study_control.add_to(app)
