"""The page: made on the server from the same picture as the API's answers."""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any

import jinja2
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from starlette.concurrency import run_in_threadpool

from autosft.service.api import models
from autosft.service.api.context import COOKIE, Asking, Service, The, item_of, token_in, whose
from autosft.service.api.dashboard import mount_dashboard
from autosft.service.api.page_values import device_on_page, item_on_page, trial_on_page
from autosft.service.api.runs import study_of
from autosft.service.api.shown import shown_device, shown_item
from autosft.service.api.submissions import given_in
from autosft.service.values import ItemState, Role, User
from autosft.studies.results.summary import best_trial
from autosft.studies.values import Direction

router = APIRouter(include_in_schema=False)

#: Items on the page, of each kind.
MAX_RUNNING, MAX_QUEUED, MAX_ENDED = 50, 50, 20


def add_to(app: FastAPI) -> None:
    """Add the page to the application, and Optuna's dashboard where there is one."""
    app.include_router(router)
    mount_dashboard(app)


@functools.cache
def templates() -> jinja2.Environment:
    """Return the templates; what is put into them is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("autosft.service.api", "page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page(name: str, request: Request, service: Service, user: User, **values: Any) -> HTMLResponse:
    """Return a page for a user."""
    text = (
        templates()
        .get_template(name)
        .render(
            user=user,
            is_admin=user.role is Role.ADMIN,
            has_token=token_in(request) is not None,
            has_dashboard=service.dashboard is not None,
            **values,
        )
    )
    return HTMLResponse(text, headers={"Cache-Control": "no-store"})


@router.get("/")
async def show_board(request: Request, service: The) -> Response:
    """Show the devices and the queue; to nobody known, where to sign in."""
    token = token_in(request)
    user = service.local_user if token is None else await service.user_of(token)
    if user is None:
        return RedirectResponse("/login", status_code=303)
    known = user
    return await run_in_threadpool(
        lambda: page("board.html.jinja", request, service, known, **board_values(service, known))
    )


@router.get("/page/board")
async def show_board_part(request: Request, service: The, user: Asking) -> Response:
    """Return the part that changes, made once for all who see the same."""

    def made() -> str:
        body = page("board_part.html.jinja", request, service, user, **board_values(service, user)).body
        return bytes(body).decode()

    text = await service.answers.get(service.scheduler.board(), ("page", whose(user)), made)
    return HTMLResponse(text, headers={"Cache-Control": "no-store"})


@router.get("/page/new")
def show_form(request: Request, service: The, user: Asking) -> Response:
    return page(
        "new.html.jinja",
        request,
        service,
        user,
        folders=", ".join(map(str, service.limits.folders)) or "no folder yet (autosft serve --folder)",
        allow_hub=service.limits.allow_hub,
        url=f"http://{request.headers.get('host', '')}",
    )


@router.get("/page/items/{item_id}")
def show_item(item_id: models.Id, request: Request, service: The, user: Asking) -> Response:
    values = item_values(service, user, item_id)
    given, _ = given_in(item_of(service, user, item_id).arguments, service.command_line)
    plain = {name: _in_a_line(value) for name, value in given.items()}
    return page(
        "item.html.jinja",
        request,
        service,
        user,
        flags=list(plain.items()),
        flags_json=json.dumps(plain),
        **values,
    )


@router.get("/page/items/{item_id}/part")
def show_item_part(item_id: models.Id, request: Request, service: The, user: Asking) -> Response:
    return page("item_part.html.jinja", request, service, user, **item_values(service, user, item_id))


@router.get("/page/items/{item_id}/figures")
def read_figures(item_id: models.Id, service: The, user: Asking) -> Response:
    """Return the learning curves as plotly's plain JSON, as the report draws them."""
    from autosft.studies.report import report_of
    from autosft.studies.report.figures import learning_curves

    item = item_of(service, user, item_id)
    try:
        study = study_of(service, item)
    except HTTPException:
        return Response(status_code=204)
    if not any(trial.measurements for trial in study.trials()):
        return Response(status_code=204)
    figure = learning_curves(report_of(study, database=service.records.url, now=service.clock()))
    return JSONResponse({"data": figure.data, "layout": figure.layout, "caption": figure.caption})


@router.get("/page/items/{item_id}/trials/{number}")
def show_trial(
    item_id: models.Id, number: models.TrialNumber, request: Request, service: The, user: Asking
) -> Response:
    item = item_of(service, user, item_id)
    study_of(service, item)
    return page("trial.html.jinja", request, service, user, item=item, number=number)


# Signing in


@router.get("/login")
def show_login() -> Response:
    return HTMLResponse(templates().get_template("login.html.jinja").render())


@router.post("/login")
async def sign_in(body: models.Token, service: The) -> Response:
    """Keep the token in a cookie that no script reads and no other page sends."""
    if await service.user_of(body.token) is None:
        raise HTTPException(401, "This token is nobody's, or was revoked.")
    answer = JSONResponse({"status": "ok"})
    answer.set_cookie(
        COOKIE, body.token, httponly=True, samesite="strict", secure=service.is_public, max_age=30 * 86_400
    )
    return answer


@router.post("/logout")
def sign_out() -> Response:
    answer = JSONResponse({"status": "ok"})
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer


# Assets


@router.get("/assets/{name}")
def read_asset(name: str) -> Response:
    """Return the style, the script, or plotly."""
    if name == "plotly.js":
        return Response(
            _plotly(), media_type="text/javascript", headers={"Cache-Control": "private, max-age=86400"}
        )
    kinds = {"page.css": "text/css", "page.js": "text/javascript"}
    if name not in kinds:
        raise HTTPException(404, "There is no such file.")
    text = (files("autosft.service.api.page") / name).read_text(encoding="utf-8")
    return Response(text, media_type=kinds[name], headers={"Cache-Control": "no-cache"})


@functools.cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


# Values


def board_values(service: Service, user: User) -> dict[str, Any]:
    """Return what the queue's page shows."""
    board, now = service.scheduler.board(), service.clock()
    places, seen = board.places(), board.seen_by(user)
    names = {item.id: item.name for item in seen}
    queued = [item for item in seen if item.is_queued]
    placed = [item for item in seen if item.is_placed]
    groups = {
        "running": placed[:MAX_RUNNING],
        "queued": queued[:MAX_QUEUED],
        "held": [item for item in seen if item.state is ItemState.HELD],
        "ended": [item for item in seen if item.is_ended][:MAX_ENDED],
    }
    return {
        "is_draining": board.is_draining,
        "devices": [device_on_page(shown_device(use, names)) for use in board.devices],
        "num_queued": len(queued),
        "num_running": len(placed),
        **{
            kind: [item_on_page(shown_item(item, board, places), now) for item in items]
            for kind, items in groups.items()
        },
    }


def item_values(service: Service, user: User, item_id: int) -> dict[str, Any]:
    """Return what an item's page shows."""
    item = item_of(service, user, item_id)
    values: dict[str, Any] = {
        "item": item_on_page(shown_item(item, service.scheduler.board()), service.clock()),
        "is_study": item.arguments.command == "tune",
        "has_records": False,
        "trials": [],
        "best": None,
    }
    try:
        study = study_of(service, item)
    except HTTPException:
        return values
    trials, maximize = study.trials(), study.spec.direction is Direction.MAXIMIZE
    best = best_trial(trials, maximize=maximize)
    return values | {
        "has_records": True,
        "metric": study.spec.metric,
        "num_trials": study.spec.num_trials,
        "best": None if best is None else best.number,
        "trials": [trial_on_page(trial) for trial in trials],
    }


def _in_a_line(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
