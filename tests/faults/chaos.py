"""Runs a study in real processes and kills its parts at random points until it ends.

`torment` starts the driver of `driver.py` over and over and kills parts of it, by each signal and each as
often as any other; `holds.check` reads what is left and asserts that nothing was lost or doubled.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import json
import math
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from autosft.profiles.hardware.device import ClusterProfile
from autosft.profiles.hardware.discover import profile_hardware, save_profile
from autosft.scheduler.cluster import watchdog
from autosft.workers.runners.node import HARDWARE_VARIABLE
from tests.ray_nodes import RayNodes

ROOT = Path(__file__).parents[2]
ORPHAN_LIMIT_S = 10.0  # within which nothing of a dead driver may be left
HEAD_LIMIT_S = 10.0  # within which a driver leaves whose own Ray has lost its head
STUDY_LIMIT_S = 600.0
UNDER_LOAD_LIMIT_S = 1700.0
EARLY = 0.4  # how often a driver's parts are killed from its start on, not only once a trial runs
STARTING = 0.3  # how often a driver is killed before it has a run
STARTING_S = 4.0  # of which it takes about that long, mostly to import
DEATH_S = 2.0  # in which a victim dies, or the signal does not count as a kill
LEAVING_S = 60.0  # for a driver that was asked to leave, which lets trials save
DEAF_AFTER = 3  # a part that has ignored a signal so much oftener than it died of it is sent it no more
MORE_TRIALS = 40
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Part(enum.Enum):
    """What can be killed."""

    ATTEMPT = "training process"
    ACTOR = "actor"  #: Ray's process that follows it
    SERVER = "warm server"  #: what attempts are forked from
    AGENT = "agent"  #: Ray's helpers on a node
    RAYLET = "raylet"  #: Ray on a node
    NODE = "node"  #: a raylet and all that it has started: a machine, but the driver's
    HEAD = "head"  #: Ray's control store
    DATABASE = "database"  #: what serves a driver in PostgreSQL; after SIGKILL its server starts over
    DRIVER = "driver"
    STARTING = "driver that starts"  #: before it has told of a run: it imports, or has just begun one


Kill = tuple[Part, signal.Signals]


@dataclass(slots=True)
class Tally:
    """What was sent to whom, and who died of it."""

    sent: collections.Counter[Kill] = field(default_factory=collections.Counter)
    died: collections.Counter[Kill] = field(default_factory=collections.Counter)

    def choose(self, parts: Iterable[Part], draw: random.Random) -> Kill:
        """Return a kill that was among the rarest so far."""
        kills = [(part, how) for part in parts for how in SIGNALS]
        heard = [kill for kill in kills if self.sent[kill] - self.died[kill] < self.died[kill] + DEAF_AFTER]
        if not heard:
            return draw.choice(kills)
        fewest = min(self.died[item] for item in heard)
        return draw.choice([item for item in heard if self.died[item] == fewest])

    def table(self) -> str:
        """Return what died of what, in Markdown; ignored signals in brackets."""
        rows = [("", *(item.name for item in SIGNALS), "all")]
        for part in Part:
            died = [self.died[part, how] for how in SIGNALS]
            ignored = [self.sent[part, how] - self.died[part, how] for how in SIGNALS]
            words = [f"{a} ({b} ignored)" if b else f"{a}" for a, b in zip(died, ignored, strict=True)]
            rows.append((part.value, *words, str(sum(died))))
        sums = [sum(self.died[part, how] for part in Part) for how in SIGNALS]
        rows.append(("all", *map(str, sums), str(sum(sums))))
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "|---" * 5 + "|", *lines[1:]])


@dataclass(slots=True)
class Chaos:
    """How a study is tormented, and what was done."""

    seed: int
    url: str
    folder: Path
    num_trials: int
    num_kills: int
    nodes: RayNodes | None = None  # a cluster; without one each driver starts its own Ray
    postgres: int | None = None  # process id of the database's server, where it has one
    parts: tuple[Part, ...] = tuple(Part)
    niceness: int = 0  # of the drivers and all that they start
    tally: Tally = field(default_factory=Tally)  # may be that of many studies
    kills: list[Kill] = field(default_factory=list)  # what died of it
    num_drivers: int = 0
    ends: list[int] = field(default_factory=list)  # exit codes of the drivers
    orphans_s: list[float] = field(default_factory=list)  # how long each driver's processes outlived it
    headless_s: list[float] = field(default_factory=list)  # from the head's death to the driver's end
    segments: set[str] = field(default_factory=set)  # of shared memory, seen in use
    healing: threading.Thread | None = None


def torment(chaos: Chaos) -> None:
    """Run the study to its end through `num_kills` kills, asking for further trials as long as it takes."""
    draw = random.Random(chaos.seed)
    deadline = time.monotonic() + (UNDER_LOAD_LIMIT_S if chaos.niceness else STUDY_LIMIT_S)
    while True:
        if chaos.nodes is not None:
            heal(chaos.nodes)
        driver = start_driver(chaos)
        is_due = Part.STARTING in chaos.parts and len(chaos.kills) < chaos.num_kills
        kill_after_s = draw.uniform(0.0, STARTING_S) if is_due and draw.random() < STARTING else None
        run_dir = wait_for_run(chaos, driver, deadline, kill_after_s)
        if run_dir is None:  # killed at its start, or the head was still dying when it was looked at
            chaos.ends.append(driver.returncode)
            continue
        has_begun = draw.random() < EARLY
        while driver.poll() is None:
            assert time.monotonic() < deadline, f"the study hangs; {story(chaos)}"
            sleep_until_ended(driver, draw.uniform(0.02, 0.4))
            if len(chaos.kills) < chaos.num_kills:
                has_begun = has_begun or bool(parts_of(chaos, run_dir)[Part.ATTEMPT])
                if has_begun:
                    kill_something(chaos, draw, driver, run_dir)
        chaos.ends.append(driver.returncode)
        if chaos.healing is not None:
            chaos.healing.join()
        wait_until_nothing_is_left(chaos, run_dir)
        if driver.returncode == 0:
            if len(chaos.kills) >= chaos.num_kills:
                return
            chaos.num_trials += MORE_TRIALS  # it was over too soon: as a user would, ask for more


def sleep_until_ended(driver: subprocess.Popen[bytes], timeout_s: float) -> None:
    try:
        driver.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return


def start_driver(chaos: Chaos) -> subprocess.Popen[bytes]:
    chaos.num_drivers += 1
    options = {
        "url": chaos.url,
        "folder": str(chaos.folder),
        "num_trials": chaos.num_trials,
        "address": chaos.nodes and chaos.nodes.address,
    }
    with (chaos.folder / "driver.log").open("ab") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", HEARING_SIGINT, json.dumps(options)],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
                **(chaos.nodes.environment if chaos.nodes is not None else {}),
            },
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    psutil.Process(driver.pid).nice(chaos.niceness)
    return driver


# A program that was started in the background of a shell inherits an ignored SIGINT.
HEARING_SIGINT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from tests.faults.driver import main
sys.exit(main())
"""


