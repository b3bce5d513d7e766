"""Who waits for a device is served in order of arrival, and says for whom it waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import lock_descriptor

from autosft.profiles.errors import UserError
from autosft.profiles.hardware import lease_queue, leases
from autosft.profiles.hardware.leases import Leases, default_folder
from tests.profiles.hardware.test_leases import GIB, GPU, acquire

WAITER = """
import sys, time
from pathlib import Path
from autosft.profiles.hardware.leases import Leases
leases, arrived_at = Leases(Path(sys.argv[1])), time.time() - float(sys.argv[3])
size, num_bytes = 24 * 2**30, int(float(sys.argv[2]) * 2**30)
while True:
    lease = leases.acquire(
        "GPU-5e4f0c1a", num_bytes, total_bytes=size, free_bytes=size, study="large", trial=7,
        arrived_at=arrived_at,
    )
    print("no" if lease is None else "yes", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def waiter(folder: Path, gib: float, *, for_s: float) -> Iterator[subprocess.Popen[str]]:
    """Another process that has asked for a lease for some time; a line of input makes it ask again."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITER, str(folder), str(gib), str(for_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ask_again(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return answer(process)


def test_a_large_trial_does_not_starve_beside_a_study_of_small_ones(tmp_path: Path) -> None:
    mine = Leases(tmp_path)
    first, second = acquire(mine, 10), acquire(mine, 10)
    assert first is not None
    assert second is not None
    with waiter(tmp_path, 20, for_s=60) as large:
        assert answer(large) == "no"
        first.release()
        now = time.time()
        assert acquire(mine, 10, arrived_at=now) is None, "whoever came first is served first"
        [ahead] = mine.ahead(GPU, arrived_at=now)
        words = lease_queue.describe_ahead([ahead])
        assert words.startswith(f"Study 'large' (process {large.pid}) has waited longer, since ")
        assert acquire(mine, 10, arrived_at=now - 3600) is not None, "nor does it come before its elders"
    assert acquire(mine, 4) is not None, "the dead wait for nothing"


def test_a_waiter_is_served_once_there_is_room(tmp_path: Path) -> None:
    mine = Leases(tmp_path)
    first = acquire(mine, 10)
    assert first is not None
    with waiter(tmp_path, 20, for_s=60) as large:
        assert answer(large) == "no"
        first.release()
        assert ask_again(large) == "yes"
        assert mine.ahead(GPU, arrived_at=time.time()) == []
        assert list(tmp_path.rglob("*.waiting")) == []
        assert acquire(mine, 3) is not None


@pytest.mark.parametrize(
    ("wanted_gib", "later_s", "held_up"),
    [(20, 0.0, True), (30, 0.0, False), (20, 3600.0, False)],
    ids=["wants what we hold", "wants more than we could give", "has stopped asking"],
)
def test_a_waiter_holds_up_others_only_where_they_can_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted_gib: float, later_s: float, held_up: bool
) -> None:
    mine = Leases(tmp_path)
    first = acquire(mine, 10)
    assert first is not None
    with waiter(tmp_path, wanted_gib, for_s=60) as large:
        assert answer(large) == "no"
        now = time.time() + later_s
        monkeypatch.setattr(leases.time, "time", lambda: now)
        assert (acquire(mine, 2) is None) == held_up


OTHER_VERSIONS = {
    "a later version's": {"num_bytes": 20 * GIB, "study": "later", "pid": 1, "trial": 2, "tier": "gold"},
    "without a field": {"num_bytes": 20 * GIB},
    "of other types": {"num_bytes": 20 * GIB, "ends_at": "tomorrow", "pid": None, "trial": -3},
}


@contextmanager
def held_file(folder: Path, name: str, content: bytes) -> Iterator[None]:
    """A file as a live process of another version keeps it."""
    folder.mkdir(parents=True)
    file = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
    assert lock_descriptor(file, blocking=False)
    os.write(file, content)
    try:
        yield
    finally:
        os.close(file)


@pytest.mark.parametrize("name", OTHER_VERSIONS)
def test_a_lease_of_another_version_is_counted(tmp_path: Path, name: str) -> None:
    with held_file(tmp_path / GPU, "x.lease", json.dumps(OTHER_VERSIONS[name]).encode()):
        [held] = Leases(tmp_path).held(GPU)
        assert held.num_bytes == 20 * GIB
        assert leases.describe_leases([held], now=0.0)
        assert acquire(Leases(tmp_path), 5) is None


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"num_bytes": "9"}', b"[" * 9999], ids=repr)
@pytest.mark.parametrize("suffix", [".lease", ".waiting"])
def test_what_cannot_be_read_stops_nobody(tmp_path: Path, content: bytes, suffix: str) -> None:
    with held_file(tmp_path / GPU, f"x{suffix}", content):
        assert acquire(Leases(tmp_path), 20) is not None


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="users")
@pytest.mark.parametrize("obstacle", ["a file", "a link", "another user's"])
def test_a_folder_of_that_name_that_is_not_ours_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    shared = (tmp_path / "tmp", tmp_path / "var")
    for base in shared:
        base.mkdir()
    monkeypatch.setattr(leases, "_SHARED", shared)
    name = f"autosft-leases-{os.getuid()}"
    assert default_folder() == shared[0] / name
    target = tmp_path / "somebody's"
    target.mkdir()
    if obstacle == "a file":
        (shared[0] / name).touch()
    elif obstacle == "a link":
        (shared[0] / name).symlink_to(target)
    elif os.getuid() == 0:
        (shared[0] / name).mkdir()
        os.chown(shared[0] / name, 65534, 65534)
    else:
        pytest.skip("needs root")
    assert default_folder() == shared[1] / name
    with pytest.raises(UserError, match="cannot be stored"):
        Leases(shared[0] / name).held(GPU)
    assert list(target.iterdir()) == []
    assert acquire(Leases(), 1) is not None
    assert (shared[1] / name).stat().st_mode & 0o777 == 0o700
