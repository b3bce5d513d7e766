"""Signal handling: Ctrl+C once or SIGTERM stops cleanly, Ctrl+C twice stops immediately."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

from autosft.commands.options import STOPPED
from autosft.workers.runner import TrialRunner

CLOSE_S = 3.0


class StopSwitch:
    """Turns signals into a stop request inside a `with` block.

    Before `guard` is called there is no work to save, and a signal raises KeyboardInterrupt.  Afterwards the
    first signal makes `requested` true, which the study's loop polls twice a second, and a second Ctrl+C
    ends every process immediately.  Handlers print nothing and wait for no lock, since Python may be in the
    middle of a write; `on_abort` must do the same.
    """

    def __init__(self, *, on_abort: Callable[[], None]) -> None:
        self._on_abort = on_abort
        self._runner: TrialRunner | None = None
        self._has_work = False
        self._num_signals = 0
        self._before: dict[signal.Signals, object] = {}
        self._hook_before = sys.unraisablehook

    def __enter__(self) -> Self:
        self._hook_before, sys.unraisablehook = sys.unraisablehook, self._hear_unraisable
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]
        sys.unraisablehook = self._hook_before

    def guard(self, runner: TrialRunner | None = None) -> None:
        """From now on there is work to save; a second Ctrl+C closes `runner`.

        Without a runner its processes have to end by themselves when this one does.
        """
        self._has_work = True
        self._runner = runner

    def requested(self) -> bool:
        return self._num_signals > 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT or self._num_signals == 0:
            self._num_signals += 1
        if self._num_signals > 1:
            self._stop_at_once()
        if not self._has_work:
            raise KeyboardInterrupt

    def _hear_unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Leave at once where our KeyboardInterrupt is lost, raised in a callback or a `__del__`.

        Raised in one of the import system's, it also leaves a lock behind that all later imports wait for.
        """
        if not self._has_work and self.requested() and unraisable.exc_type is KeyboardInterrupt:
            self._stop_at_once()
        self._hook_before(unraisable)

    def _stop_at_once(self) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)  # a third signal kills this process outright
        try:
            self._on_abort()
            if self._runner is not None:
                # In a thread, because the interrupted code may hold a lock that closing needs.  What is not
                # closed in time ends by itself once this process is gone.
                closing = threading.Thread(target=self._runner.close, kwargs={"grace_s": 0.0}, daemon=True)
                closing.start()
                closing.join(CLOSE_S)
        finally:
            os._exit(STOPPED)
