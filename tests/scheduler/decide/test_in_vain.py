"""What is skipped because something smaller has found no room would have found none: in random worlds."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from autosft.scheduler.decide.occupancy import DeviceState, Option, Resident, by_kind, device_state
from autosft.scheduler.decide.placement import Filling, InVain, Placement, Request
from tests.scheduler.devices import GIB, gpu

KINDS = {"large": 80, "small": 24}


class Forgetful(InVain):
    """Skips nothing."""

    def covers(self, option: Option, kind: object) -> bool:
        return False


def world(rng: random.Random) -> list[DeviceState]:
    states = []
    for index in range(rng.randint(1, 12)):
        kind = rng.choice(list(KINDS))
        many = rng.choice([0, 0, 0, 1, 1, 2])
        is_alone = many == 1 and rng.random() < 0.4
        residents = tuple(
            Resident(
                num_bytes=rng.randint(1, KINDS[kind] // 4) * GIB,
                load=rng.choice([0.1, 0.3, 0.6, 1.0]),
                ends_at=float(rng.randint(1, 400)),
                is_alone=is_alone,
                trial=1000 + index,
            )
            for _ in range(many)
        )
        states.append(
            device_state(
                device=replace(gpu(index), node=f"node{rng.randint(0, 2)}"),
                kind=kind,
                usable_bytes=(KINDS[kind] - rng.choice([0, 0, 10, 15])) * GIB,
                max_trials=rng.choice([3, 4]),
                overhead=rng.choice([1.0, 1.1]),
                residents=residents,
            )
        )
    return states


def request(rng: random.Random, trial: int) -> Request:
    options = []
    for _ in range(rng.choice([1, 1, 2])):
        kind = rng.choice(list(KINDS))
        options.append(
            Option(
                kind=kind,
                num_devices=rng.choice([1, 1, 2, 3, 4]),
                num_bytes=rng.randint(1, KINDS[kind]) * GIB,
                load=rng.choice([0.1, 0.3, 0.6, 1.0]),
                run_s=float(rng.randint(10, 600)),
                is_alone=rng.random() < 0.2,
            )
        )
    return Request(trial=trial, options=tuple(options))


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_skipped_that_would_start(seed: int) -> None:
    rng = random.Random(seed)
    num_skipped = 0
    for _ in range(60):
        devices = world(rng)
        requests = [request(rng, trial) for trial in range(25)]
        found: list[list[Placement | None]] = []
        for in_vain in (InVain(), Forgetful()):
            filling = Filling(by_kind(devices), now=0.0)
            filling._in_vain = in_vain
            found.append([filling.offer(one) for one in requests])
            if type(in_vain) is InVain:
                kinds = filling.kinds
                num_skipped += sum(
                    in_vain.covers(option, kinds[option.kind])
                    for one in requests
                    for option in one.options
                    if option.kind in kinds
                )
        assert found[0] == found[1]
    assert num_skipped > 1000
