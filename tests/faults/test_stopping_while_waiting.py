"""A study that waits for a device that others hold stops cleanly, though Ray has taken the signals over."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from autosft.cli import STOPPED
from autosft.profiles.hardware.discover import profile_hardware
from autosft.profiles.hardware.leases import Leases
from autosft.studies.store.records import open_records
from tests.faults.driver import STUDY

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_study_that_waits_for_a_lease_stops_at_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    [device] = profile_hardware("cpu").devices
    leases, url = Leases(tmp_path / "leases"), f"sqlite:///{tmp_path / 'studies.db'}"
    cores = {"num_cores": device.num_cores, "total_cores": device.num_cores}
    held = leases.acquire(
        device.uuid,
        1 << 20,
        total_bytes=device.total_bytes,
        free_bytes=device.free_bytes,
        study="another",
        trial=0,
        **cores,
    )
    assert held is not None
    given = json.dumps({"url": url, "folder": str(tmp_path), "num_trials": 2})
    log = tmp_path / "log"
    with held, log.open("wb") as errors:
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.driver", given], stdout=errors, stderr=errors
        )
        try:
            wait_for(lambda: has_joined_ray(driver.pid), driver, log)
            wait_for(lambda: bool(leases.ahead(device.uuid, arrived_at=math.inf)), driver, log)
            driver.send_signal(number)
            assert driver.wait(timeout=120) == STOPPED, log.read_text()
        finally:
            driver.kill()
            driver.wait()
    assert "SIGTERM received" not in log.read_text(), "Ray's own handler has run"
    with closing(open_records(url)) as records:
        study = records.read_study(STUDY)
        assert study.num_finished() == 0
        assert not study.attempts()
    assert not [process for process in psutil.process_iter() if is_child_of(process, driver.pid)]


def has_joined_ray(pid: int) -> bool:
    """Whether Ray's C++ code, which replaces signal handlers, runs in a process: by a thread of its own."""
    names = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:  # it has ended
            continue
    return any(name.startswith("worker.io") for name in names)


def is_child_of(process: psutil.Process, pid: int) -> bool:
    try:
        return process.ppid() == pid and process.pid != os.getpid()
    except psutil.Error:
        return False


def wait_for(is_so: Callable[[], bool], driver: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while not is_so():
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
