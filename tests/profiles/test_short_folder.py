"""Folders for Unix sockets are short however long the temporary folder is, and of this user alone."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.short_folder import MAX_SOCKET_BYTES, private_folder, short_base
from autosft.scheduler.cluster.run_folder import run_folder

LENGTHS = (24, 27, 30, 31, 60, 90)
#: What Ray makes below the folder that it is given; its session is named by the time and a process id.
RAYS = "session_2026-11-30_08-44-10_123456_4194304/sockets/plasma_store"


@pytest.fixture
def below_tmp() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as folder:
        yield folder


@pytest.mark.parametrize("length", LENGTHS)
def test_sockets_of_ray_and_ours_can_be_bound(
    length: int, below_tmp: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under Slurm: /scratch/local/job.1234567 and longer."""
    folder = Path(below_tmp) / ("x" * (length - len(below_tmp) - 1))
    folder.mkdir()
    assert len(str(folder)) == length
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with run_folder() as run_dir:
        for path in (run_dir / "ray" / RAYS, run_dir / "warm" / "warm.sock"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))


def test_a_short_temporary_folder_is_used(monkeypatch: pytest.MonkeyPatch, below_tmp: str) -> None:
    monkeypatch.setattr(tempfile, "tempdir", below_tmp)
    room_bytes = MAX_SOCKET_BYTES - len(below_tmp)
    assert short_base(room_bytes=room_bytes) == Path(below_tmp)
    assert short_base(room_bytes=room_bytes + 1) == Path("/tmp")
    with pytest.raises(UserError, match=f"at most {MAX_SOCKET_BYTES} bytes"):
        short_base(room_bytes=MAX_SOCKET_BYTES)


def test_the_folder_is_of_this_user_alone(monkeypatch: pytest.MonkeyPatch, below_tmp: str) -> None:
    monkeypatch.setattr(tempfile, "tempdir", below_tmp)
    opened = Path(below_tmp) / "open"
    opened.mkdir()
    opened.chmod(0o777)
    assert stat.S_IMODE(private_folder("open", room_bytes=9).stat().st_mode) == 0o700
    assert stat.S_IMODE(private_folder("new", room_bytes=9).stat().st_mode) == 0o700
    (Path(below_tmp) / "link").symlink_to(below_tmp)
    (Path(below_tmp) / "file").touch()
    for name in ("link", "file"):
        with pytest.raises((UserError, FileExistsError)):
            private_folder(name, room_bytes=9)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(UserError, match="another user"):
        private_folder("new", room_bytes=9)
