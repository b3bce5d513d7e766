"""The scheduler's process as the one that answers requests has it: started, listened to, started again.

The picture that it sends is kept here, so that reading it costs no look anywhere.  A process that dies alone
is replaced: the next one takes the queue over, as a new server would, and what runs goes on meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle  # nosec B403
import subprocess  # nosec B404
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import IO, Any

from autosft.profiles.errors import UserError
from autosft.service.board import Board, applied
from autosft.service.loop_messages import Command, Message, Pictured, Refused, TrialTold
from autosft.service.store.server_lease import ServedElsewhereError

logger = logging.getLogger(__name__)

#: How old a look at the queue may be for the server to be ready.
ALIVE_S = 120.0
#: The scheduler is told of changes this often at most; it looks by itself each second.
WAKE_S = 0.1
#: How long the process has to end, and the pauses before it is started again after having died.
END_S, FIRST_PAUSE_S, LONGEST_PAUSE_S = 60.0, 0.5, 60.0


class SchedulerDiedError(Exception):
    """The scheduler's process ended before it had begun."""


class LoopChild:
    """Starts the scheduler's process and keeps it running; `begin`, then `end`.

    `command` starts it, and `settings` is what it reads first.  What it tells is handed on by one thread.
    """

    def __init__(
        self,
        command: Sequence[str],
        settings: Any,
        *,
        clock: Callable[[], float],
        publish: Callable[[Board], None] = lambda _: None,
        tell_trial: Callable[[str, Any], None] = lambda _, __: None,
    ) -> None:
        self._command, self._settings, self._clock = tuple(command), settings, clock
        self._publish, self._tell_trial = publish, tell_trial
        self._board = self._received = Board()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._follow, name="scheduler", daemon=True)
        self._is_ending = threading.Event()
        self._is_up = self._is_draining = False
        self._woken_at = float("-inf")
        self.num_restarts = 0
        self.replaced = threading.Event()  # another server has taken over

    @property
    def pid(self) -> int | None:
        """The process that looks at the queue now, None while there is none."""
        return self._process.pid if self._process is not None and self._is_up else None

    # What requests ask

    def board(self) -> Board:
        return self._board

    def wake(self) -> None:
        """Have it look at the queue soon."""
        now = self._clock()
        if now - self._woken_at >= WAKE_S:
            self._woken_at = now
            self._say(Command.WAKE)

    def is_alive(self) -> bool:
        """Whether there is a process, and it has looked at the queue lately."""
        return self._is_up and self._clock() - self._received.looked_at < ALIVE_S

    # Its life

    def begin(self) -> None:
        """Start it, and return once it is the queue's server.

        Raises what keeps it from serving: ServedElsewhereError, another UserError, or SchedulerDiedError.
        """
        self._start()
        self._thread.start()

    def drain(self) -> None:
        """Have nothing more started."""
        self._is_draining = True
        self._show(self._received)
        self._say(Command.DRAIN)

    def end(self, *, checkpoint: bool) -> None:
        """Have it stop; what runs goes on, or with `checkpoint` saves one and ends."""
        self._is_ending.set()
        process = self._process
        if process is None:
            return
        if not self._say(Command.CHECKPOINT if checkpoint else Command.KEEP):
            process.kill()
        try:
            process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            logger.warning("The scheduler's process did not end within %.0f s; it is killed.", END_S)
            process.kill()
            process.wait()
        if self._thread.is_alive():
            self._thread.join(timeout=END_S)

    def _start(self) -> None:
        """Start a process, and hear its first message; `_process` runs then."""
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl+C is the server's
        )
        self._process, self._received = process, Board()
        assert process.stdin is not None
        try:
            pickle.dump(self._settings, process.stdin)
            process.stdin.flush()
            first = _read(process)
        except OSError:
            first = None
        if isinstance(first, Pictured):
            # A wake is not worth waiting for: a full pipe is full of them.
            os.set_blocking(process.stdin.fileno(), False)
            self._is_up = True
            self._take(first)
            return
        process.kill()
        code = _reaped(process)
        if isinstance(first, Refused):
            raise first.error
        raise SchedulerDiedError(f"It ended with code {code}; the server's log says why.")

    def _follow(self) -> None:
        """Take what it tells, and start it again when it has died."""
        pause_s = FIRST_PAUSE_S
        while True:
            assert self._process is not None
            while (message := _read(self._process)) is not None:
                pause_s = FIRST_PAUSE_S
                self._take(message)
            self._is_up = False
            code = _reaped(self._process)
            while not (self._is_ending.is_set() or self.replaced.is_set()):
                logger.error(
                    "The scheduler's process ended with code %s; it is started again in %.1f s.",
                    code,
                    pause_s,
                )
                if self._is_ending.wait(pause_s):
                    break
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                self.num_restarts += 1
                if self._restarted():
                    break
            if not self._is_up:
                return

    def _restarted(self) -> bool:
        try:
            self._start()
        except ServedElsewhereError as error:
            logger.error("%s", error)
            self.replaced.set()
        except (UserError, SchedulerDiedError, OSError) as error:
            logger.error("The scheduler's process could not be started: %s", error)
        if self._is_up and self._is_draining:
            self._say(Command.DRAIN)
        if self._is_up and self._is_ending.is_set() and self._process is not None:
            self._process.kill()  # `end` has spoken to the one before
        return self._is_up

    def _take(self, message: Message) -> None:
        match message:
            case Pictured(change=change):
                self._received = applied(self._received, change)
                self._show(self._received)
            case TrialTold(owner=owner, data=data):
                self._tell_trial(owner, data)
            case Refused(error=error):
                logger.error("%s", error)
                self.replaced.set()

    def _show(self, board: Board) -> None:
        if self._is_draining and not board.is_draining:
            board = replace(board, is_draining=True)
        self._board = board
        self._publish(board)

    def _say(self, command: Command) -> bool:
        """Tell it something; return whether that has arrived."""
        if self._process is None or not self._is_up:
            return False
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            return os.write(self._process.stdin.fileno(), f"{command.value}\n".encode("ascii")) > 0
        return False


def _reaped(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a process, and return its exit code."""
    code = process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with contextlib.suppress(OSError):
            stream.close()
    return code


def _read(process: subprocess.Popen[bytes]) -> Message | None:
    """Return the next message, None at the end of the process."""
    stream: IO[bytes] | None = process.stdout
    assert stream is not None
    try:
        message: Message = pickle.load(stream)  # nosec B301 - from our own process
    except (EOFError, OSError, pickle.UnpicklingError):
        return None
    return message
