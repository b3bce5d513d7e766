"""Whatever is killed, and whenever: the study ends with what it would have had.

`make test` runs a sample; `make faults` all of it: over 200 kills in 20 studies, each part as often as any
other and by each signal, in one go.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.chaos import Chaos, Part, Tally, heal, torment
from tests.faults.holds import check
from tests.ray_nodes import RayNodes, ray_nodes

pytestmark = [pytest.mark.ray, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

NUM_STUDIES = 20
NUM_KILLS = 11  # a study


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


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """Give the URL of a PostgreSQL server, with NAME in the place of the database."""
    pgserver = pytest.importorskip("pgserver", reason="the pgserver wheel, a PostgreSQL server, is missing")
    with tempfile.TemporaryDirectory(prefix="autosft-postgres-") as folder:
        server = pgserver.get_server(folder, cleanup_mode=None)
        for number in range(NUM_STUDIES):
            server.psql(f"CREATE DATABASE study{number};")
        yield server.get_uri(database="NAME")
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
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    if number % 2:
        url = str(request.getfixturevalue("postgres")).replace("NAME", f"study{number}")
    chaos = Chaos(
        seed=100 + number,
        url=url,
        folder=tmp_path,
        num_trials=40,
        num_kills=NUM_KILLS,
        nodes=request.getfixturevalue("cluster") if number % 4 > 1 else None,
        tally=tally,
    )
    started = time.monotonic()
    torment(chaos)
    check(chaos)
    print(
        f"study {number}: {len(chaos.kills)} kills, {chaos.num_drivers} drivers, nothing left after at most "
        f"{max(chaos.orphans_s):.1f} s, {time.monotonic() - started:.0f} s; so far {tally.died.total()} kills"
    )