def wait_for_run(
    chaos: Chaos, driver: subprocess.Popen[bytes], deadline: float, kill_after_s: float | None
) -> Path | None:
    """Return the run folder that the driver has published; None where its cluster was not there.

    None too where it was killed after so many seconds, which it is if it has no run by then.
    """
    path = chaos.folder / "drivers" / f"{driver.pid}.json"
    kill_at = time.monotonic() + (math.inf if kill_after_s is None else kill_after_s)
    while not path.exists():
        if time.monotonic() >= kill_at:
            kill_starting(chaos, driver)
            return None
        if driver.poll() is not None:
            assert chaos.nodes is not None, f"the driver ended at its start; {story(chaos)}"
            return None
        assert time.monotonic() < deadline, f"the driver does not start; {story(chaos)}"
        time.sleep(0.02)
    return Path(json.loads(path.read_text())["run_dir"])


def kill_starting(chaos: Chaos, driver: subprocess.Popen[bytes]) -> None:
    """Kill a driver that has no run yet, and assert that nothing that it has started outlives it for long."""
    kill = chaos.tally.choose([Part.STARTING], random.Random(len(chaos.kills)))
    driver.send_signal(signal.SIGSTOP)  # so that it starts nothing else after we have looked
    children = descendants(psutil.Process(driver.pid))
    driver.send_signal(kill[1])
    driver.send_signal(signal.SIGCONT)
    chaos.tally.sent[kill] += 1
    driver.wait(LEAVING_S)
    chaos.tally.died[kill] += 1
    chaos.kills.append(kill)
    _, left = psutil.wait_procs(children, timeout=ORPHAN_LIMIT_S)
    assert not left, f"{left} outlived a driver that was starting; {story(chaos)}"


