"""Runs a study in real processes and kills its parts at random points until it ends.

`torment` starts the driver of `driver.py` over and over, kills what `Kill` names, and returns what it did;
`check` reads what is left and asserts that nothing was lost, doubled or left behind.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import sqlalchemy as sa

from autosft.profiles.hardware import ClusterProfile, profile_hardware, save_profile
from autosft.scheduler import watchdog
from autosft.scheduler.outcome import MAX_LOST_ATTEMPTS
from autosft.studies import tables
from autosft.studies.checkpoints import verify
from autosft.studies.records import open_records
from autosft.studies.trial import TrialRecord, TrialState
from autosft.workers.node import HARDWARE_VARIABLE
from tests.faults import training
from tests.faults.driver import KEEP_BEST, NUM_EVALUATIONS, STUDY
from tests.ray_nodes import RayNodes

ROOT = Path(__file__).parents[2]
ORPHAN_LIMIT_S = 10.0  # within which nothing of a dead driver may be left
STUDY_LIMIT_S = 240.0
EARLY = 0.1  # how often a driver's parts are killed from its start on, not only once a trial runs
DEATH_S = 1.0  # in which a victim dies, or the signal does not count as a kill
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Part(enum.Enum):
    """What can be killed."""

    ATTEMPT = "attempt"  #: the process that trains
    ACTOR = "actor"  #: Ray's process that follows it
    SERVER = "warm server"  #: what attempts are forked from
    RAYLET = "raylet"  #: Ray on a node
    AGENT = "agent"  #: Ray's helpers on a node
    HEAD = "head"  #: Ray's control store
    DRIVER = "driver"


@dataclass(slots=True)
class Chaos:
    """How a study is tormented, and what was done."""

    seed: int
    url: str
    folder: Path
    num_trials: int
    num_kills: int
    weights: dict[Part, float]  # which part is chosen how often, of those that are there
    nodes: RayNodes | None = None  # a cluster; without one each driver starts its own Ray
    kills: list[tuple[Part, str]] = field(default_factory=list)  # what died of it
    survived: list[tuple[Part, str]] = field(default_factory=list)  # signals that were ignored or took longer
    num_drivers: int = 0
    ends: list[int] = field(default_factory=list)  # exit codes of the drivers
    orphans_s: list[float] = field(default_factory=list)  # how long each driver's processes outlived it


def torment(chaos: Chaos) -> None:
    """Run the study to its end through `num_kills` kills."""
    draw = random.Random(chaos.seed)
    deadline = time.monotonic() + STUDY_LIMIT_S
    while True:
        if chaos.nodes is not None:
            heal(chaos.nodes)
        driver = start_driver(chaos)
        run_dir = wait_for_run(chaos, driver, deadline)
        if run_dir is None:  # the head was still dying when it was looked at
            chaos.ends.append(driver.returncode)
            continue
        has_begun = draw.random() < EARLY
        while driver.poll() is None:
            assert time.monotonic() < deadline, f"the study hangs; {story(chaos)}"
            sleep_until_ended(driver, draw.uniform(0.02, 0.5))
            if len(chaos.kills) < chaos.num_kills:
                has_begun = has_begun or bool(parts_of(chaos, run_dir)[Part.ATTEMPT])
                if has_begun:
                    kill_something(chaos, draw, driver, run_dir)
        chaos.ends.append(driver.returncode)
        wait_until_nothing_is_left(chaos, run_dir)
        if driver.returncode == 0:
            return


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
        return subprocess.Popen(
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


# A program that was started in the background of a shell inherits an ignored SIGINT.
HEARING_SIGINT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from tests.faults.driver import main
sys.exit(main())
"""


