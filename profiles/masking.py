"""Keep passwords and tokens in URLs out of output, logs and records.

A database's URL may contain a password, a webhook's has its secret in the path.  They must not be visible on
screens, in logs or in lists of processes.
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
    """Return the text with passwords in URLs replaced."""
    return _QUERY.sub(rf"\1{MASK}", _PASSWORD.sub(rf"\1:{MASK}@", text))


def has_password(text: str) -> bool:
    """Return whether a text contains a URL with a password."""
    return masked(text) != text


def masked_webhook(url: str) -> str:
    """Return only scheme and host of a webhook's URL: its path is its secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}/{MASK}" if parts.hostname else MASK


def masked_command(arguments: Sequence[str]) -> str:
    """Return a command line for display, without passwords and webhooks."""
    shown = []
    for before, argument in zip(("", *arguments), arguments, strict=False):
        name, equals, value = argument.partition("=")
        if before == "--notify" and "://" in argument:
            argument = masked_webhook(argument)  # noqa: PLW2901
        elif name == "--notify" and equals and "://" in value:
            argument = f"{name}={masked_webhook(value)}"  # noqa: PLW2901
        shown.append(masked(argument))
    return shlex.join(shown)


#: Never sent through a proxy: these services, and their tokens, belong to this machine.
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def keep_loopback_direct() -> None:
    """Keep libraries of this process and its children from using a proxy for requests to this machine."""
    names = {name.lower() for name in os.environ}
    if not names & {"http_proxy", "https_proxy", "all_proxy", "grpc_proxy"}:
        return
    for variable in ("no_proxy", "NO_PROXY"):
        known = os.environ.get(variable) or os.environ.get(variable.swapcase(), "")
        present = [host.strip() for host in known.split(",") if host.strip()]
        os.environ[variable] = ",".join(dict.fromkeys([*present, *LOOPBACK]))
