"""`autosft studies list|show`: the contents of the study database; other subcommands are in `study_*`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from autosft.commands import remote, study_admin, study_control
from autosft.commands.options import AsJson, Command, Quiet, Storage, Study, application, teach, write_json
from autosft.commands.remote import with_server
from autosft.ui.tables import new_table, short_source, show_table

if TYPE_CHECKING:
    from rich.table import Table

    from autosft.studies.store.records import StudyOverview, StudySpec
    from autosft.studies.trial import TrialRecord

app = application()
app.add_typer(study_admin.app)


@app.callback()
def studies() -> None:
    """List, show, compare, rename, delete and export studies; control a running one."""


@app.command(
    "list",
    cls=Command,
    help=teach("List the studies in a database, newest first.", "autosft studies list"),
)
@with_server(remote.list_studies)
def list_studies(*, storage: Storage = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the studies in a database, newest first."""
    from autosft.commands.databases import reading

    with reading(storage) as records:
        overviews, url = records.studies(), records.url
    if as_json:
        write_json([overview_as_plain(overview) for overview in overviews])
    elif quiet:
        for overview in overviews:
            typer.echo(overview.spec.name)
    elif not overviews:
        typer.echo(f"{url} holds no studies yet.")
    else:
        show_table(studies_table(overviews))
        typer.echo(f"in {url}")


@app.command(
    "show",
    cls=Command,
    help=teach("Show a study's trials, best first.", "autosft studies show demo"),
)
@with_server(remote.show_study)
def show_study(
    study: Study,
    *,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show a study's trials, best first."""
    from autosft.commands.databases import reading
    from autosft.studies.files.study_folder import bring_here
    from autosft.studies.results.outlook import describe_going_on, effect_rows, outlook_of, rules_of
    from autosft.studies.results.over_untuned import describe_over_untuned, describe_untuned, over_untuned
    from autosft.studies.results.summary import best_trial
    from autosft.studies.wire import to_plain

    with reading(storage) as records:
        found = records.read_study(study)
        bring_here(found.spec.store_url, Path(found.spec.output_dir))
        spec, trials, advice = found.spec, found.trials(), found.advice()
        untuned = found.untuned()
    best = best_trial(trials, maximize=spec.direction.value == "maximize")
    compared = over_untuned(Path(spec.output_dir), untuned, best, metric=spec.metric)
    outlook = outlook_of(rules_of(spec), trials)
    if as_json:
        plain = {"study": to_plain(spec), "trials": to_plain(trials), "advice": to_plain(advice)}
        write_json(
            {
                **plain,
                "untuned": to_plain(untuned),
                "over_untuned": to_plain(compared),
                "outlook": to_plain(outlook),
            }
        )
        return
    if not quiet:
        text = describe_over_untuned(compared) or describe_untuned(untuned, spec.metric)
        for line in study_lines(spec, trials, text):
            typer.echo(line)
    show_table(trials_table(spec, trials))
    if not quiet and outlook.effects:
        show_table(effects_table(effect_rows(outlook.effects)))
        if text := describe_going_on(outlook.going_on):
            typer.echo(f"going on is {text}")
    for given in () if quiet else advice:
        typer.echo(f"advice, trial {given.trial} step {given.step}: {given.message}")


def overview_as_plain(overview: StudyOverview) -> dict[str, Any]:
    """Return a row of the list as plain JSON; `studies show` has the full specification."""
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
    """Return the table of studies."""
    from autosft.studies.formatting import format_metric

    table = new_table()
    for heading in ("study", "finished", "best", "metric", "model", "data", "created"):
        table.add_column(
            heading, overflow="fold", justify="right" if heading in ("finished", "best") else "left"
        )
    for overview in overviews:
        num_finished = sum(count for state, count in overview.num_by_state.items() if state.is_finished)
        table.add_row(
            overview.spec.name,
            f"{num_finished}/{overview.spec.num_trials}",
            format_metric(overview.best_value),
            overview.spec.metric,
            short_source(overview.spec.model),
            short_source(overview.spec.data),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(overview.created_at)),
        )
    return table


def study_lines(spec: StudySpec, trials: tuple[TrialRecord, ...], over_untuned: str) -> list[str]:
    """Describe a study and its progress."""
    num_finished = sum(trial.state.is_finished for trial in trials)
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
    if over_untuned:
        lines.append(over_untuned)
    return [*lines, ""]


def trials_table(spec: StudySpec, trials: tuple[TrialRecord, ...]) -> Table:
    """Return the table of a study's trials, best first."""
    from autosft.studies.formatting import format_metric, format_settings

    table = new_table()
    table.add_column("#", justify="right")
    table.add_column("state")
    table.add_column(spec.metric, justify="right")
    table.add_column("step", justify="right")
    table.add_column("origin")
    table.add_column("settings", overflow="fold")
    for trial in best_first(spec, trials):
        table.add_row(
            str(trial.number),
            trial.state.value if trial.failure is None else f"{trial.state.value} ({trial.failure.value})",
            format_metric(trial.value),
            "" if trial.best_step is None else str(trial.best_step),
            trial.origin,
            format_settings(trial.parameters, {}),
        )
    return table


def effects_table(rows: Sequence[tuple[str, str, str, str]]) -> Table:
    """Return the table of what was learned of each setting, the largest effect first."""
    table = new_table()
    for heading in ("setting", "best", "worst", "the worst is worse by (95 %)"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def best_first(spec: StudySpec, trials: tuple[TrialRecord, ...]) -> list[TrialRecord]:
    """Sort trials by value, those without a value last."""
    sign = 1 if spec.direction.value == "minimize" else -1
    return sorted(trials, key=lambda trial: (trial.value is None, sign * (trial.value or 0.0), trial.number))


study_control.add_to(app)
