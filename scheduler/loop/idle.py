"""How long devices are idle between two trials while work is waiting."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class IdleMeter:
    """Time from the end of an attempt to the first training step of the next one in its place, in seconds.

    A GPU is one place: it is idle while no attempt is on it.  On a CPU, every attempt has a place of its own.

    Only gaps that end with another attempt are counted, so neither the start nor the end of a study.  Gaps
    that the user asked for (a pause) or that other programs cause are excluded.
    """

    gaps_s: list[float] = field(default_factory=list)
    _freed_at: dict[str, list[float]] = field(
        default_factory=dict
    )  # device -> when its free places were freed
    #: (trial, attempt) before its first step -> when the places that it took were freed.
    _ending: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def freed(self, uuids: Iterable[str], *, now: float) -> None:
        """Record that an attempt has left its place on each of these devices."""
        for uuid in uuids:
            self._freed_at.setdefault(uuid, []).append(now)

    def taken(self, attempt: tuple[int, int], uuids: Iterable[str]) -> None:
        """Record that an attempt was given these devices; they count as idle until its first step."""
        since = [self._freed_at[uuid].pop() for uuid in uuids if self._freed_at.get(uuid)]
        if since:
            self._ending[attempt] = since

    def stepped(self, attempt: tuple[int, int], *, first_step_at: float) -> None:
        """Record when an attempt began its first training step."""
        for since in self._ending.pop(attempt, ()):
            self.gaps_s.append(max(0.0, first_step_at - since))

    def abandoned(self, attempt: tuple[int, int]) -> None:
        """Forget an attempt that ended before its first step."""
        self._ending.pop(attempt, None)

    def exclude(self) -> None:
        """Leave out the time for which devices have been idle so far: no work is waiting, or none may run."""
        self._freed_at.clear()

    def median_s(self) -> float | None:
        return statistics.median(self.gaps_s) if self.gaps_s else None
