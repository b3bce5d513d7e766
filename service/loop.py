"""The server's loop: look at the queue, the devices and the drivers; decide; act; record.

Everything that it knows is in the queue's database, so that a server that is killed anywhere is replaced by
starting another: drivers go on meanwhile and are adopted.  Clock, devices and drivers are given to it.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from autosft.profiles.errors import UserError
from autosft.service.decide.expected import MAX_RECENT, expected
from autosft.service.decide.forecast import Forecast, forecast
from autosft.service.decide.outcomes import MAX_LOST, Ended, outcome
from autosft.service.decide.place_items import decide
from autosft.service.decide.reasons import reasons
from autosft.service.decide.situation import Policy, Situation
from autosft.service.devices import Devices
from autosft.service.drivers.protocol import Drivers, Life
from autosft.service.store.queue_store import ItemMovedError, QueueStore
from autosft.service.store.server_lease import ServedElsewhereError
from autosft.service.values import ENDED_STATES, OPEN_STATES, Item, ItemState, Pace, Reason, Start
from autosft.studies.values import Driver

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
#: How often users are charged, drivers asked how far they are, and the forecast made.
CHARGE_S = 60.0
PROGRESS_S = 15.0
FORECAST_S = 5.0
#: After a forecast comes a pause of so many times what it took.
FORECAST_REST = 20.0
#: A driver that has not ended so long after it was asked to is killed.
KILL_AFTER_S = 900.0
#: A start that nobody has claimed after this long is taken back.
CLAIM_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What the last tick saw, for whoever shows it."""

    situation: Situation
    forecast: Forecast
    reasons: tuple[tuple[int, Reason], ...]


