"""What happens to the trials of running studies, seen in the database."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from autosft.service.values import Item

#: Studies that are looked at in one go; others have their turn later.
MAX_STUDIES = 200

#: Trials of studies by name: number -> (state, value).
States = Mapping[str, Mapping[int, tuple[str, float | None]]]


class TrialWatch:
    """Compares the trials of running studies with what they were at the last look."""

    def __init__(self, read: Callable[[Collection[str]], States]) -> None:
        self._read = read
        self._known: dict[str, Mapping[int, tuple[str, float | None]]] = {}
        self._turn = 0

    def look(self, placed: Collection[Item]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield what has changed: whose item it is, and the trial's new state.

        What a study already has when it is first seen is no event.
        """
        studies = {item.name: item for item in placed if item.arguments.command == "tune"}
        names = sorted(studies)
        chosen = names if len(names) <= MAX_STUDIES else self._next(names)
        found = self._read(chosen) if chosen else {}
        for name in chosen:
            trials, item = found.get(name, {}), studies[name]
            for number, (state, value) in trials.items():
                if name in self._known and self._known[name].get(number) != (state, value):
                    yield (
                        item.owner,
                        {
                            "item": item.id,
                            "study": name,
                            "trial": number,
                            "state": state,
                            "value": value if value is not None and math.isfinite(value) else None,
                        },
                    )
            self._known[name] = trials
        self._known = {name: trials for name, trials in self._known.items() if name in studies}

    def _next(self, names: list[str]) -> list[str]:
        begin = self._turn % len(names)
        self._turn = begin + MAX_STUDIES
        return [*names, *names][begin : begin + MAX_STUDIES]
