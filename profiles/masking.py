"""Keeps passwords and tokens of URLs out of what is shown, logged and kept.

A database's URL may have a password in it, a webhook's has its secret in the path.  Whoever looks over a
shoulder, reads a log or lists processes must not learn them.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from urllib.parse import urlsplit

MASK = "***"

_PASSWORD = re.compile(r"(?<=//)([^\s/@:'\"]*):([^\s/@]*(?:@[^\s/@]*)*)@")
_QUERY = re.compile(
    r"([?&](?:password|passwd|pwd|token|secret|key|api_key|apikey|sig|signature|sslpassword)=)[^&\s'\"]+",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """Return text with the passwords of the URLs in it replaced; anything else stays as it is."""
    return _QUERY.sub(rf"\1{MASK}", _PASSWORD.sub(rf"\1:{MASK}@", text))


def has_password(text: str) -> bool:
    """Whether there is a URL with a password in a text."""
    return masked(text) != text


def masked_webhook(url: str) -> str:
    """Return only scheme and host of a webhook's URL: its path is its secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}/{MASK}" if parts.hostname else MASK


def masked_command(arguments: Sequence[str]) -> str:
    """Return a command line for people, without the passwords and webhooks in it."""
    shown = []
    for before, argument in zip(("", *arguments), arguments, strict=False):
        name, equals, value = argument.partition("=")
        if before == "--notify" and "://" in argument:
            argument = masked_webhook(argument)  # noqa: PLW2901
        elif name == "--notify" and equals and "://" in value:
            argument = f"{name}={masked_webhook(value)}"  # noqa: PLW2901
        shown.append(masked(argument))
    return shlex.join(shown)


#: Never sent through a proxy: what listens there belongs to this machine, and so do its tokens.
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def keep_loopback_direct() -> None:
    """Have no library of this process or its children send requests to this machine through a proxy."""
    names = {name.lower() for name in os.environ}
    if not names & {"http_proxy", "https_proxy", "all_proxy", "grpc_proxy"}:
        return
    for variable in ("no_proxy", "NO_PROXY"):
        known = os.environ.get(variable) or os.environ.get(variable.swapcase(), "")
        present = [host.strip() for host in known.split(",") if host.strip()]
        os.environ[variable] = ",".join(dict.fromkeys([*present, *LOOPBACK]))
