"""What a driver is started with: the command that its user gave, and the devices that it was given."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from autosft.profiles.hardware.leases import LeaseInfo
from autosft.service.decide.outcomes import Ended, outcome
from autosft.service.devices import device_from
from autosft.service.drivers.command import driver_command
from autosft.service.values import Arguments, ItemState
from tests.scheduler.devices import gpu
from tests.service.examples import GIB, device, item, runs

S = ItemState

TUNE = Arguments(command="tune", flags=(("--study", "-x"), ("--no-prune", ""), ("--trials", "3")))
EVALUATE = Arguments(command="evaluate", flags=(("--metric", "eval_loss"),), positional=("runs/a", "-b"))
TRAIN = Arguments(command="train", positional=("best.yaml",))
HALF = replace(device(0), uuid="CPU-host-0of2")
WHOLE = replace(device(0), uuid="CPU-host")
GPUS = [replace(device(n), uuid=f"GPU-{n}") for n in range(2)]
CASES = [
    (TUNE, GPUS, "auto", ["tune", "--study=-x", "--no-prune", "--trials=3"], "GPU-0,GPU-1"),
    (EVALUATE, GPUS[1:], "auto", ["evaluate", "--metric=eval_loss", "--", "runs/a", "-b"], "GPU-1"),
    (TRAIN, [HALF], "2xcpu", ["train", "--hardware=2xcpu", "--gpus=CPU-host-0of2", "--", "best.yaml"], None),
    (TRAIN, [WHOLE], "cpu", ["train", "--hardware=cpu", "--", "best.yaml"], None),
    (EVALUATE, [WHOLE], "cpu", ["evaluate", "--metric=eval_loss", "--", "runs/a", "-b"], None),
    (
        TUNE,
        [replace(one, node="host/3f2a11") for one in GPUS],  # another node's
        "auto",
        [*TUNE.to_argv(), "--hardware=auto", "--address=head:6379", "--gpus=GPU-0,GPU-1"],
        None,
    ),
]


@pytest.mark.parametrize(("arguments", "devices", "hardware", "argv", "visible"), CASES)
def test_the_command_of_a_driver(arguments, devices, hardware, argv, visible) -> None:
    made = driver_command(item(1, arguments=arguments), devices, hardware=hardware, address="head:6379")
    assert list(made.argv) == [sys.executable, "-P", "-m", "autosft", *argv]
    assert made.environment.get("CUDA_VISIBLE_DEVICES") == visible


RUNNING = runs(1, 0)
STOPPING = replace(RUNNING, state=S.STOPPING, then=S.PREEMPTED, note="gives way")
CANCELLED = replace(STOPPING, then=S.CANCELLED)
ENDS = [
    ("done", RUNNING, 0, S.DONE, False),
    ("failed", RUNNING, 1, S.FAILED, False),
    ("a wrong request", RUNNING, 2, S.FAILED, False),
    ("stopped from outside", RUNNING, 130, S.HELD, False),
    ("killed", RUNNING, 137, S.PREEMPTED, True),
    ("killed, without a shell", RUNNING, -9, S.PREEMPTED, True),
    ("its surroundings failed", RUNNING, 75, S.PREEMPTED, True),
    ("its surroundings failed for the third time", replace(RUNNING, num_lost=2), 75, S.FAILED, False),
    ("its surroundings failed while it stopped", STOPPING, 75, S.PREEMPTED, False),
    ("vanished", RUNNING, None, S.PREEMPTED, True),
    ("vanished for the third time", replace(RUNNING, num_lost=2), None, S.FAILED, False),
    ("stopped as asked", STOPPING, 130, S.PREEMPTED, False),
    ("killed while it stopped", STOPPING, 143, S.PREEMPTED, False),
    ("vanished while it stopped", STOPPING, None, S.PREEMPTED, False),
    ("done before it stopped", STOPPING, 0, S.DONE, False),
    ("failed before it stopped", STOPPING, 1, S.FAILED, False),
    ("cancelled", CANCELLED, 130, S.CANCELLED, False),
    ("failed while it was cancelled", CANCELLED, 1, S.CANCELLED, False),
    ("done although it was cancelled", CANCELLED, 0, S.DONE, False),
]


@pytest.mark.parametrize(
    ("name", "before", "code", "state", "was_lost"), ENDS, ids=[case[0] for case in ENDS]
)
def test_what_an_end_means(name, before, code, state, was_lost) -> None:
    found = outcome(before, Ended(exit_code=code, message="error: it"))
    assert (found.state, found.was_lost) == (state, was_lost)
    if found.state is S.FAILED:
        assert "error: it" in found.note
    if found.state is S.PREEMPTED and before.then is not None:
        assert found.note == "gives way"


def test_a_driver_that_was_ended_without_a_word_is_lost_not_failed() -> None:
    """As Ray does to a process whose cluster's head stays away."""
    found = outcome(RUNNING, Ended(exit_code=1, message="some line", has_no_word=True))
    assert (found.state, found.was_lost) == (S.PREEMPTED, True)
    assert "exit code 1" in found.note


def lease(gib: float, pid: int) -> LeaseInfo:
    return LeaseInfo(
        device_uuid="GPU-0",
        num_bytes=int(gib * GIB),
        num_cores=0,
        pid=pid,
        study="s",
        trial=0,
        ends_at=None,
        outside_bytes=0,
    )


@pytest.mark.parametrize(
    ("free_gib", "leases", "usable_gib"),
    [
        (24, [], 24),
        (20, [], 20),  # other programs
        (14, [lease(10, 7)], 24),  # ours uses all that it has leased
        (20, [lease(10, 7)], 24),  # and has not begun to
        (4, [lease(10, 7)], 14),  # beside another program
        (14, [lease(10, 8)], 14),  # another autosft process
        (24, [lease(10, 8)], 14),  # which has not begun
    ],
)
def test_usable_is_what_others_leave(free_gib: float, leases: list[LeaseInfo], usable_gib: float) -> None:
    profile = replace(gpu(0), total_bytes=24 * GIB, free_bytes=int(free_gib * GIB))
    assert device_from(profile, leases, own_pids={7}).usable_bytes == usable_gib * GIB
