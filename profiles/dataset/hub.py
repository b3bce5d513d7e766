"""The Hugging Face hub: what names it could know, and whether it answers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_TIMEOUT_S = 5.0


def looks_like_path(name: str) -> bool:
    """Tell a path from the name of a repository of the hub, "owner/name" or "name"."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


@cache
def hub_answers() -> bool:
    """Tell whether the hub can be reached from here.

    The hub's clients try again for half a minute before they say so, with a warning each time; without
    the hub only what is already on disk can be loaded, and they are told so.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_S)
    except Exception:  # the HTTP library's own errors: the hub does not answer, whatever the cause
        return False
    return True
