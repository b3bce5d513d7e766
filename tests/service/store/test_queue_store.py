"""The queue over SQLite and PostgreSQL: every transition once, whoever asks and whenever it is killed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

from autosft.profiles.errors import UserError
from autosft.service.store.queue_store import ItemMovedError, QueueStore, open_queue
from autosft.service.store.server_lease import ServedElsewhereError
from autosft.service.values import OPEN_STATES, Item, ItemState, Pace, Usage
from tests.service.examples import demand, place, process, submission, way

S = ItemState


def running(queue: QueueStore, name: str = "study", *, now: float = 0.0) -> Item:
    item, _ = queue.submit(submission(name, demand=demand()), now=now)
    generation = queue.take_over(process(), now=now)
    launch = f"launch-{item.id}"
    queue.book(item.id, place(), launch=launch, generation=generation, now=now)
    claimed = queue.claim(item.id, launch=launch, process=process(7), now=now)
    assert claimed is not None
    return claimed


def test_an_item_comes_back_as_it_was_submitted(queue: QueueStore) -> None:
    first, _ = queue.submit(submission("a"), now=1.0)
    asked = submission(
        "ü" * 200,
        demand=demand(way(2, may_share=True), way(4)),
        priority=-3,
        not_before=7.5,
        after=(first.id,),
        may_share=False,
        cloned_from=first.id,
    )
    item, is_new = queue.submit(asked, now=2.0)
    assert is_new
    assert item == queue.get(item.id)
    for name in ("name", "owner", "arguments", "demand", "priority", "not_before", "after", "may_share"):
        assert getattr(item, name) == getattr(asked, name), name
    assert (item.state, item.submitted_at, item.queued_at) == (S.WAITING, 2.0, 2.0)
    assert queue.items() == (first, item)
    assert queue.items(limit=1) == (item,)
    assert queue.items(owner="bob") == ()


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, S.WAITING),
        ({"is_held": True}, S.HELD),
        ({"refusal": "needs 100 GiB"}, S.REFUSED),
        ({"refusal": "x", "is_held": True}, S.REFUSED),
    ],
)
def test_where_a_submission_starts(queue: QueueStore, changes: dict[str, object], state: ItemState) -> None:
    item, _ = queue.submit(submission(**changes), now=0.0)
    assert item.state is state
    assert [event.state for event in queue.events()] == [state]


def test_a_key_submits_once(queue: QueueStore) -> None:
    first, is_new = queue.submit(submission(), key="k", now=0.0)
    assert is_new
    queue.cancel(first.id, now=1.0)
    again, is_new = queue.submit(submission(), key="k", now=2.0)
    assert (again.id, again.state, is_new) == (first.id, S.CANCELLED, False)
    assert queue.submit(submission(owner="bob"), key="k", now=3.0)[1]  # another user's key
    assert queue.submit(submission(), now=3.0)[1]
    with pytest.raises(UserError, match="another submission"):
        queue.submit(submission("other"), key="k", now=4.0)
    for key in ("", "k" * 201):
        with pytest.raises(UserError, match="1 to 200"):
            queue.submit(submission(), key=key, now=4.0)


def test_a_key_submits_once_from_many_processes(url: str) -> None:
    stores = [open_queue(url) for _ in range(4)]
    got: list[tuple[int, bool]] = []

    def submit(store: QueueStore) -> None:
        item, is_new = store.submit(submission(), key="k", now=0.0)
        got.append((item.id, is_new))

    threads = [threading.Thread(target=submit, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({item_id for item_id, _ in got}) == 1
    assert sorted(is_new for _, is_new in got) == [False, False, False, True]
    for store in stores:
        store.close()


def test_an_item_waits_only_for_what_exists(queue: QueueStore) -> None:
    with pytest.raises(UserError, match="no item 99"):
        queue.submit(submission(after=(99,)), now=0.0)
    with pytest.raises(UserError, match="no item 99"):
        queue.get(99)
    assert queue.items() == ()


def test_a_start_runs_once(queue: QueueStore) -> None:
    item, _ = queue.submit(submission(demand=demand()), now=0.0)
    generation = queue.take_over(process(), now=0.0)
    booked = queue.book(item.id, place(), launch="one", generation=generation, now=1.0)
    assert (booked.state, booked.num_starts, booked.place) == (S.STARTING, 1, place())
    with pytest.raises(ItemMovedError, match="is starting"):
        queue.book(item.id, place(), launch="two", generation=generation, now=1.0)
    assert queue.claim(item.id, launch="two", process=process(2), now=2.0) is None
    claimed = queue.claim(item.id, launch="one", process=process(2), now=2.0)
    assert claimed is not None
    assert (claimed.state, claimed.process) == (S.RUNNING, process(2))
    assert queue.claim(item.id, launch="one", process=process(3), now=3.0) is None
    assert queue.withdraw(item.id, launch="one", now=3.0) is None  # it runs


def test_a_withdrawn_start_is_not_claimed(queue: QueueStore) -> None:
    item, _ = queue.submit(submission(demand=demand()), now=0.0)
    generation = queue.take_over(process(), now=0.0)
    queue.book(item.id, place(), launch="one", generation=generation, now=1.0)
    back = queue.withdraw(item.id, launch="one", now=5.0)
    assert back is not None
    assert (back.state, back.place, back.queued_at) == (S.WAITING, None, 5.0)
    assert queue.claim(item.id, launch="one", process=process(2), now=6.0) is None
    assert queue.get(item.id).state is S.WAITING


def test_a_start_that_is_cancelled_before_it_is_claimed_never_runs(queue: QueueStore) -> None:
    item, _ = queue.submit(submission(demand=demand()), now=0.0)
    generation = queue.take_over(process(), now=0.0)
    queue.book(item.id, place(), launch="one", generation=generation, now=1.0)
    queue.cancel(item.id, now=2.0)
    assert queue.claim(item.id, launch="one", process=process(2), now=3.0) is None
    gone = queue.withdraw(item.id, launch="one", now=4.0)
    assert gone is not None
    assert (gone.state, gone.ended_at) == (S.CANCELLED, 4.0)


def test_a_replaced_server_starts_nothing(queue: QueueStore) -> None:
    item, _ = queue.submit(submission(demand=demand()), now=0.0)
    old = queue.take_over(process(1), now=0.0)
    with pytest.raises(ServedElsewhereError, match="process 1 on host-1"):
        queue.take_over(process(2), now=30.0)
    queue.heartbeat(old, url="http://127.0.0.1:8080", now=40.0)
    with pytest.raises(ServedElsewhereError, match="127"):
        queue.take_over(process(2), now=99.0)
    new = queue.take_over(process(2), now=101.0)
    assert new != old
    for write in (
        lambda: queue.book(item.id, place(), launch="one", generation=old, now=102.0),
        lambda: queue.heartbeat(old, now=102.0),
    ):
        with pytest.raises(ServedElsewhereError, match="taken over"):
            write()
    queue.leave(old, now=103.0)  # harmless
    queue.heartbeat(new, now=103.0)
    queue.leave(new, now=104.0)
    served = queue.server()
    assert served is not None
    assert (served.process, served.ended_at) == (process(2), 104.0)
    assert queue.take_over(process(3), now=104.0) == new + 1


STOPS: list[tuple[str, Callable[[QueueStore, Item], object], ItemState]] = [
    ("preempted", lambda q, i: q.stop(i.id, launch=i.launch, then=S.PREEMPTED, now=10.0), S.PREEMPTED),
    ("held", lambda q, i: q.hold(i.id, now=10.0), S.HELD),
    ("cancelled", lambda q, i: q.cancel(i.id, now=10.0), S.CANCELLED),
]


@pytest.mark.parametrize(("name", "ask", "then"), STOPS, ids=[case[0] for case in STOPS])
def test_a_running_item_stops_first(
    queue: QueueStore, name: str, ask: Callable[[QueueStore, Item], object], then: ItemState
) -> None:
    item = running(queue)
    ask(queue, item)
    stopping = queue.get(item.id)
    assert (stopping.state, stopping.then, stopping.place) == (S.STOPPING, then, place())
    ended = queue.end(item.id, launch=item.launch, to=then, now=20.0)
    assert ended is not None
    assert (ended.state, ended.place, ended.process, ended.then) == (then, None, None, None)
    assert queue.get(item.id).device_s == 20.0
    assert queue.end(item.id, launch=item.launch, to=S.FAILED, now=21.0) is None  # recorded once


def test_a_cancellation_stays_one(queue: QueueStore) -> None:
    item = running(queue)
    queue.cancel(item.id, now=1.0)
    queue.hold(item.id, now=2.0)
    queue.stop(item.id, launch=item.launch, then=S.PREEMPTED, now=3.0)
    assert queue.get(item.id).then is S.CANCELLED


def test_what_was_held_goes_on(queue: QueueStore) -> None:
    item = running(queue)
    queue.hold(item.id, now=1.0)
    queue.end(item.id, launch=item.launch, to=S.HELD, now=2.0)
    assert queue.release(item.id, now=9.0).state is S.PREEMPTED
    assert queue.get(item.id).queued_at == 9.0
    fresh, _ = queue.submit(submission(is_held=True), now=0.0)
    assert queue.release(fresh.id, now=9.0).state is S.WAITING
    with pytest.raises(ItemMovedError, match="has to be held"):
        queue.release(fresh.id, now=9.0)


ENDED = [S.DONE, S.FAILED, S.CANCELLED]
REQUESTS: dict[str, Callable[[QueueStore, int], object]] = {
    "hold": lambda q, i: q.hold(i, now=9.0),
    "release": lambda q, i: q.release(i, now=9.0),
    "cancel": lambda q, i: q.cancel(i, now=9.0),
    "priority": lambda q, i: q.set_priority(i, 3, now=9.0),
    "move": lambda q, i: q.move(i, ahead=(), now=9.0),
    "plan": lambda q, i: q.plan(i, demand(), now=9.0),
}


@pytest.mark.parametrize("state", ENDED, ids=lambda state: state.value)
@pytest.mark.parametrize("request_name", REQUESTS)
def test_what_has_ended_stays_so(queue: QueueStore, request_name: str, state: ItemState) -> None:
    item = running(queue)
    queue.end(item.id, launch=item.launch, to=state, now=1.0)
    before = queue.get(item.id)
    with pytest.raises(ItemMovedError, match=f"is {state.value}"):
        REQUESTS[request_name](queue, item.id)
    assert queue.get(item.id) == before


def test_time_is_charged_once(queue: QueueStore) -> None:
    item = running(queue, now=0.0)
    queue.charge([item.id], now=10.0)
    queue.charge([item.id], now=10.0)
    queue.charge([item.id], now=5.0)  # the clock was set back
    queue.end(item.id, launch=item.launch, to=S.DONE, now=30.0)
    queue.charge([item.id], now=90.0)
    assert queue.get(item.id).device_s == 30.0
    assert queue.usage(now=30.0, half_life_s=3600.0)["ann"].week_s == 30.0


def test_usage_is_halved_with_each_half_life(queue: QueueStore) -> None:
    item = running(queue, now=1800.0)
    queue.charge([item.id], now=1800.0 + 100.0)
    for age_s, share in ((0, 1.0), (3600, 0.5), (7200, 0.25)):
        used = queue.usage(now=1800.0 + age_s, half_life_s=3600.0)["ann"]
        assert used.decayed_s == pytest.approx(100.0 * share)
    assert queue.usage(now=9 * 86400.0, half_life_s=3600.0).get("ann", Usage()).week_s == 0.0


def test_a_place_in_the_queue_is_given(queue: QueueStore) -> None:
    ids = [queue.submit(submission(str(number)), now=0.0)[0].id for number in range(5)]
    queue.move(ids[4], ahead=(), now=1.0)
    queue.move(ids[3], ahead=(ids[4], ids[0]), now=2.0)
    ranks = {item.id: item.rank for item in queue.items()}
    assert [ranks[i] for i in ids] == [1, None, None, 2, 0]
    queue.move(ids[0], ahead=(), now=3.0)
    ranks = {item.id: item.rank for item in queue.items()}
    assert [ranks[i] for i in ids] == [0, None, None, 2, 1]


def test_a_claim_whose_answer_was_lost_is_made_again(queue: QueueStore) -> None:
    item, _ = queue.submit(submission(demand=demand()), now=1.0)
    server = queue.take_over(process(9), now=1.0)
    queue.book(item.id, place(), launch="one", generation=server, now=2.0)
    first = queue.claim(item.id, launch="one", process=process(1), now=3.0)
    assert first is not None
    assert queue.claim(item.id, launch="one", process=process(1), now=4.0) == first
    assert queue.claim(item.id, launch="one", process=process(2), now=4.0) is None


def test_progress_clears_the_count_of_lost_drivers(queue: QueueStore) -> None:
    item = running(queue)
    queue.end(item.id, launch=item.launch, to=S.PREEMPTED, was_lost=True, now=1.0)
    assert queue.get(item.id).num_lost == 1
    generation = queue.take_over(process(), now=2.0)
    queue.book(item.id, place(), launch="two", generation=generation, now=2.0)
    queue.claim(item.id, launch="two", process=process(8), now=2.0)
    queue.report([pace(item, item.launch, 0.9)], now=3.0)  # the first start's
    assert (queue.get(item.id).progress, queue.get(item.id).num_lost) == (0.0, 1)
    queue.report([pace(item, "two", 0.5, 99.0)], now=3.0)
    found = queue.get(item.id)
    assert (found.progress, found.ends_at, found.num_lost) == (0.5, 99.0, 0)


@pytest.fixture
def num_statements(queue: QueueStore) -> Iterator[list[str]]:
    said: list[str] = []

    def see(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        said.append(statement)

    sa.event.listen(queue._engine, "before_cursor_execute", see)
    yield said
    sa.event.remove(queue._engine, "before_cursor_execute", see)


def test_many_running_items_cost_a_few_statements(queue: QueueStore, num_statements: list[str]) -> None:
    """The writer's lock is held meanwhile, and submissions wait for it."""
    items = [running(queue, str(number)) for number in range(20)]
    num_statements.clear()
    queue.charge([item.id for item in items], now=50.0)
    queue.report([pace(item, item.launch, 0.5) for item in items], now=50.0)
    assert len([said for said in num_statements if not said.startswith("BEGIN")]) <= 6
    assert {(item.device_s, item.progress) for item in queue.items()} == {(50.0, 0.5)}
    assert queue.usage(now=50.0, half_life_s=1e9)["ann"].week_s == pytest.approx(20 * 50.0)


def pace(item: Item, launch: str, share: float, ends_at: float | None = None) -> Pace:
    return Pace(item=item.id, launch=launch, progress=share, ends_at=ends_at)


def test_events_tell_every_transition_in_order(queue: QueueStore) -> None:
    item = running(queue)
    queue.cancel(item.id, note="not needed", now=1.0)
    queue.end(item.id, launch=item.launch, to=S.CANCELLED, now=2.0)
    told = [(event.item, event.state) for event in queue.events()]
    assert told == [(item.id, s) for s in (S.WAITING, S.STARTING, S.RUNNING, S.STOPPING, S.CANCELLED)]
    cursor = queue.events()[2].id
    assert [event.state for event in queue.events(since=cursor)] == [S.STOPPING, S.CANCELLED]
    assert queue.events(item=item.id + 1) == ()
    assert queue.states([item.id, 99]) == {item.id: S.CANCELLED}
    assert queue.items(OPEN_STATES) == ()
