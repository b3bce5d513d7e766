"""Predictions from a process that has imported everything once; what was answered is kept.

The server's process stays free of torch, and a submission does not wait: what is not known yet is asked for,
and answered later.  An answer is kept under everything that decided it: the question, the devices, and the
files that it names, by size and time.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import queue
import subprocess
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from autosft.profiles.errors import UserError

#: How long one question may take; a process that takes longer is replaced.
TIMEOUT_S = 900.0
#: Number of answers that are kept, and for how long: trials teach later predictions.
MAX_ANSWERS, KEPT_S = 10_000, 3600.0
#: Entries of a folder that decide an answer.
MAX_ENTRIES = 1000
#: First for those who wait in front of a screen.
FITS, ITEM = 0, 1


class PlannerFailedError(Exception):
    """The planner could not answer, by no fault of the question's."""


@dataclass(order=True)
class _Asked:
    urgency: int
    number: int
    question: Mapping[str, Any] = field(compare=False)
    key: str = field(compare=False)
    future: Future[Any] = field(compare=False)


class Planner:
    """A planner's process, started at the first question and again after its death."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path | None = None,
        decisive: Sequence[Path] = (),
        clock: Callable[[], float] = time.monotonic,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`command` starts the process; `decisive` are files that each answer rests on."""
        self._command, self._log, self._decisive = tuple(command), log, tuple(decisive)
        self._clock, self._timeout_s = clock, timeout_s
        self._asked: queue.PriorityQueue[_Asked] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._known: OrderedDict[str, tuple[float, Any]] = OrderedDict()
        self._under_way: dict[str, Future[Any]] = {}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._is_closed = False
        self.is_warm = threading.Event()
        self._thread = threading.Thread(target=self._work, name="planner", daemon=True)
        self._thread.start()

    def warm_up(self) -> None:
        """Start the process before it is needed."""
        self._asked.put(_Asked(FITS, next(self._numbers), {"kind": "warm"}, "", Future()))

    def ask(self, question: Mapping[str, Any], *, urgency: int = ITEM) -> Future[Any]:
        """Return the answer to come, at once where it is known.

        It raises UserError for a question that is wrong, and PlannerFailedError.
        """
        key = self._key(question)
        with self._lock:
            future: Future[Any]
            if (known := self._recall(key)) is not None:
                future = Future()
                future.set_result(known)
                return future
            if key in self._under_way:
                return self._under_way[key]
            if self._is_closed:
                raise PlannerFailedError("the planner is closed")
            future = self._under_way[key] = Future()
        self._asked.put(_Asked(urgency, next(self._numbers), question, key, future))
        return future

    @property
    def num_waiting(self) -> int:
        """Return how many questions have no answer yet."""
        return len(self._under_way)

    def close(self) -> None:
        """End the process; what is asked for stays unanswered."""
        self._is_closed = True
        process = self._process
        if process is not None:
            process.kill()
        self._asked.put(_Asked(-1, next(self._numbers), {"kind": "end"}, "", Future()))
        self._thread.join(timeout=10)

    def _key(self, question: Mapping[str, Any]) -> str:
        marks = [mark_of(path) for path in (*self._decisive, *sorted(set(_paths(question))))]
        return hashlib.sha256(json.dumps([question, marks], sort_keys=True).encode()).hexdigest()

    def _recall(self, key: str) -> Any | None:
        at, known = self._known.get(key, (0.0, None))
        if known is None:
            return None
        if self._clock() - at > KEPT_S:
            del self._known[key]
            return None
        self._known.move_to_end(key)
        return known

    def _work(self) -> None:
        while not self._is_closed:
            asked = self._asked.get()
            if asked.question["kind"] == "end" or self._is_closed:
                break
            answer, error = None, None
            try:
                answer = self._answer(asked.question)
            except Exception as raised:
                error = raised
            with self._lock:
                self._under_way.pop(asked.key, None)
                if answer is not None:
                    self._known[asked.key] = self._clock(), answer
                    while len(self._known) > MAX_ANSWERS:
                        self._known.popitem(last=False)
            if error is None:
                asked.future.set_result(answer)
            else:
                asked.future.set_exception(error)

    def _answer(self, question: Mapping[str, Any]) -> Any:
        """Put a question to the process; a second time to another one where the first has died over it."""
        for is_last in (False, True):
            try:
                process = self._started()
                if question["kind"] == "warm":
                    return None
                assert process.stdin is not None
                process.stdin.write(json.dumps({"id": 0, **question}) + "\n")
                process.stdin.flush()
                said = self._read(process)
                break
            except (OSError, ValueError, PlannerFailedError) as error:
                self._end()
                if is_last or self._is_closed:
                    raise PlannerFailedError(f"The planner has died over it: {error}") from error
        if "error" in said:
            raise UserError(said["error"])
        if "failure" in said:
            raise PlannerFailedError(said["failure"])
        return said["answer"]

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        with contextlib.ExitStack() as stack:
            errors: IO[bytes] | int = subprocess.DEVNULL
            if self._log is not None:
                errors = stack.enter_context(self._log.open("ab"))
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # Ctrl+C is the server's
            )
        self._read(self._process)  # that it is ready
        self.is_warm.set()
        return self._process

    def _read(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """Return the next line of the process; kill it if that takes too long."""
        alarm = threading.Timer(self._timeout_s, process.kill)
        alarm.daemon = True
        alarm.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
        finally:
            alarm.cancel()
        if not line:
            raise PlannerFailedError(f"it ended with code {process.wait()}")
        said = json.loads(line)
        assert isinstance(said, dict)
        return said

    def _end(self) -> None:
        self.is_warm.clear()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def mark_of(path: Path) -> list[Any]:
    """Return what changes when a file or folder does: times and sizes, of a folder those of its entries."""
    try:
        found = path.stat()
        marks: list[Any] = [str(path), found.st_mtime_ns, found.st_size]
        if path.is_dir():
            entries = itertools.islice(path.iterdir(), MAX_ENTRIES)
            marks += sorted([entry.name, entry.stat().st_mtime_ns, entry.stat().st_size] for entry in entries)
    except OSError:
        return [str(path)]
    return marks


def _paths(question: Any) -> Iterator[Path]:
    """Yield the absolute paths in a question, without the weights of data."""
    if isinstance(question, str):
        for part in question.split(","):
            if part.startswith("/"):
                yield Path(part.rpartition(":")[0] if part.rpartition(":")[2].isdigit() else part)
    elif isinstance(question, Mapping):
        for value in question.values():
            yield from _paths(value)
    elif isinstance(question, list | tuple):
        for value in question:
            yield from _paths(value)
