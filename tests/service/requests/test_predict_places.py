"""On a cluster only studies leave the server's machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import ClusterProfile
from autosft.profiles.hardware.discover import save_profile
from autosft.service.devices import device_kind
from autosft.service.requests.predict import here_of, kinds_of, predict
from autosft.service.values import Arguments, is_elsewhere
from tests.scheduler.devices import gpu

HERE = replace(gpu(0), uuid="GPU-here", node="host")
THERE = replace(gpu(1), uuid="GPU-there", node="other/3f2a11")


def cluster(*devices: object) -> ClusterProfile:
    return ClusterProfile(devices=devices, driver_version=None, cuda_version=None)  # type: ignore[arg-type]


def test_devices_here_and_there_are_two_kinds() -> None:
    assert [is_elsewhere(device.node) for device in (HERE, THERE)] == [False, True]
    assert device_kind(THERE) == f"{device_kind(HERE)}, other nodes"
    assert [devices for _, devices in kinds_of(cluster(THERE, HERE))] == [(HERE,), (THERE,)]


def test_an_evaluation_stays_here(tmp_path: Path) -> None:
    evaluate = Arguments(command="evaluate", positional=("a",))
    save_profile(cluster(HERE, THERE), tmp_path / "both.json")
    found = predict(evaluate, str(tmp_path / "both.json"), "sqlite://")
    assert found.demand is not None
    assert [way.kind for way in found.demand.ways] == [device_kind(HERE)]
    save_profile(cluster(THERE), tmp_path / "there.json")
    assert (
        "Only studies (tune) run on the other nodes"
        in predict(evaluate, str(tmp_path / "there.json"), "sqlite://").refusal
    )
    with pytest.raises(UserError, match="hands out no device"):
        here_of(cluster(THERE))
