"""Ranks on one machine meet over its loopback interface, where nobody else can connect."""

from __future__ import annotations

import os
import socket

import psutil

#: Where gloo and NCCL listen, and how each is told one interface; without "=", NCCL takes all that begin so.
#: Neither asks who connects.  gloo's default is the interface of the host's name, NCCL's any but loopback.
INTERFACE_VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}


def local_only() -> dict[str, str]:
    """Return the environment variables with which all ranks of this machine listen on loopback alone.

    Those that the user has set stay; empty on a machine without an IPv4 loopback.
    """
    names = sorted(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(item.family == socket.AF_INET and item.address == "127.0.0.1" for item in addresses)
    )
    if not names:
        return {}
    wanted = {variable: words.format(names[0]) for variable, words in INTERFACE_VARIABLES.items()}
    return {variable: value for variable, value in wanted.items() if variable not in os.environ}
