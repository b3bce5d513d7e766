"""Whatever fails around a study, and whenever: it ends exact, and the cause was said."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.strikes import KINDS, PIDS
from tests.faults.surroundings import MOMENTS


def can_mount() -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


CAN_BREAK_DISKS = Path("/dev/loop-control").exists() and all(map(shutil.which, ("mkfs.ext4", "e2fsck")))

pytestmark = [
    pytest.mark.skipif(not can_mount(), reason="needs the right to mount in a namespace of its own"),
    pytest.mark.timeout(300),
]

#: Of each kind one moment, for every run of the tests; all of them are run by `make faults`.
SAMPLE = [
    ("model moved", "start"),
    ("leases read-only", "start"),
    ("database locked for long", "start"),
    ("output read-only", "training"),
    ("output deleted", "between"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "moment"), SAMPLE)
def test_a_sample_of_failures_around_a_study(kind: str, moment: str, tmp_path: Path) -> None:
    hold(kind, moment, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_failures_around_a_study(kind: str, moment: str, tmp_path: Path) -> None:
    hold(kind, moment, tmp_path)


def hold(kind: str, moment: str, tmp_path: Path) -> None:
    """Break something around a study at one moment, and check what comes of it."""
    if kind == "no more processes" and not os.access(PIDS, os.W_OK):
        pytest.skip(f"needs a control group that counts processes ({PIDS})")
    expected = KINDS[kind]
    if expected.breaking is not None and not CAN_BREAK_DISKS:
        pytest.skip("needs mkfs.ext4, e2fsck and a loop device, for a disk that turns read-only while in use")
    told = run(kind, moment, tmp_path)
    said = "\n".join(filter(None, [told["error"], *told["said"], told["log"]]))
    # Nothing has to be said of what the study outlived because it may, or because it hit nobody.
    may_be_silent = expected.ends_run is None or not told["has_victim"]
    assert re.search(expected.says, said) or (may_be_silent and told["error"] is None), said
    assert told["second"] is None, told["second"]
    if expected.ends_run is not False and told["error"] is not None:
        assert re.search(expected.says, told["error"]), told["error"]
    if expected.ends_run is False:
        assert told["error"] is None, told["error"]


def run(kind: str, moment: str, tmp_path: Path) -> dict[str, Any]:
    given = json.dumps({"kind": kind, "moment": moment, "folder": str(tmp_path / "place")})
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-m", "tests.faults.surroundings", given],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told | {"log": done.stderr}
