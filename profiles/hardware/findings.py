"""The findings of `autosft doctor`: a line each, with a level and a remedy."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.Enum):
    """How much a finding matters."""

    OK = "ok"  #: as it should be
    NOTE = "note"  #: worth knowing
    WARNING = "warning"  #: slower or tighter than it could be
    PROBLEM = "problem"  #: trials will fail, or not use the GPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of `autosft doctor`."""

    topic: str
    level: Level
    message: str
    remedy: str = ""
