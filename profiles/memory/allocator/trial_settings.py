"""What the allocator of a trial is told: `workers` tells it, the memory model replays it."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping

from autosft.profiles.memory.allocator.caching_allocator import ALLOCATOR_VARIABLES, AllocatorOptions

#: Segments that grow instead of being replaced: what one of them has lost to fragments another need not hold.
SETTINGS = "expandable_segments:True"


def can_expand() -> bool:
    """Whether this system maps memory page by page: Windows and WSL cannot."""
    return sys.platform == "linux" and "microsoft" not in os.uname().release.lower()


def is_chosen(environment: Mapping[str, str]) -> bool:
    """Whether the user has chosen the allocator's settings, which are then left alone."""
    return any(name in environment for name in ALLOCATOR_VARIABLES)


def options_of_trials(environment: Mapping[str, str]) -> AllocatorOptions:
    """Return what the allocator of a trial of that environment does.

    Raises UserError for settings that change the answer in ways that are not simulated.
    """
    options = AllocatorOptions.from_environment(environment)
    if is_chosen(environment) or not can_expand():
        return options
    return dataclasses.replace(options, expandable_segments=True)