class Loop:
    """One server's work on its queue.

    Order of use: `begin` once, `tick` again and again or `run` until it is told to stop, `end`.  Without
    `forecast_every_s` there is no forecast, and no view.
    """

    def __init__(
        self,
        queue: QueueStore,
        *,
        devices: Devices,
        drivers: Drivers,
        clock: Callable[[], float],
        policy: Policy | None = None,
        new_launch: Callable[[], str] = lambda: secrets.token_hex(16),
        forecast_every_s: float | None = FORECAST_S,
    ) -> None:
        self.queue = queue
        self.view: View | None = None
        self._devices = devices
        self._drivers = drivers
        self._clock = clock
        self._policy = policy or Policy()
        self._new_launch = new_launch
        self._generation = 0
        self._items: tuple[Item, ...] = ()
        self._heartbeat_at = self._charged_at = self._progress_at = self._forecast_at = float("-inf")
        self._forecast_every_s, self._forecast_rest_s = forecast_every_s, 0.0
        self._seen: tuple[object, ...] = ()
        self._stopping_since: dict[str, float] = {}
        self._recent: dict[int, Item] = {}  # the newest that were submitted, by id
        self._first_at = float("inf")  # when the first of all was
        self._wake = threading.Event()

    def begin(self, process: Driver) -> None:
        """Become the queue's server, and take back starts that nobody has claimed.

        Raises ServedElsewhereError if another live process is, and UserError if drivers run on another
        machine, where they can be neither seen nor stopped from here.
        """
        now = self._clock()
        self._generation = self.queue.take_over(process, now=now)
        self._heartbeat_at = now
        self._recent = {item.id: item for item in self.queue.items(limit=MAX_RECENT)}
        placed = [item for item in self.queue.items(OPEN_STATES) if item.is_placed]
        away = [item for item in placed if item.process is not None and item.process.host != process.host]
        if away:
            self.queue.leave(self._generation, now=now)
            raise UserError(
                f"Item {away[0].id} ({away[0].name}) runs on {_host(away[0])}, "
                "which cannot be watched from here.",
                remedy="Start the server there, or wait until it has ended.",
            )
        for item in placed:
            if item.process is None:  # a driver that comes late finds that its start is withdrawn
                self.queue.withdraw(item.id, launch=item.launch, now=now)

    def announce(self, url: str) -> None:
        """Record where the server answers."""
        self.queue.heartbeat(self._generation, url=url, now=self._clock())

    def end(self) -> None:
        """Stop being the server; drivers go on."""
        self.queue.leave(self._generation, now=self._clock())

    def wake(self) -> None:
        """Make `run` look at the queue at once: something was submitted or changed."""
        self._wake.set()

    def run(self, stop_requested: Callable[[], bool], *, every_s: float = 1.0) -> None:
        """Tick until it is told to stop.  Raises ServedElsewhereError if another server has taken over.

        Other errors of a tick, such as a database that is away, are logged, and the next one tries again.
        """
        while not stop_requested():
            try:
                self.tick()
            except ServedElsewhereError:
                raise
            except Exception:
                logger.exception("A look at the queue failed; the next one is in %.0f s.", every_s)
            self._wake.wait(every_s)
            self._wake.clear()

    def tick(self) -> None:
        """Look once at everything, and do what is due."""
        now = self._clock()
        if now - self._heartbeat_at >= HEARTBEAT_S:
            self.queue.heartbeat(self._generation, now=now)
            self._heartbeat_at = now
        self._items = self.queue.items(OPEN_STATES)
        if self._watch(now) | self._follow(now):
            self._items = self.queue.items(OPEN_STATES)
        situation = self._situation(now)
        while True:
            decision = decide(situation)
            for start in decision.starts:
                situation = self._start(start, situation)
            for item_id in decision.preempts:
                situation = self._preempt(item_id, situation)
            if decision.is_whole:
                break
        self._foresee(situation)

    # What has become of the drivers

    def _watch(self, now: float) -> bool:
        """Look at the drivers; return whether an item has moved."""
        placed = [item for item in self._items if item.is_placed]
        asks = now - self._progress_at >= PROGRESS_S
        has_moved = asks and bool(placed)
        paces: list[Pace] = []
        for item in placed:
            life = self._drivers.poll(item, now=now)
            if isinstance(life, Ended):
                self._record_end(item, life, now)
                has_moved = True
            elif item.process is None:
                has_moved |= self._watch_claim(item, life, now)
            else:
                if item.state is ItemState.STOPPING:
                    self._see_stop(item, now)
                if asks and (progress := self._drivers.progress(item, now=now)) is not None:
                    paces.append(
                        Pace(
                            item=item.id,
                            launch=item.launch,
                            progress=progress.share,
                            ends_at=progress.ends_at,
                        )
                    )
        self.queue.report(paces, now=now)
        if placed and now - self._charged_at >= CHARGE_S:
            self.queue.charge([item.id for item in placed], now=now)
            self._charged_at = now
        if asks:
            self._progress_at = now
        launches = {item.launch for item in placed}
        self._stopping_since = {k: v for k, v in self._stopping_since.items() if k in launches}
        return has_moved

    def _record_end(self, item: Item, ended: Ended, now: float) -> None:
        found = outcome(item, ended)
        # When one that vanished did so is not known: nothing more is charged.
        at = item.charged_until if ended.exit_code is None else ended.at
        self.queue.end(
            item.id,
            launch=item.launch,
            to=found.state,
            note=found.note,
            was_lost=found.was_lost,
            at=at,
            now=now,
        )

    def _watch_claim(self, item: Item, life: Life, now: float) -> bool:
        """Take back a start that nobody will claim, or that is not wanted any more; return whether it was.

        An item whose processes end without claiming it is held, with what they said.
        """
        is_late = now - (item.started_at or now) >= CLAIM_S
        if not (item.state is ItemState.STOPPING or life is Life.NONE or is_late):
            return False
        is_lost = item.state is ItemState.STARTING
        back = self.queue.withdraw(item.id, launch=item.launch, note=item.note, was_lost=is_lost, now=now)
        if back is not None and back.is_queued and back.num_lost >= MAX_LOST:
            note = f"Its process ended {MAX_LOST} times before it began; its log says why."
            self.queue.hold(item.id, note=note, now=now)
        return True

    def _see_stop(self, item: Item, now: float) -> None:
        since = self._stopping_since.get(item.launch)
        if since is None:
            self._stopping_since[item.launch] = now
            self._drivers.stop(item)
        elif now - since >= KILL_AFTER_S:
            self._drivers.kill(item)

    # What others wait for

    def _follow(self, now: float) -> bool:
        """Hold items that follow one that was not done; others wait from when the last one was.

        Returns whether an item has moved.
        """
        has_moved = False
        for item in self._items:
            if not (item.after and item.is_queued):
                continue
            others = [self.queue.get(other) for other in item.after]
            undone = [o for o in others if o.state in ENDED_STATES - {ItemState.DONE}]
            is_next = all(other.state is ItemState.DONE for other in others)
            with contextlib.suppress(ItemMovedError):  # its owner was faster
                if undone:
                    first = undone[0]
                    note = f"It follows item {first.id} ({first.name}), which is {first.state.value}."
                    self.queue.hold(item.id, note=note, now=now)
                    has_moved = True
                elif is_next and item.queued_at < max(other.ended_at or 0.0 for other in others):
                    self.queue.transition(item.id, {item.state}, None, now=now, queued_at=now)
                    has_moved = True
        return has_moved

    # What starts, what stops

    def _situation(self, now: float) -> Situation:
        items = self._items
        awaited = {other for item in items for other in item.after}
        pids = {item.process.pid for item in items if item.process is not None}
        return Situation(
            now=now,
            items=items,
            devices=self._devices.read(pids),
            users={user.name: user for user in self.queue.users.list()},
            usage=self.queue.usage(now=now, half_life_s=self._policy.half_life_s),
            ended=self.queue.states(awaited) if awaited else {},
            policy=self._policy,
        )

    def _start(self, start: Start, situation: Situation) -> Situation:
        """Book an item, then start its driver; return the situation after it."""
        launch = self._new_launch()
        by_uuid = {device.uuid: device for device in situation.devices}
        devices = [by_uuid[uuid] for uuid in start.place.device_uuids]
        try:
            item = self.queue.book(
                start.item,
                start.place,
                launch=launch,
                generation=self._generation,
                ends_at=start.ends_at,
                now=situation.now,
            )
        except ItemMovedError:  # held or cancelled meanwhile
            return _without(situation, start.item)
        try:
            self._drivers.start(item, devices)
        except OSError as error:
            note = f"Its process could not be started: {error.strerror or error}."
            self.queue.withdraw(item.id, launch=launch, note=note, now=situation.now)
            held = self.queue.hold(item.id, note=note, now=situation.now)
            return _with(situation, held)
        return _with(situation, item)

    def _preempt(self, item_id: int, situation: Situation) -> Situation:
        item = next(one for one in situation.items if one.id == item_id)
        note = "It gives way to an item of a higher priority."
        stopped = self.queue.stop(
            item.id, launch=item.launch, then=ItemState.PREEMPTED, note=note, now=situation.now
        )
        return _without(situation, item_id) if stopped is None else _with(situation, stopped)

    def _foresee(self, situation: Situation) -> None:
        """Make the forecast again if something has changed, or some time has passed.

        For long queues it takes its time: it is given a twentieth of this process's.
        """
        if self._forecast_every_s is None:
            return
        seen = tuple((i.id, i.state, i.priority, i.rank, i.demand is None) for i in situation.items)
        waited_s = situation.now - self._forecast_at
        if waited_s < self._forecast_rest_s or (seen == self._seen and waited_s < self._forecast_every_s):
            return
        started_s = time.perf_counter()
        found = forecast(situation, self._expected(situation))
        self.view = View(situation=situation, forecast=found, reasons=reasons(situation, found))
        self._forecast_rest_s = FORECAST_REST * (time.perf_counter() - started_s)
        self._seen, self._forecast_at = seen, situation.now

    def _expected(self, situation: Situation) -> tuple[Item, ...]:
        """Return what is likely to be submitted, by what was."""
        oldest = min(self._recent, default=0)
        self._recent |= {item.id: item for item in situation.items if item.id >= oldest}
        for item_id in sorted(self._recent)[:-MAX_RECENT]:
            del self._recent[item_id]
        first = min(self._recent.values(), key=lambda item: item.id, default=None)
        if first is not None:
            self._first_at = min(self._first_at, first.submitted_at)
        return expected(self._recent.values(), since=self._first_at, now=situation.now)


def _with(situation: Situation, item: Item) -> Situation:
    return replace(situation, items=tuple(item if one.id == item.id else one for one in situation.items))


def _without(situation: Situation, item_id: int) -> Situation:
    return replace(situation, items=tuple(one for one in situation.items if one.id != item_id))


def _host(item: Item) -> str:
    return "another machine" if item.process is None else item.process.host
