"""Whatever is killed, and whenever: the study ends with what it would have had.

`make test` runs a sample; `make faults` all of it: over 200 kills in 20 studies, each part as often as any
other and by each signal, in one go; and over 100 more under load.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.chaos import Chaos, Part, Tally, heal, torment
from tests.faults.holds import check
from tests.ray_nodes import RayNodes, ray_nodes

pytestmark = [pytest.mark.ray, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

NUM_STUDIES = 20
NUM_KILLS = 11  # a study
NUM_STUDIES_UNDER_LOAD = 10
BUSY = "import os; os.nice(19)\nwhile True: pass"


@pytest.mark.slow
def test_a_sample_of_kills(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    parts = (Part.ATTEMPT, Part.ACTOR, Part.SERVER, Part.DRIVER)  # others cost a start of Ray each
    chaos = Chaos(seed=1, url=url, folder=tmp_path, num_trials=8, num_kills=6, parts=parts)
    torment(chaos)
    check(chaos)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayNodes]:
    with ray_nodes() as nodes:
        heal(nodes)
        yield nodes


@dataclass(frozen=True, slots=True)
class Postgres:
    """A PostgreSQL server."""

    url_of: Callable[[str], str]  # of a database by name
    pid: int


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """Give a PostgreSQL server with a database for each study."""
    pgserver = pytest.importorskip("pgserver", reason="the pgserver wheel, a PostgreSQL server, is missing")
    with tempfile.TemporaryDirectory(prefix="autosft-postgres-") as folder:
        server = pgserver.get_server(folder, cleanup_mode=None)
        for number in range(NUM_STUDIES):
            server.psql(f"CREATE DATABASE study{number}; CREATE DATABASE load{number};")
        yield Postgres(url_of=lambda name: str(server.get_uri(database=name)), pid=server.get_pid())
        pgserver.pg_ctl(["-m", "immediate", "stop"], pgdata=server.pgdata, user=server.system_user)


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    """Count the kills of all studies, and show them at the end."""
    tally = Tally()
    yield tally
    print(f"\n{tally.table()}")


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(NUM_STUDIES))
def test_all_kills(number: int, tmp_path: Path, tally: Tally, request: pytest.FixtureRequest) -> None:
    """Alternate between SQLite and PostgreSQL, and between a driver's own Ray and a cluster of two nodes."""
    server: Postgres | None = request.getfixturevalue("postgres") if number % 2 else None
    chaos = Chaos(
        seed=100 + number,
        url=server.url_of(f"study{number}") if server else f"sqlite:///{tmp_path / 'studies.db'}",
        postgres=server and server.pid,
        folder=tmp_path,
        num_trials=40,
        num_kills=NUM_KILLS,
        nodes=request.getfixturevalue("cluster") if number % 4 > 1 else None,
        tally=tally,
    )
    run(chaos, number, tally)


@pytest.fixture(scope="module")
def load() -> Iterator[None]:
    """Keep every core busy, with a loop each more than there are cores for; others' work goes first."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2 * (os.cpu_count() or 1))]
    yield
    for loop in loops:
        loop.kill()
    for loop in loops:
        loop.wait()


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", range(NUM_STUDIES_UNDER_LOAD))
def test_kills_under_load(
    number: int, tmp_path: Path, tally: Tally, load: None, request: pytest.FixtureRequest
) -> None:
    """The same where everything takes three times as long, so that many kills fall into the start-up."""
    server: Postgres | None = request.getfixturevalue("postgres") if number % 2 else None
    chaos = Chaos(
        seed=500 + number,
        url=server.url_of(f"load{number}") if server else f"sqlite:///{tmp_path / 'studies.db'}",
        postgres=server and server.pid,
        folder=tmp_path,
        num_trials=20,
        num_kills=NUM_KILLS,
        nodes=request.getfixturevalue("cluster") if number % 4 == 3 else None,
        tally=tally,
        niceness=19,
    )
    run(chaos, number, tally)


def run(chaos: Chaos, number: int, tally: Tally) -> None:
    """Run a study through its kills, check it, and tell of it."""
    started = time.monotonic()
    torment(chaos)
    check(chaos)
    print(
        f"study {number}: {len(chaos.kills)} kills, {chaos.num_drivers} drivers, nothing left after at most "
        f"{max(chaos.orphans_s):.1f} s, headless for at most {max(chaos.headless_s, default=0.0):.1f} s, "
        f"{time.monotonic() - started:.0f} s; so far {tally.died.total()} kills"
    )
