"""The picture of the queue follows what happens, reading again only what has changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from autosft.service.board import Board, DeviceUse
from autosft.service.live import EVERY_S, MEASURE_S, WAKE_S, LiveBoard
from autosft.service.loop import View
from autosft.service.store.queue_store import QueueStore
from autosft.service.trial_events import MAX_STUDIES, TrialWatch
from autosft.service.values import Arguments, Item, ItemState, Reason
from tests.service.examples import demand, device, place, process, submission

NOW = 1_000_000.0


@dataclasses.dataclass
class Situation:
    now: float
    items: tuple[Item, ...]


class FakeLoop:
    """A loop that has looked when a test says so."""

    def __init__(self, queue: QueueStore) -> None:
        self.queue, self.view, self.num_wakes = queue, None, 0

    def wake(self) -> None:
        self.num_wakes += 1

    def look(self, now: float) -> None:
        items = self.queue.items()
        reasons = tuple((item.id, Reason(text=f"reason {item.id}")) for item in items if item.is_queued)
        self.view = View(situation=Situation(now, items), forecast=None, reasons=reasons[::-1])  # type: ignore[arg-type, assignment]


def live_board(queue: QueueStore) -> tuple[LiveBoard, FakeLoop, list[float], list[Board]]:
    loop, now, boards = FakeLoop(queue), [NOW], []

    def uses(placed: Collection[Item]) -> tuple[DeviceUse, ...]:
        return (DeviceUse(device=device(0), booked=tuple((item.id, 1) for item in placed)),)

    live = LiveBoard(queue, loop, clock=lambda: now[0], uses=uses)  # type: ignore[arg-type]
    live.listen(boards.append)
    live.begin()
    return live, loop, now, boards


def test_it_shows_the_loops_order_and_what_was_submitted_since(queue: QueueStore) -> None:
    live, loop, now, _ = live_board(queue)
    for name in ("one", "two"):
        queue.submit(submission(name), now=NOW)
    loop.look(NOW + 1)
    live.refresh()
    assert [item.name for item in live.board().items] == ["two", "one"]
    assert live.board().places() == {2: 1, 1: 2}
    now[0] += 2
    queue.submit(submission("three"), now=now[0])
    live.refresh()
    assert [item.name for item in live.board().items] == ["two", "one", "three"]
    assert live.board().at == now[0]


def test_a_look_of_the_loop_that_is_older_than_a_change_does_not_undo_it(queue: QueueStore) -> None:
    live, loop, now, _ = live_board(queue)
    item, _ = queue.submit(submission("one"), now=NOW)
    loop.look(NOW + 1)
    now[0] += 2
    queue.hold(item.id, now=now[0])
    live.refresh()
    [shown] = live.board().items
    assert shown.state is ItemState.HELD


def test_nothing_is_published_where_nothing_has_changed(queue: QueueStore) -> None:
    live, _, now, boards = live_board(queue)
    before = len(boards)
    now[0] += EVERY_S
    live.refresh()
    now[0] += MEASURE_S
    live.refresh()
    assert len(boards) == before
    live.is_draining = True
    live.refresh()
    assert boards[-1].is_draining


def test_what_has_ended_is_shown_after_the_rest_the_newest_first(queue: QueueStore) -> None:
    live, _, now, _ = live_board(queue)
    for name in ("one", "two", "three"):
        queue.submit(submission(name), now=NOW)
    for number in (1, 2):
        now[0] += 1
        queue.cancel(number, now=now[0])
    live.refresh()
    assert [item.name for item in live.board().items] == ["three", "two", "one"]


def test_it_says_when_the_loop_has_looked_and_wakes_it_once_a_second(queue: QueueStore) -> None:
    live, loop, now, _ = live_board(queue)
    assert live.board().looked_at < 0
    loop.look(NOW)
    live.refresh()
    assert live.board().looked_at == NOW
    for _ in range(3):
        live.wake()
    assert loop.num_wakes == 1
    now[0] += WAKE_S
    live.wake()
    assert loop.num_wakes == 2


def test_devices_have_what_runs_on_them(queue: QueueStore) -> None:
    live, _, now, _ = live_board(queue)
    item, _ = queue.submit(dataclasses.replace(submission("one"), demand=demand()), now=NOW)
    generation = queue.take_over(process(), now=NOW)
    queue.book(item.id, place("gpu-0"), launch="a", generation=generation, now=NOW)
    now[0] += MEASURE_S
    live.refresh()
    assert live.board().devices[0].booked == ((item.id, 1),)


def item(number: int, name: str = "study", command: str = "tune", owner: str = "ada") -> Item:
    return Item(
        id=number,
        name=name,
        owner=owner,
        arguments=Arguments(command=command),
        state=ItemState.RUNNING,
        submitted_at=0.0,
        queued_at=0.0,
    )


def test_a_trial_that_starts_is_measured_or_ends_is_an_event() -> None:
    states: dict[str, Any] = {"study": {0: ("running", None)}}
    watch = TrialWatch(lambda names: {name: dict(states[name]) for name in names})
    assert list(watch.look([item(7), item(8, "model", "train")])) == []  # what was there before
    states["study"] = {0: ("running", 1.5), 1: ("waiting", None)}
    told = list(watch.look([item(7)]))
    assert [(owner, data["trial"], data["state"], data["value"]) for owner, data in told] == [
        ("ada", 0, "running", 1.5),
        ("ada", 1, "waiting", None),
    ]
    states["study"] = {0: ("failed", float("inf")), 1: ("waiting", None)}
    [(_, data)] = watch.look([item(7)])
    assert (data["item"], data["state"], data["value"]) == (7, "failed", None)
    assert list(watch.look([item(7)])) == []


def test_many_studies_have_their_turns() -> None:
    asked: list[list[str]] = []

    def read(names: Collection[str]) -> dict[str, Any]:
        asked.append(list(names))
        return {}

    watch = TrialWatch(read)
    items = [item(number, f"study-{number:04d}") for number in range(MAX_STUDIES + 50)]
    for _ in range(2):
        list(watch.look(items))
    assert [len(names) for names in asked] == [MAX_STUDIES, MAX_STUDIES]
    assert len({name for names in asked for name in names}) == len(items)
