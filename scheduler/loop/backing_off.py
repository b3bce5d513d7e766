"""Waits before trying again what the surroundings have kept from going on.  Writes `Loop.backoff`.

A full or read-only disk, a folder that is gone, a limit of processes: the next attempt would fail as fast as
the last one, and so would every other trial's.  The study waits, longer each time, and ends with the cause
where it stays; trials wait for the next run.
"""

from __future__ import annotations

from autosft.profiles.errors import StudyFailedError
from autosft.profiles.units import duration
from autosft.scheduler.loop.state import Loop, Pause
from autosft.scheduler.loop.waiting import notify_waiting
from autosft.studies.trial import AttemptEnd

#: How long the study waits after the first, second, ... failure in a row; after one more it ends.
WAITS_S = (5.0, 20.0, 60.0)
#: How long a trial waits whose worker was lost the second, third, ... time in a row.
LOST_WAITS_S = (0.0, 2.0, 8.0)


def back_off(loop: Loop, end: AttemptEnd) -> None:
    """After a failure of the surroundings, wait before anything is started.

    Raises StudyFailedError where they have failed too often in a row.  Attempts that ran side by side fail
    for the same cause: they count once.
    """
    state, now = loop.backoff, loop.runner.now()
    if state.pause.has(now):
        return
    if state.num_in_a_row >= len(WAITS_S):
        raise StudyFailedError(
            f"{end.message}. It was tried {state.num_in_a_row + 1} times in "
            f"{duration(now - state.since)}. Nothing that was recorded is lost, and trial {end.trial} "
            "waits: mend this, then run the same command again."
        )
    if state.num_in_a_row == 0:
        state.since = now
    state.pause = Pause(now, now + WAITS_S[state.num_in_a_row])
    state.num_in_a_row += 1
    state.cause = end.message


def delay_lost(loop: Loop, trial: int, *, num_lost: int) -> None:
    """Have a trial whose worker was lost again wait a little; others may start meanwhile."""
    wait_s = LOST_WAITS_S[min(num_lost, len(LOST_WAITS_S)) - 1]
    now = loop.runner.now()
    loop.backoff.trials[trial] = Pause(now, now + wait_s)


def went_well(loop: Loop) -> None:
    """An attempt has reached an evaluation or its end: the surroundings are in order."""
    loop.backoff.num_in_a_row = 0


def is_backing_off(loop: Loop) -> bool:
    """Whether nothing may start now for the surroundings' sake; says so."""
    state, now = loop.backoff, loop.runner.now()
    if not state.pause.has(now):
        return False
    wait_s = state.pause.end - now
    if state.told != state.pause:
        state.told = state.pause
        notify_waiting(loop, f"Waiting {wait_s:.0f} s: {state.cause}.", at_once=True)
    loop.idle.exclude()
    return True


def is_delayed(loop: Loop, trial: int) -> bool:
    """Whether a trial may not start yet, since its worker was lost just now."""
    return loop.backoff.trials.get(trial, Pause()).has(loop.runner.now())
