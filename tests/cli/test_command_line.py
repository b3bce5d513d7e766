"""The command line is frozen: names of commands and flags change on purpose only."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from autosft.cli import SUMMARIES, module_name
from autosft.commands.flags import as_request_fields, searched_names
from autosft.studies.request import TuneRequest, read_request

FROZEN = Path(__file__).with_name("command_line.txt")


def commands() -> dict[str, object]:
    """Return every command by its full name."""
    found: dict[str, object] = {}
    for name in SUMMARIES:
        found |= within(name, get_command(importlib.import_module(module_name(name)).app))
    return found


def within(name: str, command: Any) -> dict[str, object]:
    """Return a command by its name, or those of a group, and the group itself if it has flags of its own."""
    inner = getattr(command, "commands", None)
    if not inner:
        return {name: command}
    found: dict[str, object] = {name: command} if command.params else {}
    for each, one in inner.items():
        found |= within(f"{name} {each}", one)
    return found


def command_line() -> list[str]:
    """Return a line a flag or argument: `tune --trials`, `train FILE`."""
    lines = []
    for name, command in commands().items():
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                lines.append(f"{name} {parameter.metavar}")
            else:
                lines += [f"{name} {flag}" for flag in (*parameter.opts, *parameter.secondary_opts)]
    return sorted(lines)


def test_the_command_line_is_as_it_was_agreed():
    assert command_line() == FROZEN.read_text(encoding="utf-8").splitlines(), (
        f"names of commands or flags changed; if that is meant, write them into {FROZEN.name}"
    )


@pytest.mark.parametrize("name", commands())
def test_every_command_teaches(name):
    command = commands()[name]
    assert f"\b\nautosft {name}" in inspect.cleandoc(command.help), "no example"
    assert all(getattr(parameter, "help", None) for parameter in command.params), "a flag without help"
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert "--quiet" in flags
    assert "--json" in flags or name in ("dashboard", "serve")


def test_every_field_of_a_request_and_every_setting_has_a_flag():
    flags = {flag for parameter in commands()["tune"].params for flag in parameter.opts}
    names = [name for name in (*TuneRequest.model_fields, *searched_names()) if name != "space"]
    assert {f"--{name.replace('_', '-')}" for name in names} <= flags


def test_flags_become_a_request():
    given = {
        "trials": 6,
        "learning_rate": "1e-5..1e-3 log",
        "lora_rank": "8, 16",
        "time_budget": "1h30m",
        "prune": False,
        "method": "lora",
        "model": None,
    }
    request = read_request(as_request_fields(given), None)
    assert (request.trials, request.time_budget, request.prune, request.method) == (6, 5400.0, False, "lora")
    assert request.model_fields_set == {"trials", "time_budget", "prune", "method", "space"}
    assert str(request.dimensions()["learning_rate"]) == "1e-05..0.001 log"
    assert str(request.dimensions()["lora_rank"]) == "8, 16"


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("trials: 24\nlearning_rate: 3e-4\nweight_decay: 0.1\n")
    request = read_request(as_request_fields({"trials": 6, "learning_rate": "1e-4"}), file)
    assert request.trials == 6
    assert {name: str(one) for name, one in request.dimensions().items()} == {
        "learning_rate": "0.0001",
        "weight_decay": "0.1",
    }
