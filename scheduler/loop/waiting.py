"""Tells the user what a study is waiting for, without repeating itself."""

from __future__ import annotations

from autosft.scheduler.events import Waiting
from autosft.scheduler.loop.state import Loop

#: Minimum time between two notices, in seconds.
NOTICE_INTERVAL_S = 60.0


def notify_waiting(loop: Loop, message: str, *, at_once: bool = False) -> None:
    """Report what the study is waiting for, unless `at_once` at most once every NOTICE_INTERVAL_S."""
    now = loop.runner.now()
    if at_once or now - loop.notices.last_at >= NOTICE_INTERVAL_S:
        loop.observe(Waiting(message=message))
        loop.notices.last_at = now
