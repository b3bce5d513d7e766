"""Tells the user what a study is waiting for, without repeating itself."""

from __future__ import annotations

from autosft.scheduler.events import Waiting
from autosft.scheduler.loop.state import Loop

#: Minimum time between two notices, in seconds.
NOTICE_INTERVAL_S = 60.0


def notify_waiting(loop: Loop, message: str) -> None:
    """Report what the study is waiting for, at most once every NOTICE_INTERVAL_S."""
    now = loop.runner.now()
    if now - loop.notices.last_at >= NOTICE_INTERVAL_S:
        loop.observe(Waiting(message=message))
        loop.notices.last_at = now
