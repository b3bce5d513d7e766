"""The seam between deciding and acting: what the tuning loop needs of whatever runs trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from autosft.studies.trial import StopReason, TrialEvent, TrialJob


class TrialRunner(Protocol):
    """Runs attempts somewhere and reports what happens to them.

    Contract, held by one conformance suite over every implementation:
    - Every attempt given to `run` ends with exactly one `AttemptEnd`, whatever dies; no event of the
      attempt follows it.  Once it is delivered, no process of the attempt lives and its device memory
      is free.
    - Events of one attempt come in order.  Events of different attempts interleave freely.
    - `stop` asks an attempt to end soon (after its current step) and may be called for one that is over;
      an attempt that ends of itself before it hears of it reports its own end.
    - With SHUTDOWN or PAUSED an attempt saves a checkpoint with resume state first when its job asks for one.
    """

    def run(self, job: TrialJob) -> None:
        """Start an attempt; returns at once."""
        ...

    def prepare(self, job: TrialJob) -> None:
        """Get ready for an attempt like `job` where its devices are, beside what runs there; only a hint."""
        ...

    def events(self, timeout_s: float) -> Sequence[TrialEvent]:
        """Return what has happened, waiting up to `timeout_s` for something to happen."""
        ...

    def stop(self, trial: int, attempt: int, reason: StopReason) -> None:
        """Ask an attempt to end."""
        ...

    def now(self) -> float:
        """Return the runner's clock in UNIX seconds; virtual in tests."""
        ...

    def close(self, *, grace_s: float) -> None:
        """End everything: attempts still running are killed after `grace_s`; nothing is left behind."""
        ...
