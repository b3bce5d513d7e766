"""A cluster of unlike nodes: each gets what fits it, which Ray itself sees; one is killed, one joins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from autosft.profiles.hardware.discover import save_profile
from autosft.profiles.hardware.host import host_name
from autosft.profiles.hardware.known_devices import cluster_from_name
from autosft.scheduler.cluster import watchdog
from autosft.workers.runners.node import HARDWARE_VARIABLE
from tests.ray_nodes import ROOT, RayNodes, ray_nodes
from tests.scheduler.unlike_nodes import DOOMED, GIB, KILLED, NUM_TRIALS

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


DEVICES = ("GPU-small-0", "GPU-medium-0", "GPU-medium-1", DOOMED, "GPU-new-0")


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


def test_different_nodes_get_what_fits_them(cluster: RayNodes, tmp_path: Path) -> None:
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
    killed = ""
    for line in driver.stdout:
        said.append(json.loads(line))
        starts = {item["started"]: item for item in said if "started" in item}
        here = Counter(said[-1].get("seen", {}).values())
        shared = [start["node"] for start in starts.values() if DOOMED in start["uuids"]]
        if not killed and shared and here[shared[0]] == 2:
            killed = shared[0]
            (tmp_path / KILLED).touch()
            kill_raylet(cluster, killed)
            cluster.add({HARDWARE_VARIABLE: str(declare(tmp_path, "new", 80, 1))})
    assert driver.wait() == 0, (tmp_path / "stderr").read_text()[-3000:]
    assert killed, "two trials on the largest GPU were never seen at once"
    *_, nodes, finished = said
    assert finished == {"finished": NUM_TRIALS}
    assert Counter(nodes["nodes"].values()) == {"ALIVE": 3, "DEAD": 1}
    assert nodes["nodes"][killed] == "DEAD"

    on = {uuid: [start for start in starts.values() if uuid in start["uuids"]] for uuid in DEVICES}
    assert all(on.values()), "a device was not used"
    assert {item["micro_batch"] * item["data_parallel"] for item in on["GPU-small-0"]} < {1, 2, 4}
    for gang in (*on["GPU-medium-0"], *on["GPU-medium-1"]):
        assert gang["uuids"] == ["GPU-medium-0", "GPU-medium-1"]
        assert gang["data_parallel"] == 2
    assert {item["data_parallel"] for item in (*on[DOOMED], *on["GPU-new-0"])} == {1}

    looks = [item for item in said if "seen" in item]
    for look in looks:
        for name, node in look["seen"].items():
            assert node == starts[name]["node"], f"Ray sees {name} on another node than is recorded"
        name = look["reported"]
        assert name in look["seen"] or starts[name]["node"] == killed, f"Ray does not see {name}"
        for node, number in Counter(look["seen"].values()).items():
            names = [name for name, its in look["seen"].items() if its == node]
            gangs = [name for name in names if starts[name]["data_parallel"] == 2]
            assert number == 1 or len(gangs) < 1, "a gang shares its devices"
    seen = {name for look in looks for name in look["seen"]}
    for uuid in DEVICES:
        assert seen & {item["started"] for item in on[uuid]}, f"Ray never saw a trial on {uuid}"