def kill_something(chaos: Chaos, draw: random.Random, driver: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Kill one part that is there, if any is, by a signal."""
    parts = parts_of(chaos, run_dir)
    if driver.poll() is None:
        parts[Part.DRIVER] = [psutil.Process(driver.pid)]
    if not (present := [part for part in chaos.parts if parts.get(part)]):
        return
    part, how = chaos.tally.choose(present, draw)
    victim = draw.choice(sorted(parts[part], key=lambda process: process.pid))
    below = descendants(victim) if part in (Part.RAYLET, Part.NODE) else []
    ours = [item for item in below if is_ours(item)]
    try:
        victim.send_signal(how)
    except psutil.NoSuchProcess:
        return
    chaos.tally.sent[part, how] += 1
    if part is Part.NODE:
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(how)
    if part is Part.DRIVER:  # our own child, whose end `Popen` has to see
        sleep_until_ended(driver, LEAVING_S)
        is_gone = driver.poll() is not None
    else:
        is_gone = bool(psutil.wait_procs([victim], timeout=DEATH_S)[0])
    if not is_gone:
        return
    chaos.tally.died[part, how] += 1
    chaos.kills.append((part, how))
    if part is Part.HEAD and chaos.nodes is None:
        wait_for_headless(chaos, driver)
    _, left = psutil.wait_procs(ours, timeout=ORPHAN_LIMIT_S)
    assert not left, f"{left} outlived the {part.value} that had them; {story(chaos)}"
    if part in (Part.RAYLET, Part.NODE) and chaos.nodes is not None and driver.poll() is None:
        chaos.healing = threading.Thread(target=heal_meanwhile, args=(chaos.nodes,), daemon=True)
        chaos.healing.start()


def wait_for_headless(chaos: Chaos, driver: subprocess.Popen[bytes]) -> None:
    """Assert that a driver whose own Ray has lost its head ends soon; under load it takes what it takes."""
    started = time.monotonic()
    sleep_until_ended(driver, LEAVING_S)
    assert driver.poll() is not None, f"the driver outlives its head; {story(chaos)}"
    chaos.headless_s.append(time.monotonic() - started)
    assert chaos.niceness or chaos.headless_s[-1] < HEAD_LIMIT_S, f"{chaos.headless_s}; {story(chaos)}"


def parts_of(chaos: Chaos, run_dir: Path) -> dict[Part, list[psutil.Process]]:
    """Return the living processes of a run by what they are; note what shared memory they use."""
    found: dict[Part, list[psutil.Process]] = collections.defaultdict(list)
    for process in [*processes(run_dir), *(processes(chaos.nodes.folder) if chaos.nodes is not None else [])]:
        with contextlib.suppress(psutil.Error, OSError):
            part = part_of(process)
            if part is not None and process not in found[part]:
                found[part].append(process)
            if part is Part.RAYLET and chaos.nodes is not None and "--head" not in process.cmdline():
                found[Part.NODE].append(process)
            chaos.segments |= segments_of(process)
    if chaos.postgres is not None:
        database = chaos.url.partition("?")[0].rpartition("/")[2]
        for process in descendants(psutil.Process(chaos.postgres)):
            with contextlib.suppress(psutil.Error):
                if f" {database} " in " ".join(process.cmdline()):
                    found[Part.DATABASE].append(process)
    return found


def descendants(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


def segments_of(process: psutil.Process) -> set[str]:
    """Return the files of shared memory that a process has mapped and that still have a name."""
    maps = (line.split(maxsplit=5) for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines())
    paths = {fields[5] for fields in maps if len(fields) == 6}
    return {path for path in paths if path.startswith("/dev/shm/") and not path.endswith(" (deleted)")}


def part_of(process: psutil.Process) -> Part | None:
    name, line = process.name(), " ".join(process.cmdline())
    if "autosft.workers.processes.warm_server" in line:
        parent = process.parent()
        is_child = parent is not None and "autosft.workers.processes.warm_server" in " ".join(
            parent.cmdline()
        )
        return Part.ATTEMPT if is_child else Part.SERVER
    if "ray::TrialActor" in line or "ray::NodeServer" in line:
        return Part.ACTOR
    if name == "raylet":
        return Part.RAYLET
    if name == "gcs_server":
        return Part.HEAD
    if "DashboardAgent" in line or "RuntimeEnvAgent" in line:
        return Part.AGENT
    return None


def is_ours(process: psutil.Process) -> bool:
    """Whether a process below a raylet is not one of Ray's own."""
    with contextlib.suppress(psutil.Error):
        return part_of(process) in (Part.ATTEMPT, Part.ACTOR, Part.SERVER)
    return False


def heal_meanwhile(nodes: RayNodes) -> None:
    """Have a node join while the study runs and goes on being tormented; a new head would kill the driver."""
    with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):  # the head was killed under it
        heal(nodes, may_start_over=False)


