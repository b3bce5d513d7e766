"""Which devices a study uses, with which method, and how many trials share one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from autosft.profiles.hardware.device import DeviceKind, DeviceProfile
from autosft.profiles.recipe import ByteRange, Method
from autosft.scheduler.decide.planner import DoesNotFitError
from autosft.scheduler.decide.self_measuring import Measuring
from autosft.scheduler.setup.device_selection import (
    DeviceChoice,
    Participants,
    choose_participants,
    share_device,
)
from autosft.studies.request import TuneRequest
from autosft.studies.trial import ExecutionPlan
from tests.plans import memory_estimate
from tests.scheduler.devices import GIB, gpu
from tests.studies.study_examples import PLAN
from tests.workers.small import settings

#: What the default configuration needs, on one device and on each of several.
NEEDS_GIB = {Method.FULL: 30, Method.SPARSE: 30, Method.LORA: 10}
#: What of that a way to hold what is trained needs.
SHARES_OF = {"exact": 1.0, "lean": 0.5, "leanest": 0.4}


def cards(*sizes_gib: int) -> list[DeviceProfile]:
    return [
        dataclasses.replace(gpu(index, free_bytes=gib * GIB), name=f"{gib} GB")
        for index, gib in enumerate(sizes_gib)
    ]


def basis_on(choice: DeviceChoice) -> int:
    """Return the bytes needed on each device; raises where the first has less."""
    need = int(NEEDS_GIB[choice.method] * GIB * SHARES_OF[choice.way.name]) // choice.devices_per_trial
    if need > choice.devices[0].free_bytes:
        raise DoesNotFitError(
            "does not fit",
            remedy=None,
            smallest=memory_estimate(),
            settings=settings(method=choice.method),
            device=choice.devices[0],
        )
    return need


def choose(sizes_gib: Sequence[int], **request: object) -> Participants[int]:
    return choose_participants(TuneRequest(**request), cards(*sizes_gib), basis_on)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    name: str
    sizes_gib: list[int]
    method: Method
    taking_part: list[int]
    num_devices: int = 1
    asked: str = "auto"
    at_most: int | None = None
    memory: str = "exact"
    held: str = "exact"


CASES = [
    Case("all large enough", [40, 80], Method.FULL, [40, 80]),
    Case("too small a card is left out", [80, 8, 40], Method.FULL, [40, 80]),
    Case("LoRA where full fits no card", [8, 12, 24], Method.LORA, [12, 24]),
    Case("full on four before LoRA on two", [8, 8, 8, 8], Method.FULL, [8, 8, 8, 8], num_devices=4),
    Case("two for what was asked for", [24, 24], Method.FULL, [24, 24], num_devices=2, asked="full"),
    Case("no more than allowed", [8, 8, 8, 8], Method.LORA, [8, 8, 8, 8], num_devices=2, at_most=2),
    Case("a gang is of one sort", [16, 24, 24], Method.FULL, [24, 24], num_devices=2, asked="full"),
    Case("lean as asked, though exact fits", [40], Method.FULL, [40], memory="lean", held="lean"),
    Case("exact where it fits", [40], Method.FULL, [40], memory="auto"),
    Case("the first way that fits", [24], Method.FULL, [24], memory="auto", held="lean"),
    Case("the last way that fits", [12], Method.FULL, [12], memory="auto", held="leanest"),
    Case("a lean way before more devices", [24, 24], Method.FULL, [24, 24], memory="auto", held="lean"),
    Case("full held leanly before LoRA", [12], Method.FULL, [12], memory="auto", held="leanest"),
    Case("LoRA where no way fits", [10], Method.LORA, [10], memory="auto", at_most=1),
    Case("sparse", [24], Method.SPARSE, [24], asked="sparse", memory="auto", held="lean"),
]


def test_what_is_guessed_to_fit_nowhere_is_tried_on_the_largest_device() -> None:
    def guessed(choice: DeviceChoice) -> int:
        return 7 if choice.measuring is Measuring.ANYWAY else basis_on(choice)

    chosen = choose_participants(TuneRequest(), cards(2, 4, 1), guessed)
    assert chosen.method is Method.LORA
    assert [device.free_bytes for device in chosen.devices] == [4 * GIB]
    assert len(chosen.left_out) == 2


def test_a_card_without_bf16_holds_nothing_leanly() -> None:
    old = [dataclasses.replace(card, supports_bf16=False) for card in cards(24)]
    chosen = choose_participants(TuneRequest(memory="auto"), old, basis_on)
    assert (chosen.method, chosen.way.name) == (Method.LORA, "exact")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_who_takes_part(case: Case) -> None:
    chosen = choose(case.sizes_gib, method=case.asked, max_gpus_per_trial=case.at_most, memory=case.memory)
    assert chosen.method is case.method
    assert chosen.way.name == case.held
    assert [device.free_bytes // GIB for device in chosen.devices] == case.taking_part
    assert chosen.devices_per_trial == case.num_devices
    assert len(chosen.devices) + len(chosen.left_out) == len(case.sizes_gib)


def test_what_fits_nowhere_is_refused() -> None:
    with pytest.raises(DoesNotFitError):
        choose([8], method="full")
    mig = [dataclasses.replace(card, is_mig=True) for card in cards(20, 20)]
    with pytest.raises(DoesNotFitError):
        choose_participants(TuneRequest(method="full"), mig, basis_on)


def plan_of(need_gib: float, share: float) -> ExecutionPlan:
    need = ByteRange(median_bytes=int(need_gib * GIB), upper_bytes=int(need_gib * GIB))
    estimate = dataclasses.replace(memory_estimate(), need=need, outside_bytes=0)
    return dataclasses.replace(PLAN, estimate=estimate, device_share=share, predicted_tokens_per_s=1e3)


@dataclass(frozen=True)
class Share:
    name: str
    expect: int
    share: float = 0.3
    need_gib: float = 4
    trials: int = 20
    num_devices: int = 1
    devices_per_trial: int = 1
    max_concurrent: int | None = None


SHARES = [
    Share("as many as keep it busy", 3),
    Share("one that keeps it busy alone", 1, share=1.0),
    Share("as many as fit", 2, need_gib=10),
    Share("the search keeps three rounds", 2, trials=6),
    Share("over all devices", 1, num_devices=8),
    Share("not with gangs", 1, devices_per_trial=2),
    Share("no more than asked for", 2, max_concurrent=2),
]


@pytest.mark.parametrize("case", SHARES, ids=lambda case: case.name)
def test_how_many_share_a_gpu(case: Share) -> None:
    def plan_within(device: DeviceProfile, budget_bytes: int) -> ExecutionPlan | None:
        fits = case.need_gib * GIB <= budget_bytes
        return plan_of(case.need_gib, case.share) if fits else None

    slots = share_device(
        gpu(free_bytes=24 * GIB),
        plan_within,
        request=TuneRequest(trials=case.trials, max_concurrent=case.max_concurrent),
        num_devices=case.num_devices,
        devices_per_trial=case.devices_per_trial,
    )
    assert slots.num_slots == case.expect


def test_a_cpu_has_a_trial_a_core_and_threads_for_each() -> None:
    cpu = dataclasses.replace(gpu(free_bytes=20 * GIB), kind=DeviceKind.CPU, num_cores=8)
    for need_gib, trials, expected in ((1, 99, (8, 1)), (5, 99, (3, 2)), (1, 6, (2, 4))):
        slots = share_device(
            cpu,
            lambda device, budget, need=need_gib: plan_of(need, 1.0),
            request=TuneRequest(trials=trials),
            num_devices=1,
        )
        assert (slots.num_slots, slots.num_threads) == expected
