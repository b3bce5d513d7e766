"""PostgreSQL that is started again after it was killed, on a machine that may be busy."""

from __future__ import annotations

import subprocess
import time
from typing import Any

LIMIT_S = 120.0


def start_again(server: Any) -> None:
    """Start a server of the pgserver wheel, however long it recovers: the wheel gives up after 10 s."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            server.ensure_postgres_running()
            return
        except subprocess.TimeoutExpired:
            if time.monotonic() >= deadline:
                raise