def heal(nodes: RayNodes, *, may_start_over: bool = True) -> None:
    """See to it that the cluster has a head and two raylets."""
    lines = []
    for process in processes(nodes.folder):
        with contextlib.suppress(psutil.Error):
            lines.append(" ".join(process.cmdline()))
            if "log_monitor.py" in lines[-1]:  # those of dead nodes stay, and take their share of a core
                process.kill()
    raylets = [line for line in lines if "/raylet/raylet" in line]
    if not nodes.is_answering() or not any("--head" in line for line in raylets):
        if not may_start_over:
            return
        nodes.kill()
        nodes.start_head()
        raylets = ["--head"]
    if len(raylets) < 2:
        device = replace(profile_hardware("cpu").devices[0], uuid=f"CPU-{secrets.token_hex(4)}")
        declared = nodes.folder / f"{device.uuid}.json"
        save_profile(ClusterProfile(devices=(device,), driver_version=None, cuda_version=None), declared)
        nodes.add({HARDWARE_VARIABLE: str(declared)})


def processes(run_dir: Path) -> list[psutil.Process]:
    found = []
    for pid in watchdog.members(str(run_dir), spare=frozenset({os.getpid()})):
        with contextlib.suppress(psutil.Error):
            found.append(psutil.Process(pid))
    return found


def wait_until_nothing_is_left(chaos: Chaos, run_dir: Path) -> None:
    """Assert that nothing of an ended run is left after the limit: no process, file or shared memory."""
    started = time.monotonic()

    def left() -> list[str]:
        pids = watchdog.members(str(run_dir), spare=frozenset({os.getpid()}))
        segments = (
            []
            if chaos.nodes is not None
            else [segment for segment in chaos.segments if Path(segment).exists()]
        )
        folders = [str(run_dir)] if run_dir.exists() else []
        return [f"process {pid}" for pid in pids] + segments + folders

    while remains := left():
        waited = time.monotonic() - started
        assert waited < ORPHAN_LIMIT_S, f"left after {waited:.0f} s: {remains}; {story(chaos)}"
        time.sleep(0.1)
    chaos.orphans_s.append(time.monotonic() - started)


def story(chaos: Chaos) -> str:
    log = (chaos.folder / "driver.log").read_text(errors="replace")[-3000:]
    done = ", ".join(f"{part.value} {how.name}" for part, how in chaos.kills)
    return f"seed {chaos.seed}, kills: {done}; ends: {chaos.ends}\n{log}"
