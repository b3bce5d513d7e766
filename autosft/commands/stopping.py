"""Ctrl+C once stops cleanly, twice at once; SIGTERM stops cleanly."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

from autosft.commands.options import STOPPED
from autosft.workers.runner import TrialRunner

CLOSE_S = 3.0


class StopSwitch:
    """Turns signals into a wish to stop, inside a `with` block.

    Until `guard` has been told what runs, there is nothing to keep, and a signal is a KeyboardInterrupt.
    From then on the first one makes `requested` true, which the study's loop asks for twice a second, and a
    second Ctrl+C ends every process at once.  Handlers write nothing and wait for no lock, since Python may
    be in the middle of writing; `on_abort` has to keep to that too.
    """

    def __init__(self, *, on_abort: Callable[[], None]) -> None:
        self._on_abort = on_abort
        self._runner: TrialRunner | None = None
        self._has_work = False
        self._num_signals = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]

    def guard(self, runner: TrialRunner | None = None) -> None:
        """From here on there is work to keep; `runner` is closed by a second Ctrl+C.

        Without one its processes have to end with this one by themselves.
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

    def _stop_at_once(self) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)  # a third one does not wait for anything
        try:
            self._on_abort()
            if self._runner is not None:
                # In a thread: what was interrupted here may hold a lock that closing needs.  What it cannot
                # end in time ends by itself, once this process is gone.
                closing = threading.Thread(target=self._runner.close, kwargs={"grace_s": 0.0}, daemon=True)
                closing.start()
                closing.join(CLOSE_S)
        finally:
            os._exit(STOPPED)
