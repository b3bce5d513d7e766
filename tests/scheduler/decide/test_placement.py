from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosft.scheduler.decide.occupancy import DeviceState, Option, Resident, device_state
from autosft.scheduler.decide.placement import (
    Placement,
    Request,
    cluster_s,
    place,
)
from autosft.scheduler.decide.sharing import best_number, measured_overhead, pays, work_rate
from tests.scheduler.devices import GIB, gpu

NOW = 100.0


def state(
    index: int,
    free_gib: float = 24.0,
    *on_it: Resident,
    node: str = "a",
    kind: str = "gpu",
    link: float | None = None,
    max_trials: int = 4,
    overhead: float = 1.1,
) -> DeviceState:
    return device_state(
        device=replace(gpu(index), node=node, link_bytes_per_s=link),
        kind=kind,
        usable_bytes=int(free_gib * GIB),
        max_trials=max_trials,
        overhead=overhead,
        residents=on_it,
    )


def runs(gib: float = 4.0, *, load: float = 0.9, until: float = 200.0, gang: bool = False) -> Resident:
    return Resident(num_bytes=int(gib * GIB), load=load, ends_at=until, is_alone=gang)


def wants(
    gib: float = 6.0,
    *,
    trial: int = 1,
    num: int = 1,
    load: float = 0.9,
    run_s: float = 50.0,
    kind: str = "gpu",
    priority: int = 0,
    more: tuple[Option, ...] = (),
) -> Request:
    option = Option(kind=kind, num_devices=num, num_bytes=int(gib * GIB), load=load, run_s=run_s)
    return Request(trial=trial, options=(option, *more), priority=priority)


@dataclass(frozen=True)
class Case:
    name: str
    devices: list[DeviceState]
    requests: list[Request]
    expect: tuple[int, list[int]] | None  # trial and indices of its devices


BUSY = [state(0, 24, runs(until=200.0)), state(1, 24, runs(until=300.0))]
SLOW = Option(kind="slow", num_devices=1, num_bytes=6 * GIB, load=0.9, run_s=500.0)

