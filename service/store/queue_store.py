"""The queue: every transition of an item is one transaction, which fails if the item has moved meanwhile.

Order of use, by the server's loop:

    queue = open_queue(url)
    generation = queue.take_over(Driver.current(), now=now)     # the only server from here on
    queue.book(item, place, launch=token, generation=generation, now=now)
    queue.claim(id, launch=token, process=me, now=now)          # by the driver, before anything else
    queue.charge([id], now=now)                                 # while it runs
    queue.end(id, launch=token, to=ItemState.DONE, now=now)

What users ask for (`submit`, `hold`, `release`, `cancel`, `set_priority`, `move`) may come from any process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import IntegrityError

from autosft.profiles.errors import UserError
from autosft.service.store import server_lease, usage
from autosft.service.store.item_rows import item_from, submission_columns
from autosft.service.store.server_lease import Server
from autosft.service.store.transitions import (
    ItemMovedError,
    change,
    charge,
    keyed,
    leave_place,
    moved_error,
    one,
    report,
    require,
    several,
    stop,
    tell,
)
from autosft.service.store.users import Users
from autosft.service.values import (
    OPEN_STATES,
    PLACED_STATES,
    QUEUED_STATES,
    Demand,
    Event,
    Item,
    ItemState,
    Pace,
    Place,
    Submission,
    Usage,
)
from autosft.studies.store import tables
from autosft.studies.store.database import (
    begin,
    connect,
    display,
    parse_url,
    readable_errors,
    readable_rows,
    upgrade,
)
from autosft.studies.values import Driver

__all__ = ["ItemMovedError", "QueueStore", "open_queue"]

_ITEMS = tables.service_items
MAX_KEY_LENGTH = 200


def open_queue(url: str) -> QueueStore:
    """Open the queue in the study database at `url`, creating or upgrading it; raises as `open_records`."""
    parsed = parse_url(url)
    with readable_errors(parsed):
        engine = connect(parsed)
        upgrade(engine)
    return QueueStore(engine)


class QueueStore:
    """The queue of a study database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading = engine.execution_options(reading=True)
        self.users = Users(engine)

    @property
    def url(self) -> str:
        """The database's URL without its password, for display."""
        return display(self._engine.url)

    def close(self) -> None:
        self._engine.dispose()

    # Reading

    def get(self, item_id: int) -> Item:
        """Return an item.  Raises UserError if there is none with this id."""
        with self._read() as connection:
            return one(connection, item_id)

    def items(
        self,
        states: Collection[ItemState] = frozenset(ItemState),
        *,
        owner: str | None = None,
        limit: int | None = None,
    ) -> tuple[Item, ...]:
        """Return items in these states, the oldest first; with a limit, the newest so many."""
        query = sa.select(_ITEMS).where(_ITEMS.c.state.in_([state.value for state in states]))
        if owner is not None:
            query = query.where(_ITEMS.c.owner == owner)
        with self._read() as connection:
            found = connection.execute(query.order_by(_ITEMS.c.id.desc()).limit(limit)).mappings()
            return tuple(item_from(row) for row in found)[::-1]

    def states(self, item_ids: Collection[int]) -> dict[int, ItemState]:
        """Return the states of items by id, without those that do not exist."""
        query = sa.select(_ITEMS.c.id, _ITEMS.c.state).where(_ITEMS.c.id.in_(item_ids))
        with self._read() as connection:
            return {row.id: ItemState(row.state) for row in connection.execute(query)}

    def named(self, name: str, *, limit: int = 1000) -> tuple[Item, ...]:
        """Return the items of a name, the newest first."""
        query = sa.select(_ITEMS).where(_ITEMS.c.name == name).order_by(_ITEMS.c.id.desc()).limit(limit)
        with self._read() as connection:
            return tuple(item_from(row) for row in connection.execute(query).mappings())

    def owners(self, name: str) -> set[str]:
        """Return whose items have this name."""
        query = sa.select(_ITEMS.c.owner).where(_ITEMS.c.name == name).distinct()
        with self._read() as connection:
            return set(connection.scalars(query))

    def last_event(self) -> int:
        """Return the id of the newest event, 0 without one."""
        with self._read() as connection:
            return connection.scalar(sa.select(sa.func.max(tables.service_events.c.id))) or 0

    def events(self, *, since: int = 0, item: int | None = None, limit: int = 1000) -> tuple[Event, ...]:
        """Return transitions with an id above `since`, in the order in which they happened."""
        table = tables.service_events
        query = sa.select(table).where(table.c.id > since)
        if item is not None:
            query = query.where(table.c.item_id == item)
        with self._read() as connection:
            found = connection.execute(query.order_by(table.c.id).limit(limit)).mappings().all()
        return tuple(
            Event(
                id=row["id"],
                item=row["item_id"],
                at=row["at"],
                state=ItemState(row["state"]),
                note=row["note"],
            )
            for row in found
        )

    def usage(self, *, now: float, half_life_s: float) -> dict[str, Usage]:
        """Return what each user has used; those who have used nothing are left out."""
        with self._read() as connection:
            return usage.read(connection, now=now, half_life_s=half_life_s)

    # What users ask for

    def submit(self, submission: Submission, *, key: str | None = None, now: float) -> tuple[Item, bool]:
        """Put an item into the queue; return it, and whether it is new.

        The same owner's same `key` gives the item that it was given to first, so that a submission may be
        sent again after an answer was lost.  Raises UserError if that was another submission, if the key is
        too long, and if an item to wait for does not exist.
        """
        if key is not None and not 0 < len(key) <= MAX_KEY_LENGTH:
            raise UserError(
                f"An idempotency key has 1 to {MAX_KEY_LENGTH} characters; this one has {len(key)}."
            )
        columns = {**submission_columns(submission, now=now), "idempotency_key": key}
        try:
            with self._write() as connection:
                if (known := keyed(connection, submission, key)) is not None:
                    return known, False
                require(connection, submission.after)
                inserted = connection.execute(sa.insert(_ITEMS), columns).inserted_primary_key
                assert inserted is not None
                item = one(connection, int(inserted[0]))
                tell(connection, item, now=now)
                return item, True
        except IntegrityError:  # another process has submitted it meanwhile (PostgreSQL)
            with self._read() as connection:
                known = keyed(connection, submission, key)
            if known is None:
                raise
            return known, False

    def plan(self, item_id: int, demand: Demand, *, now: float) -> Item:
        """Record what an item needs, which was not known when it was submitted, or is better known now."""
        return self.transition(item_id, OPEN_STATES - PLACED_STATES, None, now=now, demand=demand)

    def hold(self, item_id: int, *, note: str = "", now: float) -> Item:
        """Take an item out of the queue; a running one stops with its checkpoints first."""
        with self._write() as connection:
            item = one(connection, item_id, lock=True)
            if item.is_placed:
                return stop(connection, item, then=ItemState.HELD, note=note, now=now)
            return change(connection, item, QUEUED_STATES, ItemState.HELD, now=now, note=note)

    def release(self, item_id: int, *, now: float) -> Item:
        """Put a held item back into the queue, at the end of its user's."""
        with self._write() as connection:
            item = one(connection, item_id, lock=True)
            to = ItemState.PREEMPTED if item.num_starts else ItemState.WAITING
            return change(connection, item, {ItemState.HELD}, to, now=now, note="", queued_at=now, num_lost=0)

    def cancel(self, item_id: int, *, note: str = "", now: float) -> Item:
        """End an item; a running one stops first, and what it has done is kept."""
        with self._write() as connection:
            item = one(connection, item_id, lock=True)
            if item.is_placed:
                return stop(connection, item, then=ItemState.CANCELLED, note=note, now=now)
            return change(
                connection,
                item,
                OPEN_STATES - PLACED_STATES,
                ItemState.CANCELLED,
                now=now,
                note=note,
                ended_at=now,
            )

    def set_priority(self, item_id: int, priority: int, *, now: float) -> Item:
        return self.transition(item_id, OPEN_STATES, None, now=now, priority=priority)

    def move(self, item_id: int, *, ahead: Sequence[int], now: float) -> Item:
        """Place a queued item right behind `ahead`, whose order is kept, and before all others.

        Both are then before everything that nobody moved.
        """
        with self._write() as connection:
            item = one(connection, item_id, lock=True)
            if not item.is_queued and item.state is not ItemState.HELD:
                raise moved_error(item, QUEUED_STATES | {ItemState.HELD})
            ranked = sa.select(_ITEMS.c.id).where(
                _ITEMS.c.rank.is_not(None), _ITEMS.c.state.in_([state.value for state in OPEN_STATES])
            )
            others = list(connection.scalars(ranked.order_by(_ITEMS.c.rank, _ITEMS.c.id)))
            front = [other for other in dict.fromkeys(ahead) if other != item_id]
            order = [*front, item_id, *(other for other in others if other not in {*front, item_id})]
            for rank, other in enumerate(order):
                connection.execute(sa.update(_ITEMS).where(_ITEMS.c.id == other), {"rank": rank})
            after = one(connection, item_id)
            tell(connection, after, now=now)
            return after

    # What the server does

    def take_over(self, process: Driver, *, now: float) -> int:
        """Become the queue's server; return the generation that `book` takes.

        Raises ServedElsewhereError if another live process is.
        """
        with self._write() as connection:
            return server_lease.take_over(connection, process, now=now)

    def heartbeat(self, generation: int, *, url: str | None = None, now: float) -> None:
        """Say that the server lives, and where it answers.  Raises ServedElsewhereError."""
        columns = {"heartbeat_at": now} if url is None else {"heartbeat_at": now, "url": url}
        with self._write() as connection:
            server_lease.update(connection, generation, **columns)

    def leave(self, generation: int, *, now: float) -> None:
        """Stop being the server; does nothing if another has taken over."""
        with contextlib.suppress(server_lease.ServedElsewhereError), self._write() as connection:
            server_lease.update(connection, generation, heartbeat_at=now, ended_at=now, url="")

    def server(self) -> Server | None:
        """Return who serves this queue, or served it last."""
        with self._read() as connection:
            return server_lease.read_server(connection)

    def book(
        self,
        item_id: int,
        place: Place,
        *,
        launch: str,
        generation: int,
        ends_at: float | None = None,
        now: float,
    ) -> Item:
        """Record that an item starts, before its driver is started: only who claims `launch` may run it.

        `ends_at` is predicted, with what is beside it, until its driver knows better.
        """
        with self._write() as connection:
            server_lease.check(connection, generation)
            item = one(connection, item_id, lock=True)
            return change(
                connection,
                item,
                QUEUED_STATES,
                ItemState.STARTING,
                now=now,
                place=place,
                launch=launch,
                started_at=now,
                num_starts=item.num_starts + 1,
                ends_at=ends_at,
                then=None,
                rank=None,
                note="",
            )

    def claim(self, item_id: int, *, launch: str, process: Driver, now: float) -> Item | None:
        """Take a start for this process, also again; None if it was withdrawn, or another process's."""
        with self._write() as connection:
            item = one(connection, item_id, lock=True)
            if (item.launch, item.process) == (launch, process):
                return item
            if item.launch != launch or item.state is not ItemState.STARTING:
                return None
            return change(
                connection,
                item,
                {ItemState.STARTING},
                ItemState.RUNNING,
                now=now,
                process=process,
                charged_until=now,
            )

    def withdraw(
        self, item_id: int, *, launch: str, note: str = "", was_lost: bool = False, now: float
    ) -> Item | None:
        """Take back a start that nobody has claimed; None if it was claimed meanwhile.

        `was_lost` counts a start whose process has ended without claiming it.
        """
        with self._write() as connection:
            item = one(connection, item_id, lock=True)
            if item.launch != launch or item.process is not None or not item.is_placed:
                return None
            then = item.then or (ItemState.PREEMPTED if item.num_starts > 1 else ItemState.WAITING)
            return leave_place(connection, item, then, note=note, was_lost=was_lost, now=now)

    def stop(self, item_id: int, *, launch: str, then: ItemState, note: str = "", now: float) -> Item | None:
        """Record that a placed item is to stop; None if that start is over."""
        with self._write() as connection:
            item = one(connection, item_id, lock=True)
            if item.launch != launch or not item.is_placed:
                return None
            return stop(connection, item, then=then, note=note, now=now)

    def report(self, paces: Sequence[Pace], *, now: float) -> None:
        """Record how far running items are, together; nothing for a start that is over."""
        if not paces:
            return
        with self._write() as connection:
            report(connection, paces)

    def charge(self, item_ids: Collection[int], *, now: float) -> None:
        """Charge the owners of running items for the time since the last charge."""
        with self._write() as connection:
            charge(connection, several(connection, item_ids), now=now)

    def end(
        self,
        item_id: int,
        *,
        launch: str,
        to: ItemState,
        note: str = "",
        was_lost: bool = False,
        at: float | None = None,
        now: float,
    ) -> Item | None:
        """Record that a driver has ended: charge for it, free its devices.  None if that was recorded before.

        `was_lost` counts a start whose driver vanished.  `at` is when it ended, if not now: that is what is
        charged.
        """
        with self._write() as connection:
            item = one(connection, item_id, lock=True)
            if item.launch != launch or not item.is_placed:
                return None
            charge(connection, [item], now=now if at is None else min(at, now))
            return leave_place(connection, item, to, note=note, was_lost=was_lost, now=now)

    def transition(
        self,
        item_id: int,
        from_states: Collection[ItemState],
        to: ItemState | None,
        *,
        now: float,
        **fields: Any,
    ) -> Item:
        """Change an item that is in one of these states; `to` None keeps its state.

        Raises ItemMovedError, changing nothing, if it is in another.
        """
        with self._write() as connection:
            return change(connection, one(connection, item_id, lock=True), from_states, to, now=now, **fields)

    @contextlib.contextmanager
    def _read(self) -> Iterator[Connection]:
        url = self._engine.url
        with readable_errors(url), begin(self._reading) as connection, readable_rows(url):
            yield connection

    @contextlib.contextmanager
    def _write(self) -> Iterator[Connection]:
        with readable_errors(self._engine.url), begin(self._engine) as connection:
            yield connection
