"""Kills the parts of a service at random points, over HTTP, until its queue is done.

`torment` submits studies to the server of `served.py`, kills something again and again, and submits
more until enough was killed; `check` reads what is left and asserts that nothing was lost, doubled or
orphaned.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from autosft.profiles.errors import UserError
from autosft.service.client import ENDED, Client
from autosft.service.drivers import launch
from autosft.studies.store.records import open_records
from autosft.studies.trial import TrialState
from tests.faults import chaos as of_studies
from tests.faults import ran_once
from tests.faults.driver import WITHOUT_RAY
from tests.faults.holds import check_curve

ROOT = Path(__file__).parents[2]
LIMIT_S, RAY_LIMIT_S = 900.0, 2000.0
NUM_TRIALS = 6
NUM_STUDIES = 3  # at once
DEATH_S = 20.0


class Part(enum.Enum):
    """What is killed."""

    SERVER = "server"  #: it is started again at once
    STARTING = "server that starts"
    SUBMITTING = "server that is sent a study"  #: which is sent again with the same key
    SCHEDULER = "scheduler's process"  #: which the server starts again
    DRIVER = "driver"
    SHELL = "shell of a driver"  #: which would have written its exit code
    DATABASE = "database, away for a while"  #: PostgreSQL
    ATTEMPT = "training process"
    ACTOR = "actor"
    WARM = "warm server"
    RAYLET = "raylet"
    HEAD = "head"


OF_STUDIES = {
    of_studies.Part.ATTEMPT: Part.ATTEMPT,
    of_studies.Part.ACTOR: Part.ACTOR,
    of_studies.Part.SERVER: Part.WARM,
    of_studies.Part.RAYLET: Part.RAYLET,
    of_studies.Part.HEAD: Part.HEAD,
}


class Database(Protocol):
    """A database that can go away and come back."""

    def leave(self) -> None: ...

    def come_back(self) -> None: ...


@dataclass
class Chaos:
    """A service and what was done to it."""

    url: str
    folder: Path
    port: int
    seed: int
    num_kills: int
    database: Database | None = None
    has_ray: bool = False  # whether drivers start a Ray each
    tally: collections.Counter[Part] = field(default_factory=collections.Counter)  # may be that of many
    kills: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of the studies that were submitted
    ids: dict[str, int] = field(default_factory=dict)  # of their items, by key
    num_processes: int = 0  # that have run an item, once all is over
    given_up: list[int] = field(default_factory=list)  # items whose driver was killed three times in a row
    server: subprocess.Popen[bytes] | None = None

    @property
    def variables(self) -> dict[str, str]:
        address = "" if self.has_ray else WITHOUT_RAY
        homes = {f"XDG_{name}_HOME": str(self.folder / name.lower()) for name in ("DATA", "CACHE")}
        return {
            **homes,
            "PYTHONPATH": str(ROOT),
            "AUTOSFT_SERVER": "",
            "AUTOSFT_TOKEN": "",
            "DRIVERS_ADDRESS": address,
        }


def torment(chaos: Chaos) -> None:
    """Serve studies to their end through `num_kills` kills."""
    draw = random.Random(chaos.seed)
    deadline = time.monotonic() + (RAY_LIMIT_S if chaos.has_ray else LIMIT_S)
    start(chaos)
    with Client(f"http://127.0.0.1:{chaos.port}") as client:
        while True:
            assert time.monotonic() < deadline, f"the queue hangs; {story(chaos)}"
            is_enough = len(chaos.kills) >= chaos.num_kills
            num_open = sum(shown["state"] not in ENDED for shown in all_items(chaos, client))
            if is_enough and not num_open:
                break
            while not is_enough and num_open < NUM_STUDIES:
                submit(chaos, client)
                num_open += 1
            time.sleep(draw.uniform(0.0, 0.5))
            check_runs_once(chaos)
            if not is_enough:
                kill_something(chaos, client, draw)
    check(chaos)


def start(chaos: Chaos) -> None:
    """Start a server, and wait until it answers."""
    launch_server(chaos)
    with Client(f"http://127.0.0.1:{chaos.port}") as client:
        while not is_answering(client):
            assert chaos.server is not None
            assert chaos.server.poll() is None, story(chaos)
            time.sleep(0.05)


def launch_server(chaos: Chaos) -> None:
    options = {"url": chaos.url, "folder": str(chaos.folder), "port": chaos.port}
    with (chaos.folder / "server.log").open("ab") as log:
        chaos.server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.served", json.dumps(options)],
            env={**os.environ, **chaos.variables},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def is_answering(client: Client) -> bool:
    try:
        client.me()
    except UserError:
        return False
    return True


def end_server(chaos: Chaos, how: signal.Signals = signal.SIGKILL) -> None:
    assert chaos.server is not None
    chaos.server.send_signal(how)
    chaos.server.wait(60)


# Submitting


def submit(chaos: Chaos, client: Client) -> int:
    """Submit another study, or one again whose item was given up."""
    name = f"study-{len(chaos.names)}"
    if chaos.given_up:
        number = chaos.given_up.pop()
        name = next(name for name in chaos.names if chaos.ids.get(f"key-{name}") == number)
        del chaos.ids[f"key-{name}"]
        key = f"key-{name}-again-{number}"
    else:
        chaos.names.append(name)
        key = f"key-{name}"
    sent = client.submit("tune", {"trials": NUM_TRIALS}, name=name, key=key)
    chaos.ids[f"key-{name}"] = sent["id"]
    return int(sent["id"])


def submit_into_a_kill(chaos: Chaos, client: Client, draw: random.Random) -> None:
    """Send a study to a server that is killed meanwhile, and again with the same key: it is queued once."""
    name = f"study-{len(chaos.names)}"
    chaos.names.append(name)
    answers: list[int] = []

    def send() -> None:
        with contextlib.suppress(UserError), Client(client.url) as other:
            answers.append(
                int(other.submit("tune", {"trials": NUM_TRIALS}, name=name, key=f"key-{name}")["id"])
            )

    sender = threading.Thread(target=send)
    sender.start()
    time.sleep(draw.uniform(0.0, 0.06))
    end_server(chaos)
    start(chaos)
    sender.join()
    again = client.submit("tune", {"trials": NUM_TRIALS}, name=name, key=f"key-{name}")
    assert answers in ([], [again["id"]]), f"queued twice: {answers}, {again['id']}"
    chaos.ids[f"key-{name}"] = again["id"]


def all_items(chaos: Chaos, client: Client) -> list[dict[str, Any]]:
    """Return every item that was submitted; assert that none is lost or has failed by itself."""
    found = [client.item(number) for number in chaos.ids.values()]
    for shown in found:
        if shown["state"] == "failed":
            assert "times in a row" in shown["note"], (shown, story(chaos))
            chaos.given_up.append(shown["id"])
            submit(chaos, client)
        assert shown["state"] not in ("cancelled", "refused", "held"), (shown, story(chaos))
    return found


# Killing


def kill_something(chaos: Chaos, client: Client, draw: random.Random) -> None:
    """Kill a part that was killed the least often, of those that are there; wait for Ray's if due."""
    found = parts_of(chaos)
    present = [part for part in Part if part in ALWAYS or found.get(part)]
    if chaos.database is None:
        present.remove(Part.DATABASE)
    fewest = min(rarity(chaos, part) for part in present)
    if chaos.has_ray and fewest > min(rarity(chaos, part) for part in OF_RAY) + SLACK:
        return
    part = draw.choice([part for part in present if rarity(chaos, part) == fewest])
    match part:
        case Part.SERVER:
            end_server(chaos, draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            start(chaos)
        case Part.STARTING:
            end_server(chaos)
            launch_server(chaos)
            time.sleep(draw.uniform(0.0, 3.0))
            end_server(chaos)
            start(chaos)
        case Part.SUBMITTING:
            submit_into_a_kill(chaos, client, draw)
        case Part.DATABASE:
            assert chaos.database is not None
            chaos.database.leave()
            time.sleep(draw.uniform(0.0, 5.0))
            chaos.database.come_back()
        case _:
            victim = draw.choice(sorted(found[part], key=lambda process: process.pid))
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
            if psutil.wait_procs([victim], timeout=DEATH_S)[1]:
                return
    chaos.tally[part] += 1
    chaos.kills.append(part.value)


def rarity(chaos: Chaos, part: Part) -> int:
    """Return how often a part was killed; where drivers have a Ray, its parts come first."""
    return chaos.tally[part] + (RAY_FIRST if chaos.has_ray and part not in OF_RAY else 0)


RAY_FIRST, SLACK = 5, 2
OF_RAY = {Part.ACTOR, Part.RAYLET, Part.HEAD}
ALWAYS = {Part.SERVER, Part.STARTING, Part.SUBMITTING, Part.DATABASE}


def parts_of(chaos: Chaos) -> dict[Part, list[psutil.Process]]:
    """Return what lives of the items, by what it is."""
    found: dict[Part, list[psutil.Process]] = collections.defaultdict(list)
    for process in processes(chaos):
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if "tests.faults.served_loop" in line:
                found[Part.SCHEDULER].append(process)
            if launch.__name__ in line and not line[0].endswith("sh"):
                continue  # it has not claimed its item yet
            if "tests.faults.driver" in line:
                found[Part.SHELL if line[0].endswith("sh") else Part.DRIVER].append(process)
            elif (part := of_studies.part_of(process)) in OF_STUDIES:
                found[OF_STUDIES[part]].append(process)
    return found


def processes(chaos: Chaos) -> list[psutil.Process]:
    """Return all processes that this service and its items have started, but its server."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = process.environ().get("XDG_DATA_HOME") == chaos.variables["XDG_DATA_HOME"]
            if is_ours and (chaos.server is None or process.pid != chaos.server.pid):
                found.append(process)
    return found


# What holds


def check_runs_once(chaos: Chaos) -> None:
    """Assert that no item has drivers of two starts; a process that is being forked looks like its parent."""
    runs: dict[str, set[str]] = collections.defaultdict(set)
    for process in parts_of(chaos)[Part.DRIVER]:
        with contextlib.suppress(psutil.Error):
            variables = process.environ()
            runs[variables[launch.ITEM]].add(variables[launch.LAUNCH])
    assert all(len(starts) == 1 for starts in runs.values()), f"{runs}; {story(chaos)}"


def check(chaos: Chaos) -> None:
    """Assert that every study is what it would have been, that each was queued once, and nothing is left."""
    with Client(f"http://127.0.0.1:{chaos.port}") as client:
        until(chaos, lambda: len(client.items(limit=1000)) >= len(chaos.names))
        named = collections.Counter(item["name"] for item in client.items(limit=1000))
    assert set(named) == set(chaos.names)
    end_server(chaos, signal.SIGTERM)
    until(chaos, lambda: not processes(chaos))
    records = open_records(chaos.url)
    for name in chaos.names:
        chaos.num_processes += ran_once.check(chaos.folder / "outputs" / name)
        study = records.read_study(name)
        trials = study.trials()
        assert [trial.number for trial in trials] == list(range(len(trials)))
        finished = [trial for trial in trials if trial.state.is_finished]
        assert len(finished) == NUM_TRIALS, f"{name}: {len(finished)} finished; {story(chaos)}"
        for trial in trials:
            assert trial.state.is_finished or trial.state is TrialState.FAILED  # lost four times: given up
            check_curve(trial)
        attempts = study.attempts()
        assert all(attempt.ended_at is not None for attempt in attempts)
        results = collections.Counter(
            attempt.trial for attempt in attempts if attempt.outcome in ("completed", "pruned")
        )
        assert set(results.values()) == {1}, f"{name}: a result is recorded twice; {story(chaos)}"
        assert len(results) == NUM_TRIALS
    records.close()


def until(chaos: Chaos, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not is_so():
        assert time.monotonic() < deadline, f"{processes(chaos)}; {story(chaos)}"
        time.sleep(0.1)


def story(chaos: Chaos) -> str:
    log = (chaos.folder / "server.log").read_text(errors="replace")[-3000:]
    return f"seed {chaos.seed}, kills: {', '.join(chaos.kills)}\n{log}"
