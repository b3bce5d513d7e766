"""The picture of the queue, kept up to date: by the loop's view, and by what has happened since.

Only what has changed is read again, so that a long queue costs the server little.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection
from typing import Protocol

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import ClusterProfile, DeviceProfile
from autosft.profiles.hardware.discover import refresh
from autosft.service.board import MAX_ENDED, Board, DeviceUse, board_of
from autosft.service.devices import device_from
from autosft.service.loop import View
from autosft.service.store.queue_store import QueueStore
from autosft.service.values import ENDED_STATES, OPEN_STATES, Item, is_elsewhere
from autosft.studies.store.database import DatabaseError

logger = logging.getLogger(__name__)

#: How often the picture is made, and memory measured.
EVERY_S, MEASURE_S = 0.5, 5.0
#: What comes in together is looked at together: a long queue takes the loop a tenth of a second.
WAKE_S = 1.0
MAX_EVENTS = 1000


class Looping(Protocol):
    """What is asked of the loop."""

    view: View | None

    def wake(self) -> None: ...


class LiveBoard:
    """Makes the picture in a thread of its own; what is read of it is one frozen value."""

    def __init__(
        self,
        queue: QueueStore,
        loop: Looping,
        *,
        clock: Callable[[], float],
        uses: Callable[[Collection[Item]], tuple[DeviceUse, ...]],
    ) -> None:
        self._queue, self._loop, self._clock = queue, loop, clock
        self._uses = uses
        self._publish: list[Callable[[Board], None]] = []
        self._measured: list[Callable[[Collection[Item]], None]] = []
        self._board, self.is_draining = Board(), False
        self._view: View | None = None
        self._items: dict[int, Item] = {}
        self._touched: dict[int, float] = {}
        self._event, self._measured_at = 0, float("-inf")
        self._devices: tuple[DeviceUse, ...] = ()
        self._looked_at = self._woken_at = float("-inf")
        self._due, self._is_over = threading.Event(), threading.Event()

    def listen(self, publish: Callable[[Board], None]) -> None:
        """Have each new picture handed on."""
        self._publish.append(publish)

    def measure_also(self, look: Callable[[Collection[Item]], None]) -> None:
        """Have what runs looked at whenever memory is measured."""
        self._measured.append(look)

    def uses(self) -> tuple[DeviceUse, ...]:
        """Return the devices with what is known to run on them, measured now."""
        return self._uses([item for item in self._items.values() if item.is_placed])

    # What requests ask

    def board(self) -> Board:
        return self._board

    def wake(self) -> None:
        """Have the loop look at the queue, and the picture made again, both soon."""
        now = self._clock()
        if now - self._woken_at >= WAKE_S:  # else it looks by itself within that time
            self._woken_at = now
            self._loop.wake()
        self._due.set()

    # The thread

    def begin(self) -> None:
        """Read what there is."""
        self._event = self._queue.last_event()
        self._items = {item.id: item for item in self._queue.items(OPEN_STATES)}
        for item in self._queue.items(ENDED_STATES, limit=MAX_ENDED):
            self._items[item.id] = item
        self.refresh()

    def run(self) -> None:
        """Keep it up to date until `end`; a database that is away is waited for."""
        while not self._is_over.is_set():
            try:
                self.refresh()
            except Exception:
                logger.exception("The picture of the queue could not be made; it is tried again.")
            self._due.wait(EVERY_S)
            self._due.clear()
            self._is_over.wait(EVERY_S)

    def end(self) -> None:
        self._is_over.set()
        self._due.set()

    def refresh(self) -> None:
        """Make the picture again if something has changed."""
        now = self._clock()
        has_changed = self._read_events() | self._read_view() | self._measure(now)
        if not has_changed and self._board.is_draining == self.is_draining and self._board.at:
            return
        waits = () if self._view is None else self._view.reasons
        known = [(item, reason) for item, reason in waits if item in self._items]
        self._board = board_of(
            [item for item in self._items.values() if not item.is_ended],
            [item for item in self._items.values() if item.is_ended],
            known,
            self._devices,
            now=now,
            looked_at=self._looked_at,
            is_draining=self.is_draining,
        )
        for publish in self._publish:
            publish(self._board)

    def _read_events(self) -> bool:
        """Read the items again that something has happened to."""
        events = self._queue.events(since=self._event, limit=MAX_EVENTS)
        if not events:
            return False
        for event in events:
            self._touched[event.item] = event.at
        for number in {event.item for event in events}:
            try:
                self._items[number] = self._queue.get(number)
            except DatabaseError:
                raise
            except UserError:
                logger.exception("item %d cannot be read", number)  # its row is damaged: the others are shown
        self._event = events[-1].id  # once all is read: a database that goes away meanwhile is asked again
        self._forget()
        if len(events) == MAX_EVENTS:
            self._due.set()
        return True

    def _read_view(self) -> bool:
        """Take over what the loop has seen, but for what has changed since."""
        view = self._loop.view
        if view is self._view or view is None:
            return False
        self._view, seen_at = view, view.situation.now
        self._looked_at = self._clock()
        for item in view.situation.items:
            known = self._items.get(item.id)
            if known is None or (self._touched.get(item.id, 0.0) < seen_at and not known.is_ended):
                self._items[item.id] = item
        self._touched = {number: at for number, at in self._touched.items() if at >= seen_at}
        return True

    def _measure(self, now: float) -> bool:
        """Measure who holds the devices' memory."""
        if now - self._measured_at < MEASURE_S:
            return False
        self._measured_at = now
        before, self._devices = self._devices, self.uses()
        for look in self._measured:
            look([item for item in self._items.values() if item.is_placed])
        return self._devices != before

    def _forget(self) -> None:
        """Keep no more ended items than are shown."""
        ended = sorted(
            (item for item in self._items.values() if item.is_ended),
            key=lambda item: (item.ended_at or 0.0, item.id),
        )
        for item in ended[: max(0, len(ended) - MAX_ENDED)]:
            del self._items[item.id]


