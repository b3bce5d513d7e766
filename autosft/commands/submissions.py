"""What `autosft submit --server` sends: one command, or a batch from a file."""

from __future__ import annotations

import hashlib
import importlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.exceptions import TyperException
from typer.main import get_command

from autosft.commands.options import write_json
from autosft.commands.remote import request_of
from autosft.profiles.errors import UserError
from autosft.ui.queue_view import waiting_text

if TYPE_CHECKING:
    from autosft.service.client import Client

QUEUED = ("tune", "train", "evaluate")
#: Keys of a batch's entry that are not flags of its command.
OPTIONS = ("command", "name", "after", "not_before", "priority", "hold", "may_share")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How something is queued, as given on the command line."""

    after: Sequence[str] = ()
    not_before: str | None = None
    priority: int = 0
    hold: bool = False
    as_json: bool = False
    quiet: bool = False


def submit_command(client: Client, command: Sequence[str], options: Options) -> dict[str, Any]:
    """Queue one command with its flags."""
    name, *words = command
    if name not in QUEUED:
        raise UserError(f"{name!r} cannot be queued.", remedy=f"Queue {', '.join(QUEUED)}.")
    arguments, configuration = flags_given(client, name, words)
    return client.submit(
        name,
        arguments,
        configuration=configuration,
        after=[client.find(each)["id"] for each in options.after],
        not_before=None if options.not_before is None else time_of(options.not_before),
        priority=options.priority,
        hold=options.hold,
    )


def submit_batch(client: Client, file: Path, options: Options) -> list[dict[str, Any]]:
    """Queue every entry of a batch; sent again after an interruption, it queues only what is missing."""
    found = []
    known: dict[str, int] = {}
    for number, entry in enumerate(entries(file)):
        fields = dict(entry)
        given = {key: fields.pop(key) for key in OPTIONS if key in fields}
        command = str(given.pop("command", "tune"))
        content = repr((number, sorted(entry.items(), key=str))).encode()
        after = given.pop("after", ())
        names = [after] if isinstance(after, str | int) else list(after)
        arguments, configuration = request_of(client, command, fields)
        if (when := given.pop("not_before", options.not_before)) is not None:
            given["not_before"] = time_of(str(when))
        shown = client.submit(
            command,
            arguments,
            configuration=configuration,
            key=hashlib.sha256(str(file.resolve()).encode() + content).hexdigest()[:40],
            after=[known.get(str(each)) or client.find(str(each))["id"] for each in (*options.after, *names)],
            **{"priority": options.priority, "hold": options.hold, **given},
        )
        known[shown["name"]] = shown["id"]
        found.append(shown)
    return found


def entries(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a batch: a list, or `studies` over `defaults`.  Raises UserError."""
    from autosft.studies.yaml_file import read_yaml

    content = read_yaml(file)
    defaults: dict[str, Any] = {}
    if isinstance(content, dict):
        unknown = set(content) - {"defaults", "studies"}
        if unknown:
            raise UserError(
                f"{file}: unknown key {sorted(map(str, unknown))[0]!r}.", remedy="defaults, studies"
            )
        defaults, content = content.get("defaults") or {}, content.get("studies")
    if not isinstance(content, list) or not content or not isinstance(defaults, dict):
        raise UserError(
            f"{file}: no batch.", remedy="Write a list of studies, or studies: and defaults: for all of them."
        )
    for number, entry in enumerate(content, 1):
        if not isinstance(entry, dict):
            raise UserError(f"{file}: entry {number} is no mapping of flags to values.")
        yield {str(name).replace("-", "_"): value for name, value in (defaults | entry).items()}


def flags_given(client: Client, command: str, words: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """Return the flags in the words of a command line, as a request gives them."""
    parsed = get_command(importlib.import_module(f"autosft.commands.{command}").app)
    needs_file = command != "tune" and not any(not word.startswith("-") for word in words)
    try:
        context = parsed.make_context(command, list(words), resilient_parsing=needs_file)
    except TyperException as error:
        said = " ".join(error.format_message().split())
        raise UserError(said, remedy=f"See autosft {command} --help.") from error
    given = {
        name: value
        for name, value in context.params.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    return request_of(client, command, given)


def time_of(text: str, *, now: float | None = None) -> float:
    """Return a time in UNIX seconds: 22:00 (the next), 2026-12-01 08:00, +2h.  Raises UserError."""
    from autosft.studies.quantities import parse_duration

    today = datetime.fromtimestamp(time.time() if now is None else now).astimezone()
    if text.startswith("+"):
        return today.timestamp() + parse_duration(text[1:])
    if clock := re.fullmatch(r"(\d{1,2}):(\d\d)", text):
        hour, minute = int(clock[1]), int(clock[2])
        if hour < 24 and minute < 60:
            at = today.replace(hour=hour, minute=minute, second=0, microsecond=0)
            return (at if at > today else at + timedelta(days=1)).timestamp()
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"--not-before {text}: not a time.", remedy="Write 22:00, '2026-12-01 08:00' or +2h."
        ) from None
    return at.astimezone().timestamp()


def tell_all(found: Sequence[dict[str, Any]], options: Options) -> None:
    """Say what was queued."""
    if options.as_json:
        write_json(list(found) if len(found) != 1 else found[0])
        return
    for shown in found:
        if options.quiet:
            typer.echo(shown["id"])
        else:
            typer.echo(f"item {shown['id']}, {shown['name']}: {waiting_text(shown)}")
