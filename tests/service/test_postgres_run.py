"""A server over PostgreSQL whose database goes away while a study runs: nothing is lost or run twice."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from autosft.profiles.errors import UserError
from autosft.service.client import Client
from autosft.studies.store.records import open_records
from autosft.studies.trial import TrialState
from tests.postgres_again import start_again
from tests.service.house import House, furnished

pytestmark = [pytest.mark.ray, pytest.mark.faults]
NUM_TRIALS, NUM_EVALUATIONS = 2, 4


class Postgres:
    """A PostgreSQL server of its own, which can go away and come back."""

    def __init__(self, folder: str) -> None:
        pgserver = pytest.importorskip(
            "pgserver", reason="the pgserver wheel, a PostgreSQL server, is missing"
        )
        self._pgserver = pgserver
        self._server: Any = pgserver.get_server(folder, cleanup_mode=None)
        self._server.psql("CREATE DATABASE queue;")
        self.url = str(self._server.get_uri(database="queue")).replace("postgres:@", "postgres@")

    def _processes(self) -> list[psutil.Process]:
        master = psutil.Process(self._server.get_pid())
        return [master, *master.children(recursive=True)]

    def leave(self, how: str) -> None:
        if how == "suspended":
            for process in self._processes():
                with suppress(psutil.NoSuchProcess):  # one that served a connection
                    process.send_signal(signal.SIGSTOP)
        else:
            self._pgserver.pg_ctl(
                ["-m", "immediate", "stop"], pgdata=self._server.pgdata, user=self._server.system_user
            )

    def come_back(self, how: str) -> None:
        if how == "suspended":
            for process in self._processes():
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)
        else:
            start_again(self._server)


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    with tempfile.TemporaryDirectory(prefix="autosft-postgres-") as folder:
        made = Postgres(folder)
        yield made
        made.come_back("suspended")
        made.leave("stopped")


@pytest.fixture
def house(tmp_path: Path, postgres: Postgres) -> Iterator[House]:
    made = furnished(tmp_path, options=("--hardware", "cpu", "--storage", postgres.url))
    yield made
    made.end()


AWAY = [
    ("stopped", 0.0),
    ("stopped", 60.0),
    ("suspended", 60.0),
]


@pytest.mark.parametrize(("how", "away_s"), AWAY)
def test_a_database_that_is_away_loses_nothing(
    house: House, postgres: Postgres, how: str, away_s: float
) -> None:
    house.start()
    settings = {"model": "llama", "data": "chats.jsonl", "method": "full", "prune": False}
    settings |= {"trials": NUM_TRIALS, "evaluations": NUM_EVALUATIONS, "seq_len": 128}
    with house.client() as client:
        first = client.submit("tune", settings | {"epochs": 12}, name="first")["id"]
        second = client.submit("tune", settings | {"epochs": 1}, name="second")["id"]
        with closing(open_records(postgres.url)) as records:
            house.until(lambda: records.find_study("first") is not None)
            house.until(lambda: any(one.measurements for one in records.read_study("first").trials()))
        postgres.leave(how)
        left_at = time.monotonic()
        with ThreadPoolExecutor(max_workers=20) as several:  # who asks meanwhile waits, or is told
            asked = [several.submit(told, house.client, first) for _ in range(20)]
            sent = several.submit(
                lambda: client.submit("tune", settings | {"epochs": 1}, name="third", key="sent-meanwhile")
            )
            house.until(lambda: said_away(house) or time.monotonic() - left_at > 10)
            if away_s:
                time.sleep(max(0.0, away_s - (time.monotonic() - left_at)))
            postgres.come_back(how)
            said = [one.result() for one in asked]
            assert not [one for one in said if "bug in autosft" in one or "There is no item" in one], said
            answer = sent.exception() or sent.result()
        assert "bug in autosft" not in str(answer)
        again = client.submit("tune", settings | {"epochs": 1}, name="third", key="sent-meanwhile")
        assert isinstance(answer, UserError) or answer["id"] == again["id"]
        ids = [first, second, again["id"]]
        house.until(lambda: all(client.item(each)["state"] in ("done", "failed") for each in ids))
        shown = [client.item(each) for each in ids]
        assert [item["state"] for item in shown] == ["done"] * 3, (shown, house.said())
        assert len(client.items()) == 3
    with closing(open_records(postgres.url)) as records:
        for name in ("first", "second", "third"):
            trials = records.read_study(name).trials()
            assert [trial.number for trial in trials] == list(range(NUM_TRIALS))
            for trial in trials:
                assert trial.state is TrialState.COMPLETED
                assert len({one.step for one in trial.measurements}) == NUM_EVALUATIONS


def told(connect: Any, item: int) -> str:
    """Return what somebody is told who asks for an item."""
    client: Client = connect()
    with client:
        try:
            return str(client.item(item)["state"])
        except UserError as error:
            return str(error)


def said_away(house: House) -> bool:
    """Whether the server has said that it waits for the database."""
    return "Waiting up to" in (house.folder / "server.log").read_text()
