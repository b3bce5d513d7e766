"""Recognise names of the Hugging Face hub, and check whether it can be reached."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_TIMEOUT_S = 5.0


def looks_like_path(name: str) -> bool:
    """Return whether a name is a path, not a repository of the hub ("owner/name" or "name")."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


@cache
def hub_answers() -> bool:
    """Return whether the hub can be reached from here.

    The hub's clients retry for half a minute before they fail, with a warning each time; without the hub,
    they are set to offline mode and load only what is on disk.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_S)
    except Exception:  # the HTTP library's own errors: the hub does not answer, whatever the cause
        return False
    return True
