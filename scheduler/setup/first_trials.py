"""The trials of a study that come before the sampler's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autosft.scheduler.setup.design import Design
from autosft.studies.search.space import complete, default_parameters, neighbours
from autosft.studies.trial import DEFAULT_ORIGIN
from autosft.studies.warm_start import WarmStart


def first_trials(design: Design, earlier: WarmStart) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (parameters, origin) of the trials before the sampler's: the rule-based default, its neighbours.

    In between come those of earlier studies.  Strategies of a preset come before the default and replace its
    neighbours; a strategy equal to the default has the origin of the default, against which the gain is
    measured.
    """
    space, fixed = design.basis.space, design.basis.fixed
    defaults = default_parameters(space)
    for parameters, origin in design.strategies:
        is_default = complete(space, parameters) == defaults and fixed.of(origin) == fixed
        yield dict(parameters), DEFAULT_ORIGIN if is_default else origin
    yield dict(defaults), DEFAULT_ORIGIN
    for parameters in earlier.trials:
        yield dict(parameters), "warm start"
    if design.strategies:
        return
    for parameters in neighbours(space, defaults):
        yield parameters, "neighbour"
