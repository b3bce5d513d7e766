"""Presets: published strategies, used as the first trials of a study.

They are data (`presets.yaml`).  A preset consists of request fields, which flags and files override, and of
named strategies, which are moved into the search space if the user changes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from autosft.profiles.errors import UserError
from autosft.studies.search.dimensions import Fixed, Value
from autosft.studies.search.parsing import parse_dimension
from autosft.studies.search.space import SearchSpace


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """One configuration of a preset; settings that it omits take the value where the search starts."""

    name: str
    summary: str
    parameters: Mapping[str, Value]
    epochs: float | None = None  # None: the preset's


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """The meaning of `--preset NAME`."""

    name: str
    summary: str
    source: str
    request: Mapping[str, Any]  # fields of a request and searched settings, as in a --config file
    strategies: tuple[Strategy, ...]

    def origin(self, strategy: Strategy) -> str:
        """Return the origin of a strategy's trial."""
        return f"{self.name} {strategy.name}"

    def epochs_of(self, strategy: Strategy, asked: float) -> float:
        """Return a strategy's epochs; `asked`, those of the request, win unless they came from the preset."""
        return strategy.epochs if strategy.epochs and asked == self.request.get("epochs") else asked


@cache
def presets() -> Mapping[str, Preset]:
    """Return all presets by name."""
    content = yaml.safe_load(files(__package__).joinpath("presets.yaml").read_text(encoding="utf-8"))
    return {name: _preset(name, fields) for name, fields in content.items()}


def preset(name: str) -> Preset:
    """Return a preset.  Raises UserError for an unknown name."""
    if name not in presets():
        raise UserError(f"--preset {name}: not a preset.", remedy=f"Known: {', '.join(presets())}.")
    return presets()[name]


def place(strategy: Strategy, space: SearchSpace) -> tuple[dict[str, Value], tuple[str, ...]]:
    """Return a strategy's values for the searched settings, and a description of each value that was moved.

    A setting that the user fixed keeps the user's value; a value outside the user's range moves to the
    nearest value in it.
    """
    parameters: dict[str, Value] = {}
    moved = []
    for name, value in strategy.parameters.items():
        dimension = space[name]
        here = dimension.nearest(value)  # type: ignore[arg-type]  # a value of the dimension's type
        if not isinstance(dimension, Fixed):
            parameters[name] = here
        if value not in dimension:
            moved.append(f"{name} {here} instead of {value}")
    return parameters, tuple(moved)


def _preset(name: str, fields: Mapping[str, Any]) -> Preset:
    return Preset(
        name=name,
        summary=fields["summary"],
        source=fields["source"],
        request=fields["request"],
        strategies=tuple(_strategy(each, values) for each, values in fields["strategies"].items()),
    )


def _strategy(name: str, fields: Mapping[str, Any]) -> Strategy:
    values = {key: value for key, value in fields.items() if key not in ("summary", "epochs")}
    parameters = {key: parse_dimension(key, value).start() for key, value in values.items()}
    return Strategy(name=name, summary=fields["summary"], parameters=parameters, epochs=fields.get("epochs"))
