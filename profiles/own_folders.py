"""The user's data and cache folders, created private.

They contain studies, prepared training data and conversations with models.  An existing folder keeps its
mode: the user may have opened it to others.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import platformdirs


def data_folder() -> Path:
    """Return the user's data folder; create it with mode 0700 if it is missing and can be created."""
    return _private(Path(platformdirs.user_data_dir("autosft", appauthor=False)))


def cache_folder() -> Path:
    """Return the user's cache folder, created in the same way."""
    return _private(Path(platformdirs.user_cache_dir("autosft", appauthor=False)))


def _private(folder: Path) -> Path:
    with contextlib.suppress(OSError):  # reported by whoever writes there
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder
