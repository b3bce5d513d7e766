"""What fails around a study: disks, folders, a database, limits, a clock; and how each is mended again."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from autosft.studies.store import database
from autosft.workers.processes.starters import WarmServer

#: Where processes can be counted, as containers do; needs root and version 1 of control groups.
PIDS = Path("/sys/fs/cgroup/pids")
#: Enough for the study, which leaves 64 MiB free, and little enough to be filled quickly.
DISK_BYTES = 96 << 20


@dataclass
class Place:
    """The study's folders, each on a disk of its own."""

    root: Path
    server: WarmServer | None = None
    clock_step_s: float = 0.0
    #: Whether an attempt was there to be hit: on a busy machine none may be up yet, or it has ended.
    has_victim: bool = True
    undo: list[Callable[[], object]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"sqlite:///{self.root / 'database' / 'studies.db'}"


DISKS = ("output", "temporary", "database", "leases")


def set_up(place: Place, *, breaking: str | None = None) -> None:
    """Make the folders; the disk of `breaking` is one that can break: in memory none does."""
    for name in (*DISKS, "model", "data"):
        (place.root / name).mkdir(parents=True)
        (place.root / name / "here").touch()
    for name in DISKS:
        if name == breaking:
            call("truncate", "--size", str(DISK_BYTES), str(image(place, name)))
            call("mkfs.ext4", "-q", "-m", "0", str(image(place, name)))
            mount_image(place, name)
            (place.root / name).chmod(0o700)
        else:
            mount("-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", str(place.root / name))
    (place.root / "output" / "study").mkdir()


def mount(*arguments: str) -> None:
    call("mount", *arguments)


def call(*command: str) -> None:
    subprocess.run(command, check=True)


def image(place: Place, name: str) -> Path:
    return place.root / f"{name}.img"


def mount_image(place: Place, name: str) -> None:
    mount("-o", "loop,errors=remount-ro", str(image(place, name)), str(place.root / name))


# --- what fails ---------------------------------------------------------------------------------------


def fill(folder: Path) -> Callable[[Place], None]:
    def strike(place: Place) -> None:
        filler = place.root / folder / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        place.undo.append(filler.unlink)

    return strike


def make_read_only(name: str) -> Callable[[Place], None]:
    """Have the kernel find an error on the disk: it turns read-only below all who have files open there."""

    def strike(place: Place) -> None:
        path = str(place.root / name)
        call("sync", "--file-system", path)  # what was not written yet is lost with the disk
        device = subprocess.check_output(["findmnt", "-no", "SOURCE", path], text=True).strip()
        Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error").write_text("1")

        def mend() -> None:
            call("umount", path)
            checked = ["e2fsck", "-fy", str(image(place, name))]
            assert subprocess.run(checked, check=False, capture_output=True).returncode <= 1  # 1: mended
            mount_image(place, name)

        place.undo.append(mend)

    return strike


def children(place: Place) -> list[psutil.Process]:
    assert place.server is not None
    return psutil.Process(place.server.pid).children()


def victims(place: Place) -> list[psutil.Process]:
    """Return the attempts under way, and note whether there are any; one that was just sent is waited for."""
    end = time.monotonic() + 5.0
    while not (found := children(place)) and time.monotonic() < end:
        time.sleep(0.05)
    place.has_victim = bool(found)
    return found


def move(name: str) -> Callable[[Place], None]:
    def strike(place: Place) -> None:
        moved = place.root / "moved"
        source = place.root / name
        source.rename(source.with_name("moved") if name.startswith("output") else moved)

        def back() -> None:
            shutil.rmtree(source, ignore_errors=True)
            (source.with_name("moved") if name.startswith("output") else moved).rename(source)

        place.undo.append(back)

    return strike


def delete(name: str) -> Callable[[Place], None]:
    def strike(place: Place) -> None:
        shutil.rmtree(place.root / name)

        def back() -> None:
            (place.root / name).mkdir(parents=True, exist_ok=True)
            (place.root / name / "here").touch()

        place.undo.append(back)

    return strike


def limit(what: int, value: int, *, of_attempts: int | None = None) -> Callable[[Place], None]:
    """Lower a limit of the process that attempts are forked from."""

    def strike(place: Place) -> None:
        assert place.server is not None
        assert place.server.pid is not None
        for process in (psutil.Process(place.server.pid), *children(place)):
            before = process.rlimit(what)
            is_attempt = of_attempts is not None and process.pid != place.server.pid
            process.rlimit(what, (of_attempts if is_attempt else value, before[1]))

    return strike  # a new server starts without it


def delete_database(place: Place) -> None:
    path = place.root / "database" / "studies.db"
    kept = place.root / "kept.db"
    shutil.copy(path, kept)  # as of a backup
    for wal in path.parent.glob("studies.db*"):
        if wal != path:
            shutil.copy(wal, place.root / wal.name.replace("studies", "kept"))
    moved = place.root / "database" / "aside"
    moved.mkdir()
    for one in path.parent.glob("studies.db*"):
        one.rename(moved / one.name)

    def back() -> None:
        for one in path.parent.glob("studies.db*"):
            one.unlink()
        for one in moved.iterdir():
            one.rename(path.parent / one.name)
        moved.rmdir()

    place.undo.append(back)


def lock_database(place: Place) -> None:
    """Another program keeps the database locked until the study has said that it waits."""
    other = sqlite3.connect(place.root / "database" / "studies.db", check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")

    class Release(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(record.getMessage(), file=sys.stderr)
            other.rollback()

    logging.getLogger(database.__name__).addHandler(Release())


def lock_database_for_long(place: Place) -> None:
    """As a backup program does: for longer than a study waits, which is a minute and a half outside."""
    other = sqlite3.connect(place.root / "database" / "studies.db", check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    place.undo.append(lambda: (other.rollback(), other.close()))


def suspend_machine(place: Place) -> None:
    """Everything stands still for two hours, as of a laptop or a virtual machine; here for four seconds."""
    assert place.server is not None
    pids = [place.server.pid, *(process.pid for process in children(place)), os.getpid()]
    waker = (
        "import os, signal, sys, time\n"
        "for number in (signal.SIGSTOP, signal.SIGCONT):\n"
        "    for pid in sys.argv[1:]:\n"
        "        try: os.kill(int(pid), number)\n"
        "        except ProcessLookupError: pass\n"
        "    time.sleep(4)\n"
    )
    subprocess.Popen([sys.executable, "-c", waker, *map(str, pids)])
    place.clock_step_s += 7200.0


def limit_processes(place: Place) -> None:
    """A container's limit of processes is reached: nothing can be forked."""
    assert place.server is not None
    group = PIDS / f"autosft-test-{os.getpid()}"
    group.mkdir()
    held = [place.server.pid, *(process.pid for process in children(place))]
    for pid in held:
        (group / "cgroup.procs").write_text(str(pid))
    (group / "pids.max").write_text("1")

    def lift() -> None:
        (group / "pids.max").write_text("max")
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (PIDS / "cgroup.procs").write_text(pid)
        group.rmdir()

    place.undo.append(lift)


def step_clock(place: Place) -> None:
    place.clock_step_s += 7200.0
    place.undo.append(lambda: None)


def suspend(place: Place) -> None:
    """An attempt is suspended, as by a debugger or a batch system."""
    for process in victims(place):
        process.send_signal(signal.SIGSTOP)


def kill_server(place: Place) -> None:
    assert place.server is not None
    assert place.server.pid is not None
    victims(place)
    os.kill(place.server.pid, signal.SIGKILL)


def take_leases(place: Place) -> None:
    os.chown(place.root / "leases" / "kept", 65534, 65534)
    place.undo.append(lambda: os.chown(place.root / "leases" / "kept", 0, 0))


@dataclass(frozen=True)
class Kind:
    """A failure, and whether the study outlives it without help."""

    strike: Callable[[Place], object]
    says: str  # a regular expression for what is said of it; "" where nothing has to be
    #: At "start" and "training"; a run that outlives it may.  None: it may end, and says so where it does.
    ends_run: bool | None = True
    breaking: str | None = None  # the disk that has to be one that can break


KINDS = {
    "output disk full": Kind(fill(Path("output")), "free|No space left|full", ends_run=False),
    # whether the processes are up already when it strikes is a race
    "temporary disk full": Kind(fill(Path("temporary")), "No space left", ends_run=None),
    "database disk full": Kind(fill(Path("database")), "disk is full|full"),
    # a lease that ends makes room for the next
    "leases disk full": Kind(fill(Path("leases")), "No space left", ends_run=None),
    "output read-only": Kind(make_read_only("output"), "Read-only file system", breaking="output"),
    # what is up already may need nothing more of it
    "temporary read-only": Kind(
        make_read_only("temporary"), "Read-only file system", ends_run=None, breaking="temporary"
    ),
    "database read-only": Kind(
        make_read_only("database"), "readonly|Read-only file system|unable to open", breaking="database"
    ),
    "leases read-only": Kind(make_read_only("leases"), "Read-only file system", breaking="leases"),
    "output deleted": Kind(delete("output/study"), "moved, deleted or replaced"),
    "output moved": Kind(move("output/study"), "moved, deleted or replaced"),
    "model moved": Kind(move("model"), "model .* is not there any more"),
    "model deleted": Kind(delete("model"), "model .* is not there any more"),
    "data deleted": Kind(delete("data"), "data in .* are gone"),
    "database deleted": Kind(delete_database, "deleted or moved while the study ran"),
    "database locked": Kind(lock_database, "Waiting up to .* locked", ends_run=False),
    "database locked for long": Kind(lock_database_for_long, "kept it locked"),
    "machine suspended": Kind(suspend_machine, "", ends_run=False),
    "no more processes": Kind(limit_processes, "Resource temporarily unavailable"),
    "clock stepped": Kind(step_clock, "", ends_run=False),
    # standard input and outputs, their lock and one more are what an attempt has open all the time
    "no more open files": Kind(limit(resource.RLIMIT_NOFILE, 8, of_attempts=5), "Too many open files"),
    # a server that was only just up cannot write its last words either
    "file size limited": Kind(
        limit(resource.RLIMIT_FSIZE, 0), r"File too large|warm server is gone; its last output: \(none\)"
    ),
    "attempt suspended": Kind(suspend, "no progress|killed", ends_run=False),
    "server killed": Kind(kill_server, "warm server is gone|killed", ends_run=False),
    "leases another user's": Kind(take_leases, "belongs to another user"),
}
