"""A forecast has in it what is likely to be submitted, and that items on one device slow each other down."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from autosft.service.decide.expected import FIRST_ID, MAX_EXPECTED, MAX_PERIOD_S, MIN_PERIOD_S, expected
from autosft.service.decide.forecast import forecast
from autosft.service.decide.reasons import reasons
from autosft.service.values import Item, ItemState, Usage
from tests.service.examples import NOW, demand, device, item, runs, situation, way

HOUR_S = 3600.0


@dataclass(frozen=True)
class Case:
    name: str
    came_h: tuple[float, ...]  # hours ago
    since_h: float  # ago
    comes_h: tuple[float, ...]  # from now


CASES = [
    Case("nothing", (), 0.0, ()),
    Case("six hours come again, twice", (5.0, 1.0), 100.0, (1.0, 5.0, 7.0, 11.0)),
    Case("what came earlier does not", (7.0, 1.0), 100.0, (5.0, 11.0)),
    Case("a young queue has a shorter period", (2.0, 1.5), 2.5, (0.5, 1.0, 3.0, 3.5)),
    Case("but an hour at least", (0.25,), 0.25, (0.75, 1.75)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_came_comes_again(case: Case) -> None:
    came = [item(n, submitted_at=NOW - hours * HOUR_S) for n, hours in enumerate(case.came_h, start=1)]
    found = expected(came, since=NOW - case.since_h * HOUR_S, now=NOW)
    assert [pytest.approx((one.not_before - NOW) / HOUR_S) for one in found] == list(case.comes_h)  # type: ignore[operator]
    assert [one.id for one in found] == [FIRST_ID + number for number in range(len(found))]
    assert expected(came[::-1], since=NOW - case.since_h * HOUR_S, now=NOW) == found
    assert MIN_PERIOD_S < MAX_PERIOD_S


def test_it_comes_as_it_was_submitted_but_not_what_fits_nowhere_or_is_not_planned() -> None:
    ran = runs(1, 0, submitted_at=NOW - 60, progress=0.5)
    refused = item(2, submitted_at=NOW - 60, state=ItemState.REFUSED)
    unplanned = item(3, submitted_at=NOW - 60, demand=None)
    again, _ = expected([ran, refused, unplanned], since=0.0, now=NOW)
    assert (again.state, again.place, again.progress) == (ItemState.WAITING, None, 0.0)
    assert (again.owner, again.demand) == (ran.owner, ran.demand)


def test_there_is_a_bound() -> None:
    came = [item(n, submitted_at=NOW - n) for n in range(MAX_EXPECTED)]
    assert len(expected(came, since=0.0, now=NOW)) == MAX_EXPECTED


def soon(number: int, seconds: float, owner: str) -> Item:
    return item(FIRST_ID + number, way(seconds=1000.0), owner=owner, not_before=NOW + seconds)


def test_what_another_user_will_submit_goes_before_where_they_have_used_less() -> None:
    """ann's second waits for bob's, who is expected to submit one before her first has ended."""
    runs_now = runs(1, 0, until=NOW + 600)
    mine = [item(2, way(seconds=1000.0)), item(3, way(seconds=1000.0))]
    used = {"ann": Usage(decayed_s=10_000.0)}
    seen = situation([runs_now, *mine], usage=used)
    starts = forecast(seen).planned
    assert [starts[n].starts_at - NOW for n in (2, 3)] == [600.0, 1600.0]
    found = forecast(seen, [soon(1, 700.0, "bob")])
    assert [found.planned[n].starts_at - NOW for n in (2, 3)] == [600.0, 2600.0]
    assert set(found.planned) == {2, 3}
    assert found.order == (2, 3)
    assert not found.blocks
    [_, (_, why)] = reasons(seen, found)
    assert "follows what is likely to be submitted until then on GPU 0" in why.text


def test_what_ann_will_submit_herself_comes_behind_what_she_has() -> None:
    seen = situation([runs(1, 0, until=NOW + 600), item(2, way(seconds=1000.0))])
    found = forecast(seen, [soon(1, 10.0, "ann"), soon(2, 20.0, "ann")])
    assert found.planned[2].starts_at == NOW + 600


def test_an_item_whose_time_comes_takes_its_place_in_the_queue() -> None:
    later = item(2, way(seconds=1000.0), not_before=NOW + 60, priority=1)
    seen = situation([runs(1, 0, until=NOW + 600), later, item(3, way(seconds=1000.0))])
    planned = forecast(seen).planned
    assert [planned[n].starts_at - NOW for n in (2, 3)] == [600.0, 1600.0]


def test_items_on_one_device_slow_each_other_down_as_long_as_both_are_there() -> None:
    """Loads of 0.6 make 1.2: with an overhead of 1, each takes 1.2 times as long beside the other."""
    shared = way(gib=10, seconds=1000.0, load=0.6, may_share=True)
    short = way(gib=10, seconds=600.0, load=0.6, may_share=True)
    there = runs(1, 0, until=NOW + 1000, demand=demand(shared))
    planned = forecast(situation([there, item(2, short)], [device(0)]))
    assert planned.planned[2].starts_at == NOW
    assert planned.planned[2].ends_at == pytest.approx(NOW + 720)
    # 720 s of the first at 1/1.2 are 600; the other 400 alone.
    assert planned.running[1] == pytest.approx(NOW + 1120)
