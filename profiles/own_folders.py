"""The user's folders for data and for what can be made again: made for nobody else to look into.

Studies, prepared training data and conversations with models lie there.  A folder that is there already keeps
its mode: the user may have opened it to others.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import platformdirs


def data_folder() -> Path:
    """Return the user's data folder, made with mode 0700 if it is missing and can be made."""
    return _private(Path(platformdirs.user_data_dir("autosft", appauthor=False)))


def cache_folder() -> Path:
    """Return the user's cache folder, likewise."""
    return _private(Path(platformdirs.user_cache_dir("autosft", appauthor=False)))


def _private(folder: Path) -> Path:
    with contextlib.suppress(OSError):  # whoever writes there says so
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder
