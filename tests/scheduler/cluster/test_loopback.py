"""Without an IPv4 loopback a study says so at once, in place of waiting for Ray for minutes."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from autosft.profiles.errors import UserError
from autosft.scheduler.cluster import ray_cluster
from autosft.scheduler.cluster.loopback import require_loopback

WITHOUT = ("unshare", "--net")


def can_unshare() -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    return subprocess.run([*WITHOUT, "true"], check=False, capture_output=True).returncode == 0


def test_a_loopback_is_found() -> None:
    require_loopback()


@pytest.mark.skipif(not can_unshare(), reason="needs the right to make a network namespace")
def test_a_missing_loopback_is_said() -> None:
    code = "from autosft.scheduler.cluster.loopback import require_loopback; require_loopback()"
    done = subprocess.run(
        [*WITHOUT, sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert "127.0.0.1 does not answer on this machine" in done.stderr
    assert "ip link set lo up" in done.stderr


def test_it_is_asked_before_ray_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UserError("no loopback")

    monkeypatch.setattr(ray_cluster, "require_loopback", missing)
    monkeypatch.setattr(ray_cluster, "WarmServer", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(UserError, match="no loopback"), ray_cluster.start_local():
        pass
