"""The flags of `autosft tune`, generated from the fields of a request, so that there is a single list."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from autosft.studies.metrics import METRICS, token_metrics
from autosft.studies.request import TuneRequest
from autosft.studies.search.settings import SETTINGS

#: Headings of the help in order, with their fields; "Study" takes all fields that are not listed elsewhere.
_SECTIONS = {
    "Model and data": (
        "model",
        "data",
        "eval_data",
        "max_train_samples",
        "fold",
        "block_size",
        "template_date",
        "skip_bad_records",
        "trust_remote_code",
    ),
    "Machine": (
        "hardware",
        "gpus",
        "num_gpus",
        "max_gpus_per_trial",
        "max_concurrent",
        "precision",
        "memory",
        "address",
    ),
    "Study": (),
}
_SEARCHED = "Searched settings; VALUES: a value, a list 8,16,32, or a range '1e-5..1e-3 log'"

#: Fields that are given as text and parsed by the request.
_AS_TEXT = {
    "fold": "K/N",
    "template_date": "DATE",
    "time_budget": "DURATION",
    "disk_budget": "SIZE",
    "notify": "URL|COMMAND",
    "report_to": "NAMES",
}
_METAVARS: dict[str, Callable[[], str]] = {
    "output": lambda: "FOLDER|URL",
    "metric": lambda: "|".join(METRICS),
    "final_metric": lambda: "|".join(metric.name for metric in token_metrics()),
    "target": lambda: "METRIC=VALUE",
}

F = TypeVar("F", bound=Callable[..., Any])


def searched_names() -> tuple[str, ...]:
    """Return the settings of the search space that have their own flag."""
    return tuple(name for name in SETTINGS if name not in TuneRequest.model_fields)


def with_request_flags(command: F) -> F:
    """Add a flag for every request field and searched setting to a command that takes `**given`.

    Flags that are not used arrive as None.
    """
    own = [
        parameter
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    names = [name for name in TuneRequest.model_fields if name != "space"] + list(searched_names())
    names.sort(key=lambda name: [*_SECTIONS, _SEARCHED].index(_section(name)))
    command.__signature__ = inspect.Signature([*map(_flag, names), *own])  # type: ignore[attr-defined]
    return command


def with_setting_flags(command: F) -> F:
    """Add a flag with a single value for every setting of a trial to a command that takes `**given`."""
    own = [
        parameter
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    flags = [
        _parameter(
            name,
            str,
            (setting.flag,),
            help_text=setting.help,
            metavar="VALUE",
        )
        for name, setting in SETTINGS.items()
    ]
    command.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    return command


def as_request_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given flags as fields of a request, with searched settings under `space`."""
    used = {name: value for name, value in given.items() if value is not None}
    space = {name: used.pop(name) for name in searched_names() if name in used}
    return {**used, "space": space} if space else used


def _section(name: str) -> str:
    if name in SETTINGS:
        return _SEARCHED
    return next((section for section, names in _SECTIONS.items() if name in names), "Study")


def _flag(name: str) -> inspect.Parameter:
    """Return the flag for a request field or a searched setting."""
    if name not in TuneRequest.model_fields:
        setting = SETTINGS[name]
        return _parameter(name, str, (setting.flag,), help_text=setting.help, metavar="VALUES")
    flag = f"--{name.replace('_', '-')}"
    field = TuneRequest.model_fields[name]
    value_type = str if name in _AS_TEXT else _without_none(field.annotation)
    has_default = field.default not in (None, ()) and not isinstance(field.default, bool)
    default = (
        f" [default: {field.default:g}]"
        if isinstance(field.default, float)
        else f" [default: {field.default}]"
    )
    return _parameter(
        name,
        value_type,
        (f"{flag}/--no-{flag[2:]}" if value_type is bool else flag,),
        help_text=(field.description or "") + (default if has_default else ""),
        metavar=_AS_TEXT.get(name) or _metavar(name, value_type),
    )


def _parameter(
    name: str, value_type: Any, spellings: tuple[str, ...], *, help_text: str, metavar: str | None
) -> inspect.Parameter:
    option = typer.Option(*spellings, help=help_text, metavar=metavar, rich_help_panel=_section(name))
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[value_type | None, option],
    )


def _metavar(name: str, value_type: Any) -> str | None:
    if name in _METAVARS:
        return _METAVARS[name]()
    if value_type is bool:
        return None
    if typing.get_origin(value_type) is typing.Literal:
        return "|".join(typing.get_args(value_type))
    if name in ("model", "data", "eval_data"):
        return "PATH_OR_HUB_ID"
    return {int: "N", float: "X", Path: "FOLDER"}.get(value_type, name.upper())


def _without_none(annotation: Any) -> Any:
    """Return T for `T | None`."""
    kinds = typing.get_args(annotation)
    return next(kind for kind in kinds if kind is not type(None)) if type(None) in kinds else annotation
