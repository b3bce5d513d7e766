"""Whether processes of this machine can talk to each other over IPv4, as Ray's do."""

from __future__ import annotations

import socket

from autosft.profiles.errors import UserError

ADDRESS = "127.0.0.1"
_TIMEOUT_S = 5.0


def require_loopback() -> None:
    """Raise UserError if this machine has no IPv4 loopback: Ray would wait for it for minutes."""
    try:
        with socket.create_server((ADDRESS, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"{ADDRESS} does not answer on this machine ({error.strerror or error}): Ray's processes talk to "
            "each other over it.",
            remedy="Bring the loopback interface up (ip link set lo up); a container needs one of its own.",
        ) from error
