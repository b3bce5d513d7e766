"""What sharing a GPU is taken to cost, before anything was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autosft.profiles.hardware.device import DeviceKind
from autosft.scheduler.decide.sharing import (
    MPS_OVERHEAD,
    TIME_SLICING_OVERHEAD,
    assumed_overhead,
    at_most_at_once,
    pays,
    slowdown,
    threads_each,
    trials_on_cores,
)
from autosft.scheduler.setup.facts import is_mps_on
from tests.scheduler.devices import gpu


def test_mps_is_on_where_its_control_pipe_is(tmp_path: Path) -> None:
    environment = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    assert not is_mps_on(environment)
    (tmp_path / "control").touch()
    assert is_mps_on(environment)


@pytest.mark.parametrize(
    ("kind", "is_on", "expect"),
    [
        (DeviceKind.CUDA, False, TIME_SLICING_OVERHEAD),
        (DeviceKind.CUDA, True, MPS_OVERHEAD),
        (DeviceKind.CPU, True, 1.0),  # trials have cores of their own
    ],
)
def test_sharing_costs_less_under_mps(kind: DeviceKind, is_on: bool, expect: float) -> None:
    assert assumed_overhead(replace(gpu(), kind=kind), is_mps_on=is_on) == expect


def test_under_mps_a_trial_pays_that_does_not_with_time_slicing() -> None:
    assert pays(0.6, 2, 0.38, MPS_OVERHEAD)
    assert slowdown(0.98, 3, MPS_OVERHEAD) == 1.0
    assert slowdown(0.98, 3, TIME_SLICING_OVERHEAD) > 1.07


CORES = [
    ("memory for all", 8, 20, 7, (7, 1)),
    ("memory for two", 8, 2, 7, (2, 4)),
    ("memory for one", 8, 1, 7, (1, 8)),
    ("not quite for one", 8, 0, 7, (1, 8)),
    ("few trials are asked for", 8, 20, 1, (1, 8)),
    ("one core", 1, 20, 7, (1, 1)),
]


@pytest.mark.parametrize(
    ("num_cores", "by_memory", "at_most", "expected"), [c[1:] for c in CORES], ids=[c[0] for c in CORES]
)
def test_cores_are_shared_out(
    num_cores: int, by_memory: int, at_most: int, expected: tuple[int, int]
) -> None:
    number = trials_on_cores(num_cores, by_memory=by_memory, at_most=at_most)
    assert (number, threads_each(num_cores, number)) == expected


def test_a_search_keeps_its_rounds() -> None:
    assert at_most_at_once(1) == 1
    assert at_most_at_once(12) == 4
    assert at_most_at_once() == 7
