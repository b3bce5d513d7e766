"""Ray's processes talk to each other over IPv4, and on this machine alone."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

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


#: With it off, Ray takes 127.0.0.1 for this machine's address, as it always does on macOS and Windows, and
#: what has that address listens nowhere else.  It would replace `_node_ip_address="127.0.0.1"` by a reachable
#: one (2.60).  The environment is for what Ray starts, such as the jobs of its dashboard.
BINDING = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def is_loopback_address(host: str) -> bool:
    """Whether an address, or `localhost`, is reached from this machine alone."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1
    return (mapped or address).is_loopback


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Have `ray.init` in the block listen on loopback alone, and leave loopback addresses as they are given.

    The same as BINDING, for a process that may have imported Ray already.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def bound_elsewhere(address_info: dict[str, Any]) -> UserError | None:
    """Return the error for a node, started in `on_loopback`, that has an address which others can reach."""
    import ray

    if is_loopback_address(address := str(address_info["node_ip_address"])):
        return None
    return UserError(
        f"Ray {ray.__version__} listens on {address}, where others can reach it, instead of {ADDRESS}.",
        remedy="Install the tested version: pip install -c constraints.txt 'ray[default]'",
    )
