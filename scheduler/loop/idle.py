"""How long devices stand idle between two trials while work waits."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class IdleMeter:
    """Seconds from the end of an attempt to the first training step of the next one in its place.

    A GPU is one place: it is idle when nobody is on it.  On a CPU every trial has a place of its own.

    Counted are the gaps that a further trial ended, so neither the start nor the end of a study; what the
    user asked for (a pause) and what other programs cause is excused.
    """

    gaps_s: list[float] = field(default_factory=list)
    _freed_at: dict[str, list[float]] = field(default_factory=dict)  # places that nobody has
    _ending: dict[tuple[int, int], list[float]] = field(
        default_factory=dict
    )  # attempts before their first step

    def freed(self, uuids: Iterable[str], *, now: float) -> None:
        """Take note that a place on each of these devices was left."""
        for uuid in uuids:
            self._freed_at.setdefault(uuid, []).append(now)

    def taken(self, attempt: tuple[int, int], uuids: Iterable[str]) -> None:
        """Take note that an attempt was given these devices; they idle on until its first step."""
        since = [self._freed_at[uuid].pop() for uuid in uuids if self._freed_at.get(uuid)]
        if since:
            self._ending[attempt] = since

    def stepped(self, attempt: tuple[int, int], *, first_step_at: float) -> None:
        """Take note of when an attempt has begun its first training step."""
        for since in self._ending.pop(attempt, ()):
            self.gaps_s.append(max(0.0, first_step_at - since))

    def gave_up(self, attempt: tuple[int, int]) -> None:
        """Forget an attempt that ended before its first step; what came before was idle all the same."""
        self._ending.pop(attempt, None)

    def excuse(self) -> None:
        """Leave out the time that devices have been standing idle, since no work waits or may run."""
        self._freed_at.clear()

    def median_s(self) -> float | None:
        return statistics.median(self.gaps_s) if self.gaps_s else None
