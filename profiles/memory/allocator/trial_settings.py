"""The allocator settings of trials, which `workers` sets and the memory model simulates."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping

from autosft.profiles.memory.allocator.options import ALLOCATOR_VARIABLES, AllocatorOptions

#: Segments that grow instead of being replaced, which avoids most fragmentation.
SETTINGS = "expandable_segments:True"


def can_expand() -> bool:
    """Return whether this system supports expandable segments: Windows and WSL do not."""
    return sys.platform == "linux" and "microsoft" not in os.uname().release.lower()


def is_chosen(environment: Mapping[str, str]) -> bool:
    """Return whether the user has chosen allocator settings, which are then not changed."""
    return any(name in environment for name in ALLOCATOR_VARIABLES)


def options_of_trials(environment: Mapping[str, str]) -> AllocatorOptions:
    """Return the allocator settings of a trial with this environment.

    Raises UserError for settings that affect memory but are not simulated.
    """
    options = AllocatorOptions.from_environment(environment)
    if is_chosen(environment) or not can_expand():
        return options
    return dataclasses.replace(options, expandable_segments=True)
