"""`/studies/ID/...`: what a study has done: trials, logs, the report, its files; and what to ask of it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Response
from fastapi.responses import FileResponse, HTMLResponse

from autosft.profiles.errors import UserError
from autosft.service.api import models
from autosft.service.api.context import Asking, Service, The, item_of
from autosft.service.api.shown import shown_trial
from autosft.service.values import Item
from autosft.studies.store.database import DatabaseError
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.store.user_commands import checked_settings, is_alive, require_possible
from autosft.studies.values import CommandKind, Direction

router = APIRouter(tags=["studies"])

Number = Annotated[int, Query(ge=0, le=10_000_000)]
#: Bytes of a log in one answer, and files in a list.
MAX_LOG, MAX_FILES = 256 << 10, 2000


@router.get("/studies/{item_id}/trials")
def list_trials(item_id: models.Id, service: The, user: Asking) -> models.Trials:
    """List a study's trials by number."""
    study = study_of(service, item_of(service, user, item_id))
    spec = study.spec
    return models.Trials(
        study=spec.name,
        metric=spec.metric,
        direction=spec.direction.value,
        num_trials=spec.num_trials,
        trials=[shown_trial(trial) for trial in study.trials()],
    )


@router.post("/studies/{item_id}/trials", status_code=202)
def enqueue_trial(item_id: models.Id, body: models.Enqueued, service: The, user: Asking) -> models.Sent:
    """Have a study try these settings next."""
    study = study_of(service, item_of(service, user, item_id))
    names = {name.removeprefix("--").replace("-", "_"): value for name, value in body.settings.items()}
    return _send(service, study, CommandKind.ENQUEUE, None, checked_settings(study, names))


@router.post("/studies/{item_id}/trials/{number}/{action}", status_code=202)
def command_trial(
    item_id: models.Id, number: models.TrialNumber, action: models.Action, service: The, user: Asking
) -> models.Sent:
    """Pause, resume or stop one trial; what it has done is kept."""
    study = study_of(service, item_of(service, user, item_id))
    return _send(service, study, CommandKind(action), number)


@router.post("/studies/{item_id}/pause", status_code=202)
def pause_study(item_id: models.Id, service: The, user: Asking) -> models.Sent:
    """Save checkpoints and free the study's devices for its own later trials; it stays where it is."""
    return _send(service, study_of(service, item_of(service, user, item_id)), CommandKind.PAUSE)


@router.post("/studies/{item_id}/resume", status_code=202)
def resume_study(item_id: models.Id, service: The, user: Asking) -> models.Sent:
    """Undo a pause."""
    return _send(service, study_of(service, item_of(service, user, item_id)), CommandKind.RESUME)


@router.post("/studies/{item_id}/stop", status_code=202)
def stop_study(item_id: models.Id, service: The, user: Asking) -> models.Sent:
    """End a running study as Ctrl+C does: everything is kept."""
    return _send(service, study_of(service, item_of(service, user, item_id)), CommandKind.STOP)


@router.get("/studies/{item_id}/log")
def read_log(item_id: models.Id, service: The, user: Asking, offset: Number = 0) -> models.Log:
    """Return the next part of what an item has printed."""
    item = item_of(service, user, item_id)
    path = service.log_of(item)
    text, end = ("", offset) if path is None else part_of(path, offset)
    return models.Log(text=text, offset=end, is_complete=not item.is_placed)


@router.get("/studies/{item_id}/trials/{number}/log")
def read_trial_log(
    item_id: models.Id, number: models.TrialNumber, service: The, user: Asking, offset: Number = 0
) -> models.Log:
    """Return the next part of what a trial's last attempt has printed."""
    study = study_of(service, item_of(service, user, item_id))
    if number >= len(study.trials()):
        raise HTTPException(404, f"There is no trial {number}.")
    path = trial_log(study, number)
    text, end = ("", offset) if path is None else part_of(path, offset)
    return models.Log(text=text, offset=end, is_complete=study.trial(number).state.is_over)


@router.get("/studies/{item_id}/report", response_class=HTMLResponse)
def read_report(item_id: models.Id, service: The, user: Asking) -> HTMLResponse:
    """Return the study's report: one page, which needs nothing else."""
    from autosft.studies.report import render, report_of

    study = study_of(service, item_of(service, user, item_id))
    page = render(report_of(study, database=service.records.url, now=service.clock()))
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    return HTMLResponse(page, headers={"Content-Security-Policy": f"{policy}; sandbox allow-scripts"})


_YAML: dict[str, Any] = {"content": {"application/yaml": {"schema": {"type": "object"}}}}


