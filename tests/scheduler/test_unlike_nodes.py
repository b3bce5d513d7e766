"""A cluster of unlike nodes: each gets what fits it; one is killed in the middle, one joins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from autosft.profiles.devices import cluster_from_name
from autosft.profiles.hardware import save_profile
from autosft.profiles.host import host_name
from autosft.scheduler import watchdog
from autosft.workers.node import HARDWARE_VARIABLE
from tests.ray_nodes import ROOT, RayNodes, ray_nodes
from tests.scheduler.unlike_nodes import GIB, NUM_TRIALS

pytestmark = [
    pytest.mark.ray,
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def declare(folder: Path, name: str, gib: int, number: int) -> Path:
    """Write a profile of so many GPUs, to stand for a node's own."""
    made = cluster_from_name("A100-80GB")
    devices = tuple(
        replace(
            made.devices[0],
            uuid=f"GPU-{name}-{index}",
            index=index,
            name=f"GPU of {gib} GiB",
            node=host_name(),
            total_bytes=gib * GIB,
            free_bytes=gib * GIB,
            is_assumed=False,
        )
        for index in range(number)
    )
    path = folder / f"{name}.json"
    save_profile(replace(made, devices=devices), path)
    return path


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RayNodes]:
    with ray_nodes() as nodes:
        nodes.start_head(dashboard=True)
        for name, gib, number in (("medium", 24, 2), ("large", 80, 1)):
            nodes.add({HARDWARE_VARIABLE: str(declare(tmp_path, name, gib, number))})
        yield nodes


def kill_raylet(nodes: RayNodes, node: str) -> None:
    for pid in watchdog.members(str(nodes.folder), spare=frozenset({os.getpid()})):
        process = psutil.Process(pid)
        if process.name() == "raylet" and node in " ".join(process.cmdline()):
            process.kill()


def test_unlike_nodes_get_what_fits_them(cluster: RayNodes, tmp_path: Path) -> None:
    small = declare(tmp_path, "small", 8, 1)
    driver = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.scheduler.unlike_nodes"),
            *(cluster.address, cluster.dashboard, str(small), str(tmp_path)),
        ],
        env={**os.environ, **cluster.environment, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr").open("w"),
        text=True,
    )
    assert driver.stdout is not None
    said: list[dict[str, Any]] = []
    has_killed = False
    for line in driver.stdout:
        said.append(json.loads(line))
        fact = said[-1]
        if (
            not has_killed
            and sum("ended" in one for one in said) >= 4
            and "GPU-large-0" in str(fact.get("uuids"))
        ):
            kill_raylet(cluster, fact["nodes"]["GPU-large-0"])
            has_killed = True
            new = declare(tmp_path, "new", 80, 1)
            cluster.add({HARDWARE_VARIABLE: str(new)})
    assert driver.wait() == 0, (tmp_path / "stderr").read_text()[-3000:]
    assert has_killed
    assert said[-1] == {"finished": NUM_TRIALS}

    starts = [one for one in said if "trial" in one]
    by_device = {uuid: [one for one in starts if uuid in one["uuids"]] for uuid in known(starts)}
    assert {"GPU-small-0", "GPU-medium-0", "GPU-medium-1", "GPU-large-0", "GPU-new-0"} <= set(by_device)
    assert {one["data_parallel"] for one in by_device["GPU-large-0"]} == {1}


def known(starts: list[dict[str, Any]]) -> set[str]:
    return {uuid for one in starts for uuid in one["uuids"]}
