"""A service over HTTP whose parts are killed: its queue is as it was, every study exact, nothing left.

`make test` runs a sample; `make faults` all of it: 200 kills in ten services.
"""

from __future__ import annotations

import collections
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.queue_chaos import Chaos, Part, torment
from tests.postgres_again import start_again
from tests.service.house import free_port

pytestmark = [pytest.mark.ray, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

NUM_SERVICES, NUM_KILLS = 10, 20
WITH_RAY = {3, 8}  #: services whose drivers have a Ray each


class Postgres:
    """A PostgreSQL server that goes away as one that is restarted."""

    def __init__(self, folder: str) -> None:
        self._pgserver = pytest.importorskip("pgserver", reason="the pgserver wheel is missing")
        self._server: Any = self._pgserver.get_server(folder, cleanup_mode=None)
        self._server.psql("CREATE DATABASE queue;")
        self.url = str(self._server.get_uri(database="queue")).replace("postgres:@", "postgres@")

    def leave(self) -> None:
        owner = {"pgdata": self._server.pgdata, "user": self._server.system_user}
        self._pgserver.pg_ctl(["-m", "immediate", "stop"], **owner)

    def come_back(self) -> None:
        start_again(self._server)


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    with tempfile.TemporaryDirectory(prefix="autosft-postgres-") as folder:
        made = Postgres(folder)
        yield made
        made.leave()


@pytest.fixture(scope="module")
def tally() -> Iterator[collections.Counter[Part]]:
    """Count the kills of all services, and show them at the end."""
    found: collections.Counter[Part] = collections.Counter()
    yield found
    rows = [f"| {part.value} | {found[part]} |" for part in Part]
    print("\n" + "\n".join(["| killed | times |", "|---|---|", *rows, f"| all | {found.total()} |"]))


@pytest.mark.slow
def test_a_sample_of_kills_over_http(tmp_path: Path) -> None:
    run(Chaos(f"sqlite:///{tmp_path}/s.db", tmp_path, free_port(), seed=1, num_kills=4))


@pytest.mark.faults
@pytest.mark.timeout(2200)
@pytest.mark.parametrize("number", range(NUM_SERVICES))
def test_all_kills_over_http(
    number: int, tmp_path: Path, tally: collections.Counter[Part], request: pytest.FixtureRequest
) -> None:
    """Alternate between SQLite and PostgreSQL; two have drivers with a Ray each."""
    database = request.getfixturevalue("postgres") if number % 2 else None
    url = f"sqlite:///{tmp_path}/s.db" if database is None else database.url
    chaos = Chaos(url, tmp_path, free_port(), seed=100 + number, num_kills=NUM_KILLS, database=database)
    chaos.has_ray = number in WITH_RAY
    chaos.tally = tally
    started = time.monotonic()
    run(chaos)
    print(
        f"service {number}: {len(chaos.kills)} kills, {len(chaos.names)} studies, "
        f"{chaos.num_processes} drivers, {time.monotonic() - started:.0f} s; so far {tally.total()} kills"
    )


def run(chaos: Chaos) -> None:
    (chaos.folder / "outputs").mkdir()
    try:
        torment(chaos)
    finally:
        for process in psutil.process_iter():
            kill_if_ours(process, chaos)


def kill_if_ours(process: psutil.Process, chaos: Chaos) -> None:
    try:
        if process.environ().get("XDG_DATA_HOME") == chaos.variables["XDG_DATA_HOME"]:
            process.kill()
    except psutil.Error:
        return
