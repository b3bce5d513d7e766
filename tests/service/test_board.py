"""A picture travels as what has changed since the last one."""

from __future__ import annotations

import pickle

from hypothesis import given
from hypothesis import strategies as st

from autosft.service.board import Board, DeviceUse, applied, difference
from autosft.service.values import ItemState, Reason
from tests.service.examples import device, item

ITEMS = st.builds(
    item,
    st.integers(1, 6),
    state=st.sampled_from([ItemState.WAITING, ItemState.RUNNING, ItemState.DONE]),
    progress=st.sampled_from([0.0, 0.5]),
)


@st.composite
def boards(draw: st.DrawFn) -> Board:
    items = tuple(draw(st.lists(ITEMS, unique_by=lambda one: one.id, max_size=6)))
    waiting = [one.id for one in items if one.is_queued]
    times = st.sampled_from([None, 1.0, 2.0])
    texts = {number: Reason(text="full", starts_at=draw(times)) for number in waiting if draw(st.booleans())}
    return Board(
        at=draw(st.floats(0, 10)),
        looked_at=draw(st.floats(0, 10)),
        items=items,
        reasons=texts,
        devices=tuple(DeviceUse(device=device(n)) for n in range(draw(st.integers(0, 2)))),
        is_draining=draw(st.booleans()),
    )


@given(boards(), boards())
def test_a_change_applied_is_the_next_picture(before: Board, after: Board) -> None:
    change = pickle.loads(pickle.dumps(difference(before, after)))
    found = applied(before, change)
    assert found == after
    assert found.places() == after.places()


@given(boards(), boards())
def test_what_has_not_changed_is_neither_sent_nor_made_anew(before: Board, after: Board) -> None:
    change = difference(before, after)
    known = {one.id: one for one in before.items}
    assert all(known.get(one.id) != one for one in change.items)
    kept = [one for one in applied(before, change).items if known.get(one.id) == one]
    assert all(one is known[one.id] for one in kept)
    same = difference(after, after)
    assert (same.items, same.order, dict(same.reasons), same.devices) == ((), None, {}, None)
