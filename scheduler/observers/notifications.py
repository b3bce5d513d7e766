"""`--notify`: tells a webhook or a command about a new best, a failure and the end, without delaying it.

A separate thread sends notices.  If sending fails, that is reported once and the notice is dropped.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from autosft.profiles.errors import UserError
from autosft.profiles.masking import masked_webhook
from autosft.scheduler.events import NewBest, Note, Observer, StudyEvent, StudyOpened, TrialEnded
from autosft.studies.formatting import format_metric
from autosft.studies.trial import TrialState

SEND_TIMEOUT_S = 10.0
#: How long to wait for unsent notices at the end of a study, in seconds.
CLOSE_TIMEOUT_S = 10.0
#: Maximum number of queued notices: beyond it, the receiver is unreachable.
MAX_PENDING = 100

Send = Callable[["Notice"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A notice: a line for people, and its data for programs."""

    event: str  # "new best", "failure", "end"
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> str:
        # Slack and Mattermost show "text", Discord "content".
        return json.dumps({"event": self.event, "text": self.text, "content": self.text, **self.facts})


def sender(target: str) -> Send:
    """Return the function that sends a notice to `target`.

    A URL gets JSON by POST; a command gets the text as its last argument and the JSON on standard input.

    Raises UserError for a URL without a host, and for a command that does not exist.
    """
    if target.lower().startswith(("http://", "https://")):
        if not urlsplit(target).hostname:
            raise UserError(f"--notify {masked_webhook(target)}: the URL has no host.")
        return lambda notice: _post(target, notice)
    try:
        command = shlex.split(target)
    except ValueError as error:
        raise UserError(f"--notify {target}: {error}.") from error
    if not command or shutil.which(command[0]) is None:
        raise UserError(
            f"--notify {target}: there is no such command.",
            remedy="Give a command, such as 'notify-send autosft', or a URL that begins with https://.",
        )
    return lambda notice: _run(command, notice)


def _post(url: str, notice: Notice) -> None:
    request = urllib.request.Request(
        url,
        data=notice.as_json().encode(),
        headers={"Content-Type": "application/json", "User-Agent": "autosft"},
        method="POST",
    )
    with urllib.request.urlopen(request, timeout=SEND_TIMEOUT_S):  # nosec B310 - http(s), by `sender`
        pass


def _run(command: list[str], notice: Notice) -> None:
    subprocess.run(
        [*command, notice.text],
        input=notice.as_json(),
        text=True,
        check=True,
        timeout=SEND_TIMEOUT_S,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@contextmanager
def notifying(target: str | None, observe: Observer) -> Iterator[Observer]:
    """Forward events to `observe`, and send notices about some of them and about the end or an error.

    Yields `observe` itself without a target.  Raises UserError for an invalid target.
    """
    if target is None:
        yield observe
        return
    notifier = Notifier(sender(target), observe)
    try:
        yield notifier
    except BaseException as error:
        is_stop = isinstance(error, KeyboardInterrupt)
        notifier.end("was stopped" if is_stop else f"failed: {error}", failed=not is_stop)
        raise
    else:
        notifier.end("ended", failed=False)
    finally:
        notifier.close()


class Notifier:
    """An observer that sends notices in a separate thread and forwards every event."""

    def __init__(self, send: Send, observe: Observer, *, close_timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        self._send = send
        self._observe = observe
        self._close_timeout_s = close_timeout_s
        self._opened: StudyOpened | None = None
        self._best: NewBest | None = None
        self._num_finished = 0
        self._pending: list[Notice] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._has_complained = False
        self._trouble: str | None = None
        self._thread = threading.Thread(target=self._work, name="autosft-notify", daemon=True)
        self._thread.start()

    def __call__(self, event: StudyEvent) -> None:
        self._observe(event)
        if self._trouble is not None and not self._has_complained:
            self._has_complained = True
            self._observe(Note(message=f"--notify failed: {self._trouble}. The study continues."))
        match event:
            case StudyOpened():
                self._opened, self._num_finished = event, event.num_finished
            case NewBest():
                self._best = event
                self._add(
                    "new best",
                    f"{self._metric} {format_metric(event.value)}, trial {event.trial} at step {event.step}",
                    {"trial": event.trial, "value": event.value, "step": event.step},
                )
            case TrialEnded(record=record):
                self._num_finished += record.state.is_finished
                if record.state is TrialState.FAILED:
                    why = record.message or (record.failure.value if record.failure else "unknown")
                    self._add("failure", f"trial {record.number} failed: {why}", {"trial": record.number})
            case _:
                pass

    def end(self, text: str, *, failed: bool) -> None:
        """Send the last notice."""
        facts: dict[str, Any] = {}
        if self._opened is not None:
            text += f", {self._num_finished} of {self._opened.num_trials} trials"
        if (best := self._best) is not None:
            text += f", best {self._metric} {format_metric(best.value)} (trial {best.trial})"
            facts = {"trial": best.trial, "value": best.value, "step": best.step}
        self._add("failure" if failed else "end", text, facts)

    def close(self) -> None:
        """Wait briefly for unsent notices; may be called repeatedly."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(self._close_timeout_s)

    @property
    def _metric(self) -> str:
        return self._opened.metric if self._opened else "value"

    def _add(self, event: str, text: str, facts: Mapping[str, Any]) -> None:
        study = self._opened.study if self._opened else "study"
        notice = Notice(event=event, text=f"autosft {study}: {text}", facts={"study": study, **facts})
        with self._changed:
            # Of several queued bests, only the last is news.
            self._pending = [item for item in self._pending if event != "new best" or item.event != event]
            if len(self._pending) < MAX_PENDING:
                self._pending.append(notice)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._is_closed)
                if not self._pending:
                    return
                notice = self._pending.pop(0)
            try:
                self._send(notice)
            except urllib.error.HTTPError as error:
                self._trouble = f"the server answers {error.code} {error.reason}"
            except Exception as error:  # an error of the receiver must not affect the study
                self._trouble = f"{type(error).__name__}: {error}"
