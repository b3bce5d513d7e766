"""The flags of the commands that the service queues, read from the commands themselves."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from typer.exceptions import TyperException
from typer.main import get_command

from autosft.commands.flags import as_request_fields
from autosft.profiles.errors import UserError
from autosft.service.requests.flags import COMMANDS, Flag
from autosft.studies.request import read_request

#: Types whose text names nothing outside of the request.
_HARMLESS = (bool, int, float)


class TyperCommandLine:
    """The command line as `autosft.service.requests.flags.CommandLine` describes it."""

    def flags(self, command: str) -> Mapping[str, Flag]:
        """Return the flags of a command by name."""
        return _flags(command)

    def check(self, command: str, arguments: Sequence[str]) -> None:
        """Raise UserError for what the command would refuse without reading a file."""
        try:
            context = _command(command).make_context(command, list(arguments))
        except TyperException as error:
            said = " ".join(error.format_message().split())
            raise UserError(said, remedy=f"See autosft {command} --help.") from error
        if command == "tune":
            own = {"config", "take_offer", "dry_run", "as_json", "quiet", "server"}
            read_request(
                as_request_fields({name: value for name, value in context.params.items() if name not in own}),
                None,
            )


@functools.cache
def _command(name: str) -> Any:
    assert name in COMMANDS
    return get_command(importlib.import_module(f"autosft.commands.{name}").app)


@functools.cache
def _flags(command: str) -> dict[str, Flag]:
    found = {}
    for parameter in _command(command).params:
        spelled = next((one for one in parameter.opts if one.startswith("--")), "")
        off = next((one for one in parameter.secondary_opts if one.startswith("--")), "")
        is_argument = parameter.param_type_name == "argument"
        found[parameter.name] = Flag(
            name=parameter.name,
            spelled="" if is_argument else spelled,
            off=off,
            is_switch=bool(getattr(parameter, "is_bool_flag", False)),
            is_repeated=bool(getattr(parameter, "multiple", False)) or parameter.nargs == -1,
            is_text=_is_text(parameter.type_descriptor),
            is_required=parameter.required,
            help=getattr(parameter, "help", None) or "",
        )
    return found


def _is_text(descriptor: Any) -> bool:
    """Whether a flag takes any text, rather than a number or one of a few words."""
    import typing

    kinds = [kind for kind in typing.get_args(descriptor.annotation) or (descriptor.annotation,)]
    return not all(kind in _HARMLESS or isinstance(kind, str) or kind is type(None) for kind in kinds)
