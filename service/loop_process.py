"""The scheduler's process: it looks at the queue, decides, starts and watches drivers, and makes the picture.

    python -m autosft.service.loop_process        (with Settings, pickled, and then commands as its input)

It is a child of the process that answers requests, so that a decision over a long queue and an answer never
wait for each other, and it holds the queue's lease.  It ends with its parent, at once: what it was about to
do is in the database, and the next server's to finish.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle  # nosec B403
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import IO

from autosft.profiles.errors import UserError
from autosft.service.board import Board, difference
from autosft.service.cluster_devices import devices_of
from autosft.service.drivers.command import DriverCommand, driver_command
from autosft.service.drivers.process_drivers import ProcessDrivers, present_words
from autosft.service.drivers.progress import item_progress
from autosft.service.drivers.protocol import Drivers
from autosft.service.live import LiveBoard, uses_of
from autosft.service.loop import Loop
from autosft.service.loop_messages import Command, Message, Pictured, Refused, TrialTold
from autosft.service.settings import Settings
from autosft.service.store.queue_store import QueueStore, open_queue
from autosft.service.store.server_lease import ServedElsewhereError
from autosft.service.trial_events import TrialWatch
from autosft.service.values import Device, Item, ItemState
from autosft.studies.store.records import open_records
from autosft.studies.values import Driver

logger = logging.getLogger(__name__)

#: As journald and log collectors like it: one line, level and logger first.
LOG_FORMAT = "%(asctime)s level=%(levelname)s logger=%(name)s msg=%(message)s"
#: Exit code of a process whose parent is gone.
ORPHANED = 70
#: How long a look at the queue may take to end.
LOOK_S, PICTURE_S = 30.0, 10.0
#: Commands that keep what they find in the database.
_RECORDED = ("tune", "train", "evaluate")
STOP_NOTE = "The server was stopped; it goes on from its checkpoints when one is started."


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the process works with."""

    queue: QueueStore
    loop: Loop
    live: LiveBoard
    drivers: Drivers
    url: str  # where the server answers


def main() -> None:
    """Be the scheduler's process of the server that started this one."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    with os.fdopen(os.dup(1), "wb") as out, ExitStack() as stack:
        os.dup2(2, 1)  # what libraries print is no message
        # Not sys.stdin, which the end of the interpreter would wait for while a thread reads it.
        commands = os.fdopen(os.dup(0), "rb")
        settings = pickle.load(commands)  # nosec B301 - from the process that started this one
        outbox = Outbox(out)
        try:
            parts = stack.enter_context(opened(settings, outbox))
        except UserError as error:
            outbox.send(Refused(error=error))
            return
        Work(parts, outbox).run(commands)


class Outbox:
    """What the parent is told; may be used from any thread."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out, self._lock, self._last = out, threading.Lock(), Board()

    def send(self, message: Message) -> None:
        """Send a message.  Nobody is left to hear it where the parent is gone: then this process ends."""
        with self._lock:
            try:
                pickle.dump(message, self._out, protocol=pickle.HIGHEST_PROTOCOL)
                self._out.flush()
            except OSError:
                os._exit(ORPHANED)

    def publish(self, board: Board) -> None:
        """Send what has changed since the last picture; by one thread."""
        before, self._last = self._last, board
        self.send(Pictured(change=difference(before, board)))

    def tell_trial(self, owner: str, data: dict[str, object]) -> None:
        self.send(TrialTold(owner=owner, data=data))