def uses_of(cluster: ClusterProfile, placed: Collection[Item]) -> tuple[DeviceUse, ...]:
    """Return the devices with what is booked on them and what processes hold."""
    if not cluster.devices:  # of a cluster that does not answer
        return ()
    now = refresh(cluster)
    pids = {item.id: pids_of(item) for item in placed}
    return tuple(_use(profile, placed, pids) for profile in now.devices)


def _use(profile: DeviceProfile, placed: Collection[Item], pids: dict[int, set[int]]) -> DeviceUse:
    there = [item for item in placed if item.place is not None and profile.uuid in item.place.device_uuids]
    booked = tuple((item.id, item.place.bytes_each) for item in there if item.place is not None)
    if is_elsewhere(profile.node):  # not measured: what was free when its node was asked
        return DeviceUse(
            device=device_from(profile, (), own_pids=()),
            booked=booked,
            others_bytes=_rounded(max(0, profile.total_bytes - profile.free_bytes)),
            free_bytes=_rounded(max(0, profile.free_bytes - sum(size for _, size in booked))),
            is_measured=False,
        )
    if profile.kind.traits.has_own_memory:
        held = {
            item.id: sum(
                process.used_bytes or 0 for process in profile.processes if process.pid in pids[item.id]
            )
            for item in there
        }
    else:
        held = {item.id: sum(map(resident_bytes, pids[item.id])) for item in there}
    free = profile.free_bytes
    return DeviceUse(
        device=device_from(profile, (), own_pids=()),
        booked=booked,
        measured=tuple((item, _rounded(num)) for item, num in held.items()),
        others_bytes=_rounded(max(0, profile.total_bytes - free - sum(held.values()))),
        free_bytes=_rounded(free),
    )


def pids_of(item: Item) -> set[int]:
    """Return the processes of an item's driver and everything that it has started."""
    import psutil

    if item.process is None:
        return set()
    with contextlib.suppress(psutil.Error):
        driver = psutil.Process(item.process.pid)
        return {driver.pid, *(child.pid for child in driver.children(recursive=True))}
    return set()


def resident_bytes(pid: int) -> int:
    """Return what a process holds of RAM beside what it shares with others."""
    import psutil

    with contextlib.suppress(psutil.Error):
        memory = psutil.Process(pid).memory_info()
        return max(0, int(memory.rss - getattr(memory, "shared", 0)))
    return 0


def _rounded(num_bytes: int) -> int:
    """Round to 16 MiB: a picture that changes with each allocation would be sent all the time."""
    return num_bytes >> 24 << 24
