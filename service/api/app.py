"""The application: routers, and every failure as one JSON object with what helps."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from autosft.profiles.errors import StorageError, StudyFailedError, UserError
from autosft.profiles.masking import masked
from autosft.service.api import fits, items, models, operations, pages, runs
from autosft.service.api.context import Service
from autosft.service.api.guard import Guard
from autosft.service.requests.planner import PlannerFailedError
from autosft.service.store.queue_store import ItemMovedError
from autosft.studies.store.database import DatabaseError

logger = logging.getLogger(__name__)

#: A best.yaml, and the flags beside it.
MAX_BODY_BYTES = 4 << 20
#: Said of pages and files too: their problems are JSON.
_JSON = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": models.Problem, "description": "No token, or one that is nobody's."},
    403: {"model": models.Problem, "description": "Not for this user, or asked by another page."},
    404: {"model": models.Problem, "description": "Not there, or not this user's."},
    409: {"model": models.Problem, "description": "Not in this state."},
    413: {"model": models.Problem, "description": "Larger than the server takes."},
    422: {"model": models.Problem, "description": "Wrong, with what helps."},
    503: {"model": models.Problem, "description": "Something that this needs does not answer."},
}
_PROBLEMS = {status: said | _JSON for status, said in _PROBLEMS.items()}


def create_app(service: Service) -> ASGIApp:
    """Return the application that serves a queue."""
    app = FastAPI(
        title="autosft",
        summary="The queue of fine-tuning studies of a machine, a team or a cluster.",
        version=version("autosft"),
        telemetry={"tracing": False, "metrics": False, "logs": False},
        max_body_size=MAX_BODY_BYTES,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        responses=_PROBLEMS,
    )
    app.state.service = service
    for router in (items.router, runs.router, fits.router, operations.router):
        app.include_router(router)
    pages.add_to(app)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    for kind in (DatabaseError, PlannerFailedError, StorageError, StudyFailedError):
        app.add_exception_handler(kind, _unavailable)
    app.add_exception_handler(Exception, _bug)
    return Guard(app, hosts=service.hosts)


def problem(status: int, error: str, remedy: str | None = None, **headers: str) -> JSONResponse:
    """Return a refusal."""
    said = models.Problem(error=masked(error), remedy=None if remedy is None else masked(remedy))
    return JSONResponse(said.model_dump(), status_code=status, headers=headers)


async def _user_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, UserError)
    return problem(409 if isinstance(error, ItemMovedError) else 422, error.message, error.remedy)


async def _http_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, str(error.detail), **dict(error.headers or {}))


async def _validation_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    more = len(error.errors()) - 1
    return problem(422, f"{where}: {first['msg']}{f' (and {more} more)' if more else ''}.")


async def _unavailable(_request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, UserError):
        return problem(503, error.message, error.remedy)
    return problem(503, str(error))


async def _bug(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return problem(500, "This is a bug in autosft; the server's log has the details.")
