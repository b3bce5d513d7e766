"""A study whose surroundings fail: runs it, breaks one thing at one moment, mends it, and runs it again.

    unshare --mount python -m tests.faults.surroundings '{"kind": ..., "moment": ..., "folder": ...}'

Real processes, files and mounts, in a mount namespace of its own, and no model.  Prints as JSON what was
said and how the runs ended; asserts that the study is exact.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from autosft.profiles.errors import StudyFailedError, UserError
from autosft.profiles.hardware.discover import profile_hardware
from autosft.profiles.hardware.leases import Leases
from autosft.scheduler.events import StudyEvent, TrialEnded, TrialMeasured, TrialStarted
from autosft.scheduler.loop import backing_off
from autosft.scheduler.loop.leasing import MachineLeases
from autosft.scheduler.loop.tuning import run_study
from autosft.studies.files.checkpoints import verify
from autosft.studies.store import database
from autosft.studies.store.records import open_records
from autosft.studies.trial import TrialState
from autosft.workers.processes.starters import WarmServer
from autosft.workers.runners.local_runner import LocalRunner
from benchmarks.empty_study import describe_study, taken_over
from tests.faults import training
from tests.faults.driver import KEEP_BEST, NUM_EVALUATIONS, STUDY
from tests.faults.holds import check_curve

NUM_TRIALS = 2
#: When the fault strikes: as the first attempt starts, after its first evaluation, between two trials.
MOMENTS = ("start", "training", "between")
#: Enough for the study, which leaves 64 MiB free, and little enough to be filled quickly.
DISK_BYTES = 96 << 20


@dataclass
class Place:
    """The study's folders, each on a disk of its own."""

    root: Path
    server: WarmServer | None = None
    clock_step_s: float = 0.0
    undo: list[Callable[[], object]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"sqlite:///{self.root / 'database' / 'studies.db'}"


DISKS = ("output", "temporary", "database", "leases")


def set_up(place: Place) -> None:
    for name in (*DISKS, "model", "data"):
        (place.root / name).mkdir(parents=True)
        (place.root / name / "here").touch()
    for name in DISKS:
        mount("-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", str(place.root / name))
    (place.root / "output" / "study").mkdir()


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


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
    def strike(place: Place) -> None:
        # lazily: attempts have files open there, for which the kernel refuses it
        path = str(place.root / name)
        held = [process for process in children(place) if has_open(process, path)]
        for process in held:
            process.kill()
        psutil.wait_procs(held)
        deadline = time.monotonic() + 60
        while subprocess.run(
            ["mount", "-o", "remount,ro", path], check=False, capture_output=True
        ).returncode:
            assert time.monotonic() < deadline, "the disk is busy"
            time.sleep(0.05)
        place.undo.append(lambda: mount("-o", "remount,rw", path))

    return strike


def children(place: Place) -> list[psutil.Process]:
    assert place.server is not None
    return psutil.Process(place.server.pid).children()


def has_open(process: psutil.Process, path: str) -> bool:
    with contextlib.suppress(psutil.Error):
        links = Path(f"/proc/{process.pid}/fd").iterdir()
        return any(os.path.realpath(link).startswith(path) for link in links)
    return False


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


def limit(what: int, value: int) -> Callable[[Place], None]:
    """Lower a limit of the process that attempts are forked from."""

    def strike(place: Place) -> None:
        assert place.server is not None
        assert place.server.pid is not None
        for process in (psutil.Process(place.server.pid), *children(place)):
            before = process.rlimit(what)
            process.rlimit(what, (value, before[1]))

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
    """Another program keeps the database locked for a while."""
    other = sqlite3.connect(place.root / "database" / "studies.db", check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(1.0, lambda: (other.rollback(), other.close())).start()


def step_clock(place: Place) -> None:
    place.clock_step_s += 7200.0
    place.undo.append(lambda: None)


def suspend(place: Place) -> None:
    """An attempt is suspended, as by a debugger or a batch system."""
    for process in children(place):
        process.send_signal(signal.SIGSTOP)


def kill_server(place: Place) -> None:
    assert place.server is not None
    assert place.server.pid is not None
    os.kill(place.server.pid, signal.SIGKILL)


def take_leases(place: Place) -> None:
    os.chown(place.root / "leases" / "kept", 65534, 65534)
    place.undo.append(lambda: os.chown(place.root / "leases" / "kept", 0, 0))


@dataclass(frozen=True)
class Kind:
    """A failure, and whether the study outlives it without help."""

    strike: Callable[[Place], object]
    says: str  # a regular expression for what is said of it; "" where nothing has to be
    ends_run: bool = True  # at "start" and "training"; a run that outlives it may


KINDS = {
    "output disk full": Kind(fill(Path("output")), "free|No space left|full", ends_run=False),
    "temporary disk full": Kind(fill(Path("temporary")), "No space left|temporary|full"),
    "database disk full": Kind(fill(Path("database")), "disk is full|full"),
    "leases disk full": Kind(fill(Path("leases")), "No space left"),
    "output read-only": Kind(make_read_only("output"), "Read-only file system|read-only"),
    "database read-only": Kind(make_read_only("database"), "readonly|read-only|unable to open"),
    "output deleted": Kind(delete("output/study"), "moved, deleted or replaced"),
    "output moved": Kind(move("output/study"), "moved, deleted or replaced"),
    "model moved": Kind(move("model"), "model .* is not there any more"),
    "data deleted": Kind(delete("data"), "data in .* are gone"),
    "database deleted": Kind(delete_database, "deleted or moved while the study ran"),
    "database locked": Kind(lock_database, "Waiting up to .* locked", ends_run=False),
    "clock stepped": Kind(step_clock, "", ends_run=False),
    "no more open files": Kind(limit(resource.RLIMIT_NOFILE, 8), "Too many open files"),
    "file size limited": Kind(limit(resource.RLIMIT_FSIZE, 0), "File too large"),
    "attempt suspended": Kind(suspend, "no progress|killed", ends_run=False),
    "server killed": Kind(kill_server, "warm server is gone|killed", ends_run=False),
    "leases another user's": Kind(take_leases, "belongs to another user"),
}


# --- a run --------------------------------------------------------------------------------------------


def run(place: Place, observe: Callable[[StudyEvent], None]) -> str | None:
    """Run the study, or go on with it; return the error that ended it, None without one."""
    device = replace(profile_hardware("cpu").devices[0], num_cores=1)
    spec, described = describe_study(
        NUM_TRIALS,
        place.root,
        [device],
        name=STUDY,
        slots_a_device=1,
        num_evaluations=NUM_EVALUATIONS,
        keep_best=KEEP_BEST,
    )
    described = replace(
        described,
        model=str(place.root / "model"),
        data_dir=str(place.root / "data"),
        output_dir=place.root / "output" / "study",
        checkpoint_bytes=1 << 10,
    )
    server = place.server = WarmServer(imports=[training.__name__])
    try:
        with ExitStack() as stack:
            study = stack.enter_context(taken_over(place.url, spec))
            runner = Runner(
                place, server, function=f"{training.__name__}:train_reading", hang_limit_s=hang_limit_s
            )
            stack.callback(runner.close, grace_s=0.0)
            run_study(
                described,
                records=study,
                runner=runner,
                leases=MachineLeases(Leases(place.root / "leases" / "kept")),
                observe=observe,
                stop_requested=lambda: False,
            )
    except (StudyFailedError, UserError) as error:
        return str(error)
    finally:
        server.close()
    return None


class Runner(LocalRunner):
    """With a clock that can be set."""

    def __init__(self, place: Place, server: WarmServer, **options: object) -> None:
        super().__init__(server, **options)
        self._place = place

    def now(self) -> float:
        return time.time() + self._place.clock_step_s


def hang_limit_s(job: object, *, has_begun: bool) -> float:
    return 3.0 if has_begun else 120.0


def is_moment(event: StudyEvent, moment: str) -> bool:
    match event, moment:
        case TrialStarted(), "start":
            return True
        case TrialMeasured(measurement=measurement), "training":
            return measurement.evaluation is not None
        case TrialEnded(), "between":
            return True
    return False


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Wait for seconds where a study would wait for a minute."""
    backing_off.WAITS_S = (0.1, 0.2, 0.3)
    backing_off.LOST_WAITS_S = (0.0, 0.1, 0.2)
    database.QUIET_S, database.AWAY_S, database.RETRY_S = 0.1, 5.0, 0.05
    yield


def main() -> None:
    given = json.loads(sys.argv[1])
    place, kind = Place(Path(given["folder"])), KINDS[given["kind"]]
    said: list[str] = []
    has_struck = False

    def observe(event: StudyEvent) -> None:
        nonlocal has_struck
        message = getattr(event, "message", None) or getattr(getattr(event, "record", None), "message", "")
        said.append(message)
        if not has_struck and is_moment(event, given["moment"]):
            has_struck = True
            kind.strike(place)
        if "disk of" in message and place.undo:  # a study that waits for space goes on by itself
            place.undo.pop()()

    set_up(place)
    tempfile.tempdir = str(place.root / "temporary")
    os.environ["TMPDIR"] = tempfile.tempdir
    with quick():
        error = run(place, observe)
        assert has_struck
        for undo in place.undo:
            undo()
        place.clock_step_s = 0.0
        second = run(place, observe) if error is not None else None
    if second is None:
        check_exact(place, has_checkpoints=given["kind"] != "output deleted")
    print(json.dumps({"error": error, "said": said, "second": second}))


def check_exact(place: Place, *, has_checkpoints: bool) -> None:
    """Assert that the study is what it would have been in good surroundings, its checkpoints whole."""
    with closing(open_records(place.url)) as records:
        study = records.read_study(STUDY)
        trials = study.trials()
        assert [trial.state for trial in trials] == [TrialState.COMPLETED] * NUM_TRIALS, trials
        for trial in trials:
            check_curve(trial)
        best = min(trials, key=lambda trial: trial.value or 0.0)
        assert best.best_checkpoint is not None
        if has_checkpoints:
            verify(Path(best.best_checkpoint))
        for attempt in study.attempts():
            assert attempt.ended_at is not None


if __name__ == "__main__":
    main()
