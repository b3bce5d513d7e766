"""The interface through which the tuning loop runs trials: the seam between deciding and acting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from autosft.studies.trial import StopReason, TrialEvent, TrialJob


class TrialRunner(Protocol):
    """Runs attempts and reports their events.

    Contract, enforced by one conformance suite for all implementations:
    - Every attempt given to `run` ends with exactly one `AttemptEnd`, whatever dies; no event of the
      attempt follows it.  Once it is delivered, no process of the attempt lives and its device memory
      is free.
    - Events of one attempt come in order.  Events of different attempts interleave freely.
    - `stop` asks an attempt to end soon (after its current step) and may be called for one that is over;
      an attempt that ends by itself before the request arrives reports its own end.
    - With SHUTDOWN or PAUSED an attempt first saves a checkpoint with resume state, if its job asks for one.
    """

    def run(self, job: TrialJob) -> None:
        """Start an attempt; returns at once."""
        ...

    def prepare(self, job: TrialJob) -> None:
        """Prepare for an attempt like `job` on its node, while others run there; only a hint."""
        ...

    def events(self, timeout_s: float) -> Sequence[TrialEvent]:
        """Return new events, waiting up to `timeout_s` for the first."""
        ...

    def stop(self, trial: int, attempt: int, reason: StopReason) -> None:
        """Ask an attempt to end."""
        ...

    def now(self) -> float:
        """Return the runner's clock in UNIX seconds; virtual in tests."""
        ...

    def close(self, *, grace_s: float) -> None:
        """Shut down: attempts still running after `grace_s` are killed, and no process is left behind."""
        ...
