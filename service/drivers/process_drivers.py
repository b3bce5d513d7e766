"""Drivers as processes of this machine.

Each is a session of its own, below a shell of a few lines that writes its exit code to a file, so that a
server that was started later learns how it ended.  Its log and that file are in the item's folder.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess  # nosec B404
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from autosft.service.decide.outcomes import Ended
from autosft.service.drivers import launch
from autosft.service.drivers.command import DriverCommand, inherited
from autosft.service.drivers.protocol import Life, Progress
from autosft.service.values import Device, Item
from autosft.studies.values import Driver, current_boot_id, state_if_running

#: The shell waits for the command, also when a terminal's Ctrl+C reaches both.
_WAIT = (
    'out=$1; shift; trap : INT TERM; "$@"; code=$?; '
    'printf "%s\\n" "$code" > "$out.part" && mv "$out.part" "$out"; exit "$code"'
)
#: A line of the log that begins a start.
START = "--- start "
#: Between a driver's end and its exit code in the file.
WRITING_S = 10.0
MAX_MESSAGE = 2000


class ProcessDrivers:
    """Starts drivers as processes below `folder`, one folder for each item."""

    def __init__(
        self,
        folder: Path,
        *,
        database: str,
        command: Callable[[Item, Sequence[Device]], DriverCommand],
        progress: Callable[[Item, float], Progress | None] | None = None,
    ) -> None:
        self.folder = folder
        self._database = database
        self._command = command
        self._progress = progress
        self._children: dict[str, subprocess.Popen[bytes]] = {}  # by launch
        self._dead_since: dict[str, float] = {}

    def start(self, item: Item, devices: Sequence[Device]) -> None:
        made = self._command(item, devices)
        folder = self._item_folder(item.id)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment = {
            **inherited(),
            **made.environment,
            launch.DATABASE: self._database,
            launch.ITEM: str(item.id),
            launch.LAUNCH: item.launch,
        }
        claim = (sys.executable, "-P", "-m", launch.__name__)
        with log_path(self.folder, item.id).open("ab") as log:
            log.write(f"{START}{item.num_starts}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            log.flush()
            self._children[item.launch] = subprocess.Popen(  # nosec B603
                ["/bin/sh", "-c", _WAIT, "sh", str(self._exit_path(item)), *claim, *made.argv],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self, item: Item, *, now: float) -> Life | Ended:
        self._reap()
        if item.process is None:
            return Life.UNCLAIMED if item.launch in self._children else Life.NONE
        if is_alive(item.process):
            self._dead_since.pop(item.launch, None)
            return Life.ALIVE
        if (code := self._exit_code(item)) is not None:
            self._dead_since.pop(item.launch, None)
            said = self._last_words(item.id)
            return Ended(
                exit_code=code,
                message=said,
                at=self._ended_at(item),
                has_no_word=code == 1 and not said.lower().startswith("error:"),
            )
        since = self._dead_since.setdefault(item.launch, now)
        if now - since < WRITING_S and item.process.boot_id == current_boot_id():
            return Life.ALIVE
        self._dead_since.pop(item.launch, None)
        return Ended(exit_code=None, message=self._last_words(item.id))

    def stop(self, item: Item) -> None:
        # SIGTERM, not SIGINT: of those a second one ends the driver at once.
        if item.process is not None and is_alive(item.process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(item.process.pid, signal.SIGTERM)

    def kill(self, item: Item) -> None:
        import psutil

        if item.process is None or not is_alive(item.process):
            return
        with contextlib.suppress(psutil.Error):
            driver = psutil.Process(item.process.pid)
            several = [*driver.children(recursive=True), driver]
            for process in several:
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def progress(self, item: Item, *, now: float) -> Progress | None:
        return None if self._progress is None else self._progress(item, now)

    def close(self) -> None:
        """Forget the drivers, which go on; a later server adopts them."""
        self._children.clear()

    def _reap(self) -> None:
        for launched, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[launched]

    def _item_folder(self, item_id: int) -> Path:
        return _item_folder(self.folder, item_id)

    def _exit_path(self, item: Item) -> Path:
        return self._item_folder(item.id) / f"exit-{item.launch}"

    def _exit_code(self, item: Item) -> int | None:
        try:
            return int(self._exit_path(item).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    def _ended_at(self, item: Item) -> float | None:
        try:
            return self._exit_path(item).stat().st_mtime
        except OSError:
            return None

    def _last_words(self, item_id: int) -> str:
        """Return the error that a driver ended with, or else the last line of its log."""
        said = [line.strip() for line in present_words(self.folder, item_id).splitlines() if line.strip()]
        errors = [at for at, line in enumerate(said) if line.lower().startswith("error:")]
        return "\n".join(said[errors[-1] :] if errors else said[-1:])[:MAX_MESSAGE]


def log_path(folder: Path, item_id: int) -> Path:
    """Return where an item's drivers write what they say, one start after the other."""
    return _item_folder(folder, item_id) / "log.txt"


def present_words(folder: Path, item_id: int) -> str:
    """Return the end of what an item has printed since its present or last start, "" for nothing."""
    try:
        with log_path(folder, item_id).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 16_384))
            text = log.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = text.splitlines()
    starts = [at for at, line in enumerate(lines) if line.startswith(START)]
    return "\n".join(lines[starts[-1] + 1 :] if starts else lines)


def _item_folder(folder: Path, item_id: int) -> Path:
    return folder / f"{item_id:06d}"


def is_alive(process: Driver) -> bool:
    """Whether this very process of this machine runs, not another one with its pid."""
    if process.host != socket.gethostname():
        return False
    if process.start_ticks is None or process.boot_id != current_boot_id():
        return False
    return state_if_running(process.pid, process.start_ticks) is not None