class Work:
    """The threads of the process: one looks at the queue, one makes the picture, one hears commands."""

    def __init__(self, parts: Parts, outbox: Outbox) -> None:
        self._parts, self._outbox = parts, outbox
        self._is_draining, self._is_over = threading.Event(), threading.Event()
        self._last_word = Command.KEEP

    def run(self, commands: IO[bytes]) -> None:
        """Serve the queue until told to end, or until another server has taken over."""
        parts = self._parts
        self._in_thread("commands", lambda: self._hear(commands))  # first: the parent may be gone already
        try:
            parts.loop.begin(Driver.current())
            parts.loop.announce(parts.url)
        except UserError as error:
            self._outbox.send(Refused(error=error))
            return
        parts.live.listen(self._outbox.publish)
        parts.live.begin()
        # What is imported stays: no collection of garbage has to look at it again.
        gc.collect()
        gc.freeze()
        loop, picture = self._in_thread("loop", self._look), self._in_thread("picture", parts.live.run)
        self._is_over.wait()
        self._is_draining.set()
        parts.loop.wake()
        loop.join(timeout=LOOK_S)
        if self._last_word is Command.CHECKPOINT:
            stop_all(parts.queue, parts.drivers)
        parts.live.end()
        picture.join(timeout=PICTURE_S)
        with contextlib.suppress(Exception):  # the next server takes over all the same
            parts.loop.end()

    def _look(self) -> None:
        try:
            self._parts.loop.run(self._is_draining.is_set)
        except ServedElsewhereError as error:
            logger.exception("Another server has taken over.")
            self._outbox.send(Refused(error=error))
            self._is_over.set()

    def _hear(self, commands: IO[bytes]) -> None:
        for line in commands:
            match command := Command(line.decode("ascii").strip()):
                case Command.WAKE:
                    self._parts.live.wake()
                case Command.DRAIN:
                    self._parts.live.is_draining = True
                    self._is_draining.set()
                    self._parts.loop.wake()
                    self._parts.live.wake()
                case Command.KEEP | Command.CHECKPOINT:
                    self._last_word = command
                    self._is_over.set()
        if not self._is_over.is_set():
            os._exit(ORPHANED)  # as if killed: nothing may be decided beside the next server

    def _in_thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        return thread


def stop_all(queue: QueueStore, drivers: Drivers) -> None:
    """Have everything that runs save a checkpoint and end; it goes on with the next server."""
    for item in queue.items({ItemState.STARTING, ItemState.RUNNING}):
        stopped = queue.stop(
            item.id, launch=item.launch, then=ItemState.PREEMPTED, note=STOP_NOTE, now=time.time()
        )
        if stopped is not None:
            drivers.stop(stopped)


@contextlib.contextmanager
def opened(settings: Settings, outbox: Outbox) -> Iterator[Parts]:
    """Put together what looks at the queue.  Raises UserError where the devices are not there."""
    with ExitStack() as stack:
        queue = stack.enter_context(closing(open_queue(settings.storage)))
        records = stack.enter_context(closing(open_records(settings.storage)))
        devices = devices_of(
            settings.hardware, settings.gpus, address=settings.address, nodes_file=settings.nodes_file
        )
        drivers = ProcessDrivers(
            settings.items_folder,
            database=settings.storage,
            command=lambda item, given: recorded(item, given, settings),
            progress=item_progress(records, partial(present_words, settings.items_folder)),
        )
        loop = Loop(queue, devices=devices, drivers=drivers, clock=time.time, policy=settings.policy)
        live = LiveBoard(queue, loop, clock=time.time, uses=lambda placed: uses_of(devices.cluster, placed))
        watch = TrialWatch(records.trial_states)

        def tell_trials(placed: Collection[Item]) -> None:
            for owner, data in watch.look(placed):
                outbox.tell_trial(owner, data)

        live.measure_also(tell_trials)
        yield Parts(queue=queue, loop=loop, live=live, drivers=drivers, url=settings.url)


def recorded(item: Item, devices: Sequence[Device], settings: Settings) -> DriverCommand:
    """Return an item's command with this server's database."""
    made = driver_command(item, devices, hardware=settings.hardware, address=settings.address)
    argv = list(made.argv)
    if item.arguments.command in _RECORDED:
        at = argv.index("--") if "--" in argv else len(argv)
        argv.insert(at, f"--storage={settings.storage}")
    # The command is run here: a server in this one's environment is not asked.
    return DriverCommand(argv=tuple(argv), environment={**made.environment, "AUTOSFT_SERVER": ""})


if __name__ == "__main__":
    main()
