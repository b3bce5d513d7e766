"""Leases between real processes: races, SIGKILL, forks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.leases import Lease, LeaseInfo, Leases, default_folder, describe_leases

GIB = 2**30
GPU = "GPU-5e4f0c1a"

HOLDER = """
import sys
from pathlib import Path
from autosft.profiles.hardware.leases import Leases
folder, num_bytes = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
size = 24 * 2**30
lease = Leases(folder).acquire(
    "GPU-5e4f0c1a", num_bytes, total_bytes=size, free_bytes=size, study="other", trial=7, ends_at=1e9
)
print("no" if lease is None else "yes", flush=True)
sys.stdin.readline()
"""


def acquire(leases: Leases, gib: float, *, free_gib: float = 24, **given: object) -> Lease | None:
    values = {"study": "mine", "trial": 0, "total_bytes": 24 * GIB, "free_bytes": int(free_gib * GIB)}
    return leases.acquire(GPU, int(gib * GIB), **(values | given))  # type: ignore[arg-type]


class Holder:
    """Another process that takes a lease when told to and keeps it."""

    def __init__(self, folder: Path, gib: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), str(int(gib * GIB))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def holders() -> Iterator[list[Holder]]:
    started: list[Holder] = []
    yield started
    for holder in started:
        holder.kill()


def start(holders: list[Holder], folder: Path, *gib: float) -> list[Holder]:
    new = [Holder(folder, size) for size in gib]
    holders.extend(new)
    assert [holder.line() for holder in new] == ["ready"] * len(new)
    return new


def test_leases_of_two_processes_add_up(tmp_path: Path, holders: list[Holder]) -> None:
    leases = Leases(tmp_path)
    (other,) = start(holders, tmp_path, 14)
    other.go()
    assert other.line() == "yes"
    assert acquire(leases, 10.5) is None
    mine = acquire(leases, 10)
    assert mine is not None
    assert [(info.study, info.num_bytes) for info in leases.held(GPU)] == [
        ("other", 14 * GIB),
        ("mine", 10 * GIB),
    ]
    assert [info.pid for info in leases.held(GPU)] == [other.process.pid, os.getpid()]


def test_sigkill_frees_a_lease_and_its_file(tmp_path: Path, holders: list[Holder]) -> None:
    leases = Leases(tmp_path)
    (other,) = start(holders, tmp_path, 20)
    other.go()
    assert other.line() == "yes"
    assert acquire(leases, 20) is None
    other.kill()
    assert leases.held(GPU) == []
    assert list(tmp_path.rglob("*.lease")) == []
    assert acquire(leases, 20) is not None


def test_a_race_never_leases_more_than_there_is(tmp_path: Path, holders: list[Holder]) -> None:
    racers = start(holders, tmp_path, *[7.0] * 6)  # three of seven fit in 24
    for racer in racers:
        racer.go()
    assert sorted(racer.line() for racer in racers) == ["no"] * 3 + ["yes"] * 3
    assert sum(info.num_bytes for info in Leases(tmp_path).held(GPU)) == 21 * GIB


def test_release_gives_back_and_may_be_repeated(tmp_path: Path) -> None:
    leases = Leases(tmp_path)
    lease = acquire(leases, 20)
    assert lease is not None
    lease.release()
    lease.release()
    assert leases.held(GPU) == []
    with acquire(leases, 24) or pytest.fail("nothing is leased"):
        assert acquire(leases, 1) is None
    assert leases.held(GPU) == []


def test_a_disk_that_turned_read_only_keeps_no_lease_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = Leases(tmp_path)
    lease = acquire(leases, 20)
    assert lease is not None

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        patched.setattr(os, "write", refuse)
        lease.update(ends_at=7.0)
        lease.release()
    assert leases.held(GPU) == []  # as the file that is left is not locked


def test_devices_do_not_share_leases(tmp_path: Path) -> None:
    leases = Leases(tmp_path)
    first = acquire(leases, 24)
    other = leases.acquire("MIG-1/2", GIB, total_bytes=GIB, free_bytes=GIB, study="mine", trial=1)
    assert first is not None
    assert other is not None
    assert [info.num_bytes for info in leases.held("MIG-1/2")] == [GIB]


@pytest.mark.parametrize(
    ("case", "held_gib", "free_before", "free_now", "ask_gib", "granted"),
    [
        ("idle card, all of it", 0, 24, 24, 24, True),
        ("desktop takes two", 0, 22, 22, 22.5, False),
        ("desktop takes two, fits", 0, 22, 22, 22, True),
        ("leased and not yet used counts", 10, 24, 24, 14.5, False),
        ("leased and used counts once", 10, 24, 14, 14, True),
        ("leased, half used", 10, 24, 19, 14, True),
        ("outside use of before is remembered", 10, 22, 14, 12.5, False),
        ("a program that came later and took more than the lease", 10, 24, 8, 9, False),
    ],
)
def test_what_is_leased_and_what_is_free(
    tmp_path: Path,
    case: str,
    held_gib: float,
    free_before: float,
    free_now: float,
    ask_gib: float,
    granted: bool,
) -> None:
    leases = Leases(tmp_path)
    held = acquire(leases, held_gib, free_gib=free_before) if held_gib else None
    assert (held is not None) == bool(held_gib)
    assert (acquire(leases, ask_gib, free_gib=free_now) is not None) == granted, case


def test_cores_are_booked_too(tmp_path: Path) -> None:
    leases = Leases(tmp_path)
    first = acquire(leases, 1, num_cores=1, total_cores=2)
    assert first is not None
    assert acquire(leases, 1, num_cores=2, total_cores=2) is None
    second = acquire(leases, 1, num_cores=1, total_cores=2)
    assert second is not None
    assert acquire(leases, 1, num_cores=1, total_cores=2) is None


def test_update_is_seen_by_others(tmp_path: Path) -> None:
    lease = acquire(Leases(tmp_path), 1, ends_at=12345678901234.0)
    assert lease is not None
    lease.update(ends_at=5.0)
    assert [info.ends_at for info in Leases(tmp_path).held(GPU)] == [5.0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_keep_a_lease(tmp_path: Path) -> None:
    leases = Leases(tmp_path)
    lease = acquire(leases, 20)
    assert lease is not None
    read_end, write_end = os.pipe()
    ready_read, ready_write = os.pipe()
    child = os.fork()
    if child == 0:  # lives until the parent has looked
        os.close(write_end)
        os.write(ready_write, b"!")
        os.read(read_end, 1)
        os._exit(0)
    os.read(ready_read, 1)
    try:
        assert len(leases.held(GPU)) == 1
        lease._file.close()  # as the kernel does when the holder dies
        assert leases.held(GPU) == []
    finally:
        os.close(write_end)
        for end in (read_end, ready_read, ready_write):
            os.close(end)
        os.waitpid(child, 0)


def test_unusable_folder_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot be stored"):
        Leases(tmp_path / "file").held(GPU)


def test_default_folder_hangs_on_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    before = default_folder()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/elsewhere")
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    assert default_folder() == before


@pytest.mark.parametrize(
    ("ends_at", "num_cores", "words"),
    [
        (1_000_720.0, 0, "in 12 min."),
        (1_000_030.0, 0, "in less than a minute."),
        (1_010_800.0, 0, "in 3.0 h."),
        (999_700.0, 0, "and should have ended 5 min ago."),
        (None, 2, "holds 9.8 GiB and 2 CPU threads; when it ends is not known yet."),
    ],
)
def test_words(ends_at: float | None, num_cores: int, words: str) -> None:
    info = LeaseInfo(
        device_uuid=GPU,
        num_bytes=int(9.8 * GIB),
        num_cores=num_cores,
        pid=4711,
        study="chat",
        trial=3,
        ends_at=ends_at,
        outside_bytes=0,
    )
    text = describe_leases([info], now=1_000_000.0)
    assert text.startswith("Study 'chat' (trial 3, process 4711) holds 9.8 GiB")
    assert text.endswith(words)
