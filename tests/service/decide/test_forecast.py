"""When items are predicted to start and end, and why each of them waits."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from autosft.service.decide.forecast import forecast
from autosft.service.decide.place_items import decide
from autosft.service.decide.reasons import clock, reasons
from autosft.service.decide.situation import OVERRUN, Situation
from autosft.service.values import Device, Item, ItemState, Usage, User
from tests.service.examples import NOW, device, item, runs, situation, way

S = ItemState


def at(seconds: float) -> str:
    return clock(NOW + seconds, NOW)


@dataclass(frozen=True)
class Case:
    name: str
    items: list[Item]
    #: of the last item: why it waits, and from now to when it starts
    text: str
    starts_s: float | None
    devices: int | list[Device] = 1
    more: dict[str, Any] = field(default_factory=dict)


TWO_NODES = [device(0, node="a"), device(1, node="b")]
CASES = [
    Case("it starts", [item(1)], "starts now", 0.0),
    Case(
        "a device is busy",
        [runs(1, 0, until=NOW + 600), item(2, way(gib=75))],
        f"needs 75.0 GiB; GPU 0 has 70.0 GiB free until about {at(600)}, when item 1 (study-1) ends",
        600.0,
    ),
    Case(
        "one is stopping for it",
        [runs(1, 0, state=S.STOPPING, then=S.PREEMPTED), item(2)],
        f"needs 10.0 GiB, not beside others; GPU 0 is in use until about {at(120)}, "
        "when item 1 (study-1) stops to make room",
        120.0,
    ),
    Case(
        "others are before it",
        [runs(1, 0, until=NOW + 600), item(2, way(seconds=900.0)), item(3)],
        f"needs 10.0 GiB; 1 item before it; follows item 2 (study-2) on GPU 0 at about {at(1500)}",
        1500.0,
    ),
    Case(
        "a gang on a node of several",
        [runs(1, 0, until=NOW + 600), runs(2, 1, until=NOW + 900), item(3, way(2))],
        "needs 2 devices with 10.0 GiB each, not beside others; GPU 0 of a and 1 more are in use "
        f"until about {at(900)}, when item 2 (study-2) ends",
        900.0,
        TWO_NODES,
    ),
    Case("not planned", [item(1, demand=None)], "its memory and time are not predicted yet", None),
    Case("a time", [item(1, not_before=NOW + 60)], f"starts at {at(60)} at the earliest, as asked", 60.0),
    Case(
        "another item",
        [runs(1, 0, until=NOW + 600), item(2, after=(1,))],
        f"follows item 1 (study-1), predicted to end at about {at(600)}",
        600.0,
        2,
    ),
    Case(
        "several others",
        [runs(1, 0, until=NOW + 600), runs(2, 1, until=NOW + 900), item(3, after=(1, 2))],
        f"follows item 1 (study-1) and 1 more, predicted to end at about {at(900)}",
        900.0,
        2,
    ),
    Case(
        "one that failed", [item(2, after=(1,))], "follows item 1, which is failed", None,
        more={"ended": {1: S.FAILED}},
    ),
    Case(
        "too busy",
        [
            runs(1, 0, until=NOW + 600, demand=item(1, way(load=1.0, may_share=True)).demand),
            item(2, way(load=1.0, may_share=True)),
        ],
        "needs 10.0 GiB; GPU 0 has the memory, but is too busy to share "
        f"until about {at(600)}, when item 1 (study-1) ends",
        600.0,
    ),
    Case(
        "kept for a gang",
        [runs(1, 0, until=NOW + 600), item(2, way(2, seconds=900.0)), item(3, way(seconds=601.0))],
        f"needs 10.0 GiB; GPU 1 is kept for item 2 (study-2) from about {at(600)} on, which this would delay",
        1500.0,
        2,
    ),
    Case(
        "no such device",
        [item(1, way(kind="H100"))],
        "needs 10.0 GiB of a kind (H100) that is not here now",
        None,
    ),
    Case(
        "too few devices", [item(1, way(4))], "needs 4 devices with 10.0 GiB each; there are 2 now", None, 2
    ),
    Case(
        "others' memory",
        [item(1, way(gib=30))],
        "needs 30.0 GiB; other programs leave 20.0 GiB at most now",
        None,
        [device(0, 20)],
    ),
    Case(
        "a quota of devices",
        [runs(1, 0, until=NOW + 600), item(2)],
        f"ann may have 1 device at once; item 1 (study-1) ends at about {at(600)}",
        600.0,
        2,
        more={"users": {"ann": User(name="ann", max_devices=1)}},
    ),
    Case(
        "a quota of hours",
        [item(1, way(seconds=7200.0))],
        "ann has used 9.0 of 10 device-hours a week; with what runs and this it would be more",
        None,
        more={
            "users": {"ann": User(name="ann", device_hours_a_week=10.0)},
            "usage": {"ann": Usage(week_s=9 * 3600.0)},
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_why_it_waits_and_when_it_starts(case: Case) -> None:
    now = situation(case.items, case.devices, **case.more)
    found = dict(reasons(now, forecast(now)))[case.items[-1].id]
    starts_s = None if found.starts_at is None else found.starts_at - NOW
    assert (found.text, starts_s) == (case.text, case.starts_s)


def test_the_date_is_said_where_it_is_another_day() -> None:
    assert len(at(0)) == len("14:20")
    assert at(3 * 86400.0)[:10].count("-") == 2


def test_reasons_are_in_the_order_of_the_queue_and_complete() -> None:
    items = [item(1, demand=None), item(2), item(3, priority=1), item(4, state=S.HELD), runs(5, 0)]
    now = situation(items)
    assert [item_id for item_id, _ in reasons(now, forecast(now))] == [3, 2, 1]


@pytest.mark.parametrize(("late_s", "left_s"), [(-600.0, 600.0), (1.0, 60.1), (9000.0, OVERRUN * 9600.0)])
def test_an_item_that_runs_longer_than_predicted_is_expected_to_go_on(late_s: float, left_s: float) -> None:
    one = runs(1, 0, until=NOW - late_s, started_at=NOW - max(600.0, late_s + 600.0))
    assert forecast(situation([one])).running[1] - NOW == pytest.approx(left_s)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_forecast_happens_where_all_goes_as_predicted(seed: int) -> None:
    """Played on by decisions alone, every item starts when its forecast said."""
    rng = random.Random(seed)
    items = [
        item(
            n,
            way(rng.choice([1, 1, 2, 4]), rng.uniform(4, 70), float(rng.randint(600, 9000))),
            priority=rng.choice([0, 0, 1]),
        )
        for n in range(30)
    ]
    now = situation(items, 8)
    said = forecast(now).planned
    assert played(now) == {item_id: planned.starts_at for item_id, planned in said.items()}
    assert len(said) == 30


def played(now: Situation) -> dict[int, float]:
    """Return when items start as decisions are made at each end."""
    starts: dict[int, float] = {}
    while now.items:
        found = decide(now)
        by_id = {start.item: start for start in found.starts}
        starts.update(dict.fromkeys(by_id, now.now))
        items = tuple(
            replace(i, state=S.RUNNING, place=s.place, started_at=now.now, ends_at=s.ends_at)
            if (s := by_id.get(i.id))
            else i
            for i in now.items
        )
        now = replace(now, items=items)
        if found.is_whole and not found.preempts:
            then = min(i.ends_at for i in items if i.ends_at is not None)
            left = tuple(i for i in items if i.ends_at is None or i.ends_at > then + 1.0)
            now = replace(now, now=then, items=left)
        elif found.preempts:  # a forecast does not know of them: it is without
            raise AssertionError("an item of a higher priority came first")
    return starts