@router.get("/studies/{item_id}/export", response_class=Response, responses={200: _YAML})
def export_study(item_id: models.Id, service: The, user: Asking) -> Response:
    """Return the study's best configuration, a best.yaml for `autosft train`."""
    from autosft.studies.export import as_yaml, exported
    from autosft.studies.results.summary import best_trial

    study = study_of(service, item_of(service, user, item_id))
    best = best_trial(study.trials(), maximize=study.spec.direction is Direction.MAXIMIZE)
    if best is None:
        raise HTTPException(409, f"No trial of {study.spec.name} has been evaluated yet.")
    return Response(as_yaml(exported(study.spec, best)), media_type="application/yaml")


@router.get("/studies/{item_id}/artifacts")
def list_artifacts(item_id: models.Id, service: The, user: Asking) -> models.Artifacts:
    """List the files that an item has written, checkpoints included."""
    folder = folder_of(service, item_of(service, user, item_id))
    found = list(itertools.islice(_files(folder), MAX_FILES + 1))
    return models.Artifacts(
        folder=str(folder),
        files=[
            models.Artifact(
                path=path.relative_to(folder).as_posix(),
                num_bytes=path.stat().st_size,
                changed_at=path.stat().st_mtime,
            )
            for path in found[:MAX_FILES]
        ],
        is_complete=len(found) <= MAX_FILES,
    )


@router.get("/studies/{item_id}/artifacts/{path:path}", response_class=FileResponse)
def read_artifact(item_id: models.Id, path: str, service: The, user: Asking) -> FileResponse:
    """Return one of these files."""
    folder = folder_of(service, item_of(service, user, item_id))
    try:
        found = (folder / path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        found = None
    if found is None or folder not in found.parents or not found.is_file():
        raise HTTPException(404, "There is no such file.")
    # As a download: what a model or data holds is not ours to show as a page.
    return FileResponse(found, filename=found.name, media_type="application/octet-stream")


def study_of(service: Service, item: Item) -> StudyRecords:
    """Return the records of an item's study.  Answers 404 before there are any."""
    if item.arguments.command != "tune":
        raise HTTPException(404, f"{item.name} is no study: it is autosft {item.arguments.command}.")
    try:
        return service.records.read_study(item.name)
    except DatabaseError:
        raise
    except UserError:
        raise HTTPException(404, f"{item.name} has no records yet: it has not started.") from None


def folder_of(service: Service, item: Item) -> Path:
    """Return the folder that an item writes.  Answers 404 where there is none."""
    if item.arguments.command == "tune":
        folder = Path(study_of(service, item).spec.output_dir)
    else:
        given = dict(item.arguments.flags).get("--output")
        if given is None:
            raise HTTPException(404, f"{item.name} writes no files.")
        folder = Path(given)
    folder, root = folder.resolve(), service.limits.outputs.resolve()
    if root not in folder.parents or not folder.is_dir():
        raise HTTPException(404, f"{item.name} has no files on this server.")
    return folder


def trial_log(study: StudyRecords, number: int) -> Path | None:
    """Return the log of a trial's last attempt, of those below the study's folder."""
    paths = [attempt.log_path for attempt in study.attempts() if attempt.trial == number]
    folder = Path(study.spec.output_dir).resolve()
    logs = [Path(path).resolve() for path in paths if path]
    if not logs:  # it runs: its attempt is recorded at its end
        logs = sorted((folder / "trials" / f"{number:04d}").glob("**/*.log"), key=os.path.getmtime)
    return logs[-1] if logs and folder in logs[-1].parents else None


def part_of(path: Path, offset: int) -> tuple[str, int]:
    """Return the text of a file from a byte on, at most MAX_LOG of it, and where it ends.

    An offset of 0 in a long file begins at its last MAX_LOG bytes.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = max(0, size - MAX_LOG) if offset == 0 else min(offset, size)
            file.seek(begin)
            content = file.read(MAX_LOG)
    except OSError:
        return "", offset
    return content.decode("utf-8", "replace"), begin + len(content)


def _send(
    service: Service,
    study: StudyRecords,
    kind: CommandKind,
    trial: int | None = None,
    parameters: dict[str, Any] | None = None,
) -> models.Sent:
    """Leave a command for the process that runs a study."""
    is_running = is_alive(service.records.overview(study.spec.name), now=service.clock())
    require_possible(kind, study, trial, is_running=is_running)
    number = service.records.send_command(
        study.spec.name, kind, trial=trial, parameters=parameters, now=service.clock()
    )
    return models.Sent(id=number, is_running=is_running)


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent) / name
            if path.is_file() and not path.is_symlink():
                yield path