def wait_for_run(chaos: Chaos, driver: subprocess.Popen[bytes], deadline: float) -> Path | None:
    """Return the run folder that the driver has published; None where its cluster was not there."""
    path = chaos.folder / "drivers" / f"{driver.pid}.json"
    while not path.exists():
        if driver.poll() is not None:
            assert chaos.nodes is not None, f"the driver ended at its start; {story(chaos)}"
            return None
        assert time.monotonic() < deadline, f"the driver does not start; {story(chaos)}"
        time.sleep(0.02)
    return Path(json.loads(path.read_text())["run_dir"])


def kill_something(chaos: Chaos, draw: random.Random, driver: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Kill one part that is there, if any is, by a random signal."""
    if driver.poll() is not None:
        return
    parts = parts_of(chaos, run_dir)
    parts[Part.DRIVER] = [psutil.Process(driver.pid)]
    present = [part for part in chaos.weights if parts.get(part)]
    if not present:
        return
    [part] = draw.choices(present, [chaos.weights[part] for part in present])
    victim = draw.choice(sorted(parts[part], key=lambda process: process.pid))
    how = draw.choice(SIGNALS)
    try:
        victim.send_signal(how)
    except psutil.NoSuchProcess:
        return
    if part is Part.DRIVER:  # our own child, whose end `Popen` has to see
        sleep_until_ended(driver, DEATH_S)
        is_gone = driver.poll() is not None
    else:
        is_gone = bool(psutil.wait_procs([victim], timeout=DEATH_S)[0])
    (chaos.kills if is_gone else chaos.survived).append((part, how.name))
    if part is Part.RAYLET and is_gone and chaos.nodes is not None and draw.random() < 0.5:
        heal(chaos.nodes)  # a node joins while the study runs


def parts_of(chaos: Chaos, run_dir: Path) -> dict[Part, list[psutil.Process]]:
    """Return the living processes of a run by what they are."""
    found: dict[Part, list[psutil.Process]] = collections.defaultdict(list)
    run_dirs = [run_dir, *([chaos.nodes.folder] if chaos.nodes is not None else [])]
    for pid in {
        pid for one in run_dirs for pid in watchdog.members(str(one), spare=frozenset({os.getpid()}))
    }:
        try:
            process = psutil.Process(pid)
            part = part_of(process)
        except psutil.Error:
            continue
        if part is not None:
            found[part].append(process)
    return found


def part_of(process: psutil.Process) -> Part | None:
    name, line = process.name(), " ".join(process.cmdline())
    if "autosft.workers.warm_server" in line:
        parent = process.parent()
        is_child = parent is not None and "autosft.workers.warm_server" in " ".join(parent.cmdline())
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


def heal(nodes: RayNodes) -> None:
    """See to it that the cluster has a head and two raylets."""
    lines = []
    for process in processes(nodes.folder):
        with contextlib.suppress(psutil.Error):
            lines.append(" ".join(process.cmdline()))
    raylets = [line for line in lines if "/raylet/raylet" in line]
    if not nodes.is_answering() or not any("--head" in line for line in raylets):
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
    """Assert that nothing of an ended driver's run is left after the limit: no process, no file."""
    started = time.monotonic()

    def left() -> list[str]:
        pids = watchdog.members(str(run_dir), spare=frozenset({os.getpid()}))
        return [f"process {pid}" for pid in pids] + ([str(run_dir)] if run_dir.exists() else [])

    while remains := left():
        waited = time.monotonic() - started
        assert waited < ORPHAN_LIMIT_S, f"left after {waited:.0f} s: {remains}; {story(chaos)}"
        time.sleep(0.1)
    chaos.orphans_s.append(time.monotonic() - started)


def story(chaos: Chaos) -> str:
    log = (chaos.folder / "driver.log").read_text(errors="replace")[-3000:]
    done = ", ".join(f"{part.value} {how}" for part, how in chaos.kills)
    return f"seed {chaos.seed}, kills: {done}; ends: {chaos.ends}\n{log}"


# --- what must hold -----------------------------------------------------------------------------------


def check(chaos: Chaos) -> None:
    """Assert that the study is what it would have been without the kills."""
    records = open_records(chaos.url)
    try:
        study = records.read_study(STUDY)
        trials = study.trials()
        finished = [one for one in trials if one.state.is_finished]
        assert len(finished) == chaos.num_trials, f"{len(finished)} of {chaos.num_trials}; {story(chaos)}"
        assert [one.number for one in trials] == list(range(len(trials)))
        losses = collections.Counter(one.trial for one in study.attempts() if one.outcome == "worker lost")
        for trial in trials:
            # One that is lost so often is given up; it does not count, and another takes its place.
            is_given_up = trial.state is TrialState.FAILED and losses[trial.number] >= MAX_LOST_ATTEMPTS
            assert trial.state.is_finished or is_given_up, f"trial {trial.number}; {story(chaos)}"
            check_curve(trial)
        kept = study.checkpoints()
        for checkpoint in kept:
            state = json.loads((Path(checkpoint.path) / training.STATE).read_text())
            verify(Path(checkpoint.path))
            assert state["step"] == checkpoint.step
            if checkpoint.evaluation is not None:
                assert training.loss_of(state["state"]) == checkpoint.value, checkpoint
                [measured] = [
                    one
                    for one in trials[checkpoint.trial].measurements
                    if one.evaluation == checkpoint.evaluation
                ]
                assert measured.metric("eval_loss") == checkpoint.value
        on_disk = set((chaos.folder / "output" / "trials").glob("*/checkpoints/*"))
        assert {Path(one.path) for one in kept} <= on_disk
        assert len(kept) <= KEEP_BEST
    finally:
        records.close()
    check_rows(chaos)
    said = (chaos.folder / "driver.log").read_text(errors="replace")
    assert "(raylet)" not in said, "Ray's words on what died reached the terminal"
    assert list((chaos.folder / "leases").glob("*.json")) == [], "a lease is left"


def check_curve(trial: TrialRecord) -> None:
    """Assert that a trial's learning curve is the one that it would have had."""
    expected = training.curve(trial.settings, NUM_EVALUATIONS)
    measured = [one.metric("eval_loss") for one in trial.measurements]
    assert measured == expected[: len(measured)], f"trial {trial.number} learned something else"
    assert [one.evaluation for one in trial.measurements] == list(range(1, len(measured) + 1))
    assert trial.value == min(expected[: len(measured)], default=None)
    if trial.state is TrialState.COMPLETED:
        assert len(measured) == NUM_EVALUATIONS


def check_rows(chaos: Chaos) -> None:
    """Assert on the tables themselves: each result once, no attempt open, Optuna's tables alike."""
    engine = sa.create_engine(chaos.url.replace("postgresql://", "postgresql+psycopg://"))
    trials, attempts, measurements = tables.trials, tables.attempts, tables.measurements
    with engine.connect() as connection:
        open_attempts = sa.select(sa.func.count()).where(attempts.c.ended_at.is_(None))
        assert connection.scalar(open_attempts) == 0
        by_trial = (
            sa.select(trials.c.number, trials.c.state, attempts.c.outcome)
            .join(attempts, attempts.c.trial_id == trials.c.id)
            .where(attempts.c.outcome.in_(["completed", "pruned"]))
        )
        results = collections.Counter(row.number for row in connection.execute(by_trial))
        assert set(results.values()) == {1}, f"a result is recorded twice: {results}"
        assert len(results) == chaos.num_trials
        twice = (
            sa.select(measurements.c.attempt_id)
            .group_by(measurements.c.attempt_id, measurements.c.step, measurements.c.evaluation)
            .having(sa.func.count() > 1)
        )
        assert connection.execute(twice).all() == []
        optuna = sa.text("SELECT state, count(*) FROM trials GROUP BY state")
        states = {str(state): int(number) for state, number in connection.execute(optuna).all()}
        assert states.get("RUNNING", 0) == 0
        assert states.get("COMPLETE", 0) + states.get("PRUNED", 0) == chaos.num_trials
    engine.dispose()