CASES = [
    Case("tightest fit wins", [state(0, 24), state(1, 8)], [wants()], (1, [1])),
    Case("tightest fit wins, other order", [state(1, 8), state(0, 24)], [wants()], (1, [1])),
    Case("lowest id among equals", [state(1, 8), state(0, 8)], [wants()], (1, [0])),
    Case("exactly enough is enough", [state(0, 6), state(1, 4)], [wants()], (1, [0])),
    Case("too little everywhere waits", [state(0, 5), state(1, 4)], [wants()], None),
    Case("what others were promised is not free", [state(0, 9, runs(4, load=0.1))], [wants(load=0.1)], None),
    Case("small trials share", [state(0, 24, runs(load=0.4))], [wants(load=0.4)], (1, [0])),
    Case(
        "an empty device before a shared one",
        [state(0, 24, runs(load=0.1)), state(1, 24)],
        [wants()],
        (1, [1]),
    ),
    Case("trials that fill a device do not share", [state(0, 24, runs(load=0.9))], [wants(load=0.9)], None),
    Case("no more than may share", [state(0, 24, runs(load=0.1), max_trials=1)], [wants(load=0.1)], None),
    Case("nobody joins a gang", [state(0, 24, runs(load=0.1, gang=True))], [wants(load=0.1)], None),
    Case("a gang gets all at once", [state(0), state(1), state(2)], [wants(num=2)], (1, [0, 1])),
    Case("or none", [state(0), state(1, 24, runs(load=0.1))], [wants(num=2)], None),
    Case(
        "on the node with the better links",
        [state(i, node="ab"[i // 2], link=[1e10, 1e10, 3e11, 3e11][i]) for i in range(4)],
        [wants(num=2)],
        (1, [2, 3]),
    ),
    Case(
        "the slowest link counts",
        [state(i, node="ab"[i // 2], link=[2e10, 2e10, 1e10, 3e11][i]) for i in range(4)],
        [wants(num=2)],
        (1, [0, 1]),
    ),
    Case(
        "large nodes are kept for large gangs",
        [state(i, node="aaabb"[i]) for i in range(5)],
        [wants(num=2)],
        (1, [3, 4]),
    ),
    Case(
        "over nodes where none is large enough",
        [state(i, node="aab"[i]) for i in range(3)],
        [wants(num=3)],
        (1, [0, 1, 2]),
    ),
    Case(
        "not over nodes where one will be free",
        [state(0, node="a"), state(1, node="b"), state(2, 24, runs(), node="b")],
        [wants(num=2)],
        None,
    ),
    Case("the longest first", [state(0)], [wants(trial=1, run_s=10), wants(trial=2, run_s=20)], (2, [0])),
    Case(
        "by priority before that",
        [state(0)],
        [wants(trial=1, run_s=10), wants(trial=2, priority=1)],
        (1, [0]),
    ),
    Case("the lowest number among equals", [state(0)], [wants(trial=4), wants(trial=3)], (3, [0])),
    Case(
        "a short one passes a waiting gang",
        [state(0), BUSY[1]],
        [wants(trial=1, num=2, run_s=900), wants(trial=2, run_s=200.0)],
        (2, [0]),
    ),
    Case(
        "a long one would delay it",
        [state(0), BUSY[1]],
        [wants(trial=1, num=2, run_s=900), wants(trial=2, run_s=201.0)],
        None,
    ),
    Case(
        "unless it takes another device",
        [state(0), BUSY[1], state(2, 7)],
        [wants(8, trial=1, num=2, run_s=900), wants(trial=2, run_s=999.0)],
        (2, [2]),
    ),
    Case(
        "what fits nowhere holds nobody up",
        [state(0)],
        [wants(48, trial=1, run_s=900), wants(trial=2, run_s=999.0)],
        (2, [0]),
    ),
    Case("a gang of devices with exactly enough", [state(0, 6), state(1, 6)], [wants(num=2)], (1, [0, 1])),
    Case(
        "a gang may end just as a reservation begins",
        [state(0), state(1), state(2, 24, runs(until=200.0))],
        [wants(trial=1, num=3), wants(trial=2, num=2, run_s=100.0)],
        (2, [0, 1]),
    ),
    Case(
        "the longest by its fastest option first",
        [state(0)],
        [wants(trial=1, run_s=50, more=(SLOW,)), wants(trial=2, run_s=60)],
        (2, [0]),
    ),
    Case("the faster kind", [state(0), state(1, kind="slow")], [wants(more=(SLOW,))], (1, [0])),
    Case(
        "the slower one where that is free", [BUSY[0], state(1, kind="slow")], [wants(more=(SLOW,))], (1, [1])
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_place(case: Case) -> None:
    found = place(case.requests, case.devices, now=NOW)
    got = None if found is None else (found.trial, [int(uuid[4:]) for uuid in found.device_uuids])
    assert got == case.expect
    assert place(case.requests[::-1], case.devices[::-1], now=NOW) == found


def can_ever_start(request: Request, devices: Sequence[DeviceState]) -> bool:
    return place([request], [device.with_residents(()) for device in devices], now=NOW) is not None


# Properties

loads = st.sampled_from([0.2, 0.5, 0.9, 1.0])
options = st.builds(
    Option,
    kind=st.sampled_from(["gpu", "slow"]),
    num_devices=st.sampled_from([1, 1, 1, 2, 3]),
    num_bytes=st.integers(1, 24).map(lambda gib: gib * GIB),
    load=loads,
    run_s=st.integers(1, 99).map(float),
)
requests = st.lists(st.lists(options, min_size=1, max_size=3).map(tuple), max_size=12).map(
    lambda many: [Request(trial=i, options=one, priority=i % 2) for i, one in enumerate(many)]
)
devices = st.lists(
    st.tuples(st.sampled_from([8, 24]), st.sampled_from("ab"), st.sampled_from(["gpu", "slow"])),
    min_size=1,
    max_size=6,
).map(lambda many: [state(i, gib, node=node, kind=kind) for i, (gib, node, kind) in enumerate(many)])


def placed(request: Request, found: Placement, devices: Sequence[DeviceState]) -> list[DeviceState]:
    """Return the devices with a placement on them."""
    option = request.options[found.option]
    resident = Resident(
        num_bytes=option.num_bytes, load=option.load, ends_at=found.ends_at, is_alone=option.num_devices > 1
    )
    return [
        device.with_residents((*device.residents, resident))
        if device.device.uuid in found.device_uuids
        else device
        for device in devices
    ]


@pytest.mark.parametrize(
    ("fast_until", "work_ends_at", "waits"),
    [(120.0, 150.0, True), (120.0, 700.0, False), (1000.0, 150.0, False)],
    ids=["it would end last", "others end later", "the faster one is busy for longer"],
)
def test_the_last_trial_waits_for_a_faster_device_where_it_ends_sooner_there(
    fast_until: float, work_ends_at: float, waits: bool
) -> None:
    devices = [state(0, 24, runs(until=fast_until)), state(1, kind="slow")]
    placed = place([wants(more=(SLOW,))], devices, now=NOW, work_ends_at=work_ends_at)
    assert (placed is None) == waits
    only_slow = place([wants(kind="slow", run_s=500)], devices, now=NOW, work_ends_at=150.0)
    assert only_slow is not None, "there is nothing faster to wait for"


def test_a_share_counts_as_its_load_and_a_gang_as_whole_devices() -> None:
    option = Option(kind="gpu", num_devices=1, num_bytes=GIB, load=0.5, run_s=10.0)
    assert cluster_s([option], {"gpu": 2}) == pytest.approx(2.5)
    assert cluster_s([option._replace(num_devices=2)], {"gpu": 2}) == pytest.approx(10.0)


@pytest.mark.slow
@given(requests=requests, devices=devices, shuffler=st.randoms(use_true_random=False))
def test_nothing_is_booked_twice_and_the_order_of_inputs_does_not_matter(
    requests: list[Request], devices: list[DeviceState], shuffler: random.Random
) -> None:
    waiting = {request.trial: request for request in requests}
    while True:
        mixed_requests, mixed_devices = list(waiting.values()), list(devices)
        shuffler.shuffle(mixed_requests)
        shuffler.shuffle(mixed_devices)
        found = place(waiting.values(), devices, now=NOW)
        assert found == place(mixed_requests, mixed_devices, now=NOW)
        if found is None:
            break
        request = waiting.pop(found.trial)
        option = request.options[found.option]
        assert len(set(found.device_uuids)) == option.num_devices
        devices = placed(request, found, devices)
        for device in devices:
            assert device.free_bytes >= 0
            assert len(device.residents) <= device.max_trials
            assert len(device.residents) == 1 or not any(resident.is_alone for resident in device.residents)
            if device.device.uuid in found.device_uuids:
                assert device.kind == option.kind
    if waiting and all(not device.residents for device in devices):
        assert not any(can_ever_start(item, devices) for item in waiting.values())


@given(requests=requests, devices=devices, passing=options)
def test_passing_a_waiting_trial_never_delays_it(
    requests: list[Request], devices: list[DeviceState], passing: Option
) -> None:
    """Play on to the first trial's start, without and with one that passes it: it starts no later."""
    first = Request(trial=100, options=(passing._replace(num_devices=2, run_s=50.0),), priority=-1)
    while (found := place(requests, devices, now=NOW)) is not None:
        request = next(request for request in requests if request.trial == found.trial)
        requests = [item for item in requests if item is not request]
        devices = placed(request, found, devices)
    alone = starts_at(first, [], devices)
    assert starts_at(first, requests, devices) <= alone


def starts_at(first: Request, others: Sequence[Request], devices: Sequence[DeviceState]) -> float:
    """Return when a trial starts if nobody but `others` comes beside it and all end as predicted."""
    now, waiting, here = NOW, [first, *others], list(devices)
    while True:
        while (found := place(waiting, here, now=now)) is not None:
            if found.trial == first.trial:
                return now
            request = next(item for item in waiting if item.trial == found.trial)
            waiting = [item for item in waiting if item is not request]
            here = placed(request, found, here)
        ends = [resident.ends_at for item in here for resident in item.residents]
        if not ends:
            return float("inf")
        now = min(ends)
        here = [item.with_residents(tuple(r for r in item.residents if r.ends_at > now)) for item in here]


# Sharing


@given(load=st.floats(0.05, 1.0), more=st.floats(0.05, 1.0), num=st.integers(1, 6), overhead=st.floats(1, 2))
def test_sharing_pays_only_where_nobody_is_slowed_or_more_gets_done(
    load: float, more: float, num: int, overhead: float
) -> None:
    if pays(load, num, more, overhead):
        slows = overhead * (load + more) > 1
        gains = work_rate(load + more, num + 1, overhead) > work_rate(load, num, overhead)
        assert gains or not slows
    assert pays(0.0, 0, more, overhead)


NUMBERS = [
    ("each fills the device", lambda k: (1000.0, 1.0), 1),
    ("each leaves most of it idle", lambda k: (1000.0, 0.25), 4),
    ("no memory for a third", lambda k: (1000.0, 0.25) if k < 3 else None, 2),
    ("less memory makes them slow", lambda k: (1000.0 / k, 0.25), 1),
]


@pytest.mark.parametrize(("name", "fits", "expect"), NUMBERS, ids=[number[0] for number in NUMBERS])
def test_how_many_share_a_gpu(name: str, fits: object, expect: int) -> None:
    assert best_number(fits, 1.1) == expect  # type: ignore[arg-type]


def test_an_overhead_is_believed_once_two_have_measured_it() -> None:
    assert measured_overhead(1.1, []) == 1.1
    assert measured_overhead(1.1, [3.0]) == 1.1
    assert measured_overhead(1.1, [3.0, 1.4, 2.0]) == 2.0
    assert measured_overhead(1.1, [0.5, 0.7]) == 1.0
