"""A server as two people use it: real studies, by command and by page, one preempted, the server killed."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from autosft.service.client import Client
from autosft.studies.store.records import open_records
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import TrialState
from tests.service.api.chromium import PROGRAM, Page, opened
from tests.service.house import House, furnished

NUM_TRIALS = 2
COMMON = ("--model", "llama", "--data", "chats.jsonl", "--method", "full", "--no-prune", "--evaluations", "4")


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = furnished(tmp_path, options=("--hardware", "cpu", "--preempt-after", "0"))
    yield made
    made.end()


@pytest.mark.ray
@pytest.mark.slow
def test_two_people_share_a_server_that_is_killed(house: House) -> None:
    house.add_user("ada", "--role", "admin")
    house.add_user("bob")
    house.start()
    with house.client("ada") as ada, house.client("bob") as bob:
        tune(house, "bob", "first", "--epochs", "36")
        submit_by_page(house, "ada", "second")
        tune(house, "bob", "third", "--epochs", "1")
        house.run("queue", "clone", "third", "--name", "fourth", "--", "--learning-rate", "1e-3", by="bob")
        house.until(lambda: has_measured(house, bob, "first"))
        first = bob.find("first")
        driver = driver_of(house)
        house.kill_server()
        house.start()
        assert driver.is_running(), "the driver has died with the server"
        assert bob.find("first")["num_starts"] == 1
        house.run("queue", "priority", "second", "5", by="ada")
        house.until(lambda: bob.find("first")["state"] == "preempted")
        assert not driver.is_running()
        assert "gives way" in bob.find("first")["note"]
        house.until(lambda: ada.find("second")["state"] == "running")
        look_at_page(house, "ada", first["id"])
        house.until(lambda: all(item["state"] == "done" for item in ada.items()))
        log = house.run("queue", "log", "first", by="bob")
        starts = {item["name"]: item["num_starts"] for item in ada.items()}
    assert starts == {"first": 2, "second": 1, "third": 1, "fourth": 1}
    with closing(open_records(house.database)) as records:
        for name in starts:
            check_exact(records.read_study(name))
        check_went_on(records.read_study("first"), log)
        [setting] = {trial.settings.learning_rate for trial in records.read_study("fourth").trials()}
        assert setting == 1e-3
    assert house.server is not None
    house.server.send_signal(signal.SIGTERM)
    assert house.server.wait(60) == 0
    house.until(lambda: not house.processes())


@pytest.mark.ray
@pytest.mark.slow
def test_a_server_that_is_stopped_for_a_while_saves_what_runs(tmp_path: Path) -> None:
    house = furnished(tmp_path, options=("--hardware", "cpu", "--on-stop", "checkpoint"))
    try:
        house.start()
        with house.client() as client:
            settings = {"model": "llama", "data": "chats.jsonl", "method": "full", "prune": False}
            settings |= {"trials": NUM_TRIALS, "evaluations": 4, "epochs": 24}
            item = client.submit("tune", settings, name="first")["id"]
            house.until(lambda: has_measured(house, client, "first"))
            assert house.server is not None
            house.server.send_signal(signal.SIGTERM)
            assert house.server.wait(120) == 0
            house.until(lambda: not house.processes())  # saved, and gone
            with closing(open_records(house.database)) as records:
                study = records.read_study("first")
                assert study.num_finished() < NUM_TRIALS
                assert any(kept.has_resume_state for kept in study.checkpoints())
            house.start()
            house.until(lambda: client.item(item)["state"] == "done")
            assert client.item(item)["num_starts"] == 2
            log = house.run("queue", "log", "first", "--server", house.url)
        with closing(open_records(house.database)) as records:
            check_exact(records.read_study("first"))
            check_went_on(records.read_study("first"), log)
    finally:
        house.end()


def tune(house: House, by: str, name: str, *flags: str) -> None:
    words = ("tune", *COMMON, "--study", name, "--trials", str(NUM_TRIALS), *flags)
    house.run("submit", "--server", house.url, "--", *words, by=by)


def has_measured(house: House, client: Client, name: str) -> bool:
    """Whether a study runs and an evaluation of it is recorded."""
    if client.find(name)["state"] != "running":
        return False
    with closing(open_records(house.database)) as records:
        if records.find_study(name) is None:
            return False
        return any(trial.measurements for trial in records.read_study(name).trials())


def driver_of(house: House) -> psutil.Process:
    [found] = [one for one in house.processes() if one.cmdline()[1:5] == ["-P", "-m", "autosft", "tune"]]
    return found


def check_exact(study: StudyRecords) -> None:
    """Assert that each trial was recorded once, and each of its evaluations once."""
    trials = study.trials()
    assert [trial.number for trial in trials] == list(range(NUM_TRIALS))
    for trial in trials:
        assert trial.state is TrialState.COMPLETED, trial
        steps = [one.step for one in trial.measurements]
        assert steps == sorted(set(steps))
        assert len(steps) == 4


def check_went_on(study: StudyRecords, log: str) -> None:
    """Assert that what was preempted went on from its checkpoints."""
    again = [one for one in study.attempts() if one.number > 1]
    assert again, [(one.trial, one.outcome) for one in study.attempts()]
    assert {one.outcome for one in again} == {"completed"}
    assert "resumes at step" in log


# The page


def submit_by_page(house: House, by: str, name: str) -> None:
    """Fill in the form; without a browser, send what it sends."""
    lines = ["model = llama", "data = chats.jsonl", "method = full", "prune = false", "evaluations = 4"]
    lines += [f"trials = {NUM_TRIALS}", "epochs = 1"]
    if PROGRAM is None:
        settings = dict(line.split(" = ") for line in lines) | {"prune": False}
        with house.client(by) as client:
            client.submit("tune", settings, name=name)
        return
    text = "\\n".join(lines)
    fill = (
        f"document.querySelector('[name=name]').value = {name!r};"
        f"document.querySelector('[name=lines]').value = '{text}';"
        "document.querySelector('form button').click()"
    )

    async def main(page: Page) -> None:
        await page.open(f"{house.url}/page/new")
        await page.until("document.querySelector('form button')?.disabled === false")
        await page.value(fill)
        await page.until("location.pathname.startsWith('/page/items/')")

    with_page(house, by, main)


def look_at_page(house: House, by: str, item: int) -> None:
    """Open queue and study at two widths, light and dark; nothing is cut off, and no script has failed."""
    if PROGRAM is None:
        return

    async def main(page: Page) -> None:
        for number, path in enumerate(("/", f"/page/items/{item}")):
            for width in (400, 1280):
                for dark in (False, True):
                    await page.open(house.url + path, width=width, dark=dark)
                    too_wide = await page.value("document.documentElement.scrollWidth - innerWidth")
                    assert too_wide <= 0, (path, width)
                    shade = "dark" if dark else "light"
                    await page.screenshot(house.folder / f"page-{number}-{width}-{shade}.png")
        assert "preempted" in await page.value("document.querySelector('h1').textContent")
        assert page.errors == []

    with_page(house, by, main)


def with_page(house: House, by: str, use: Callable[[Page], Any]) -> None:
    async def main() -> None:
        async with opened(Path(tempfile.mkdtemp(dir=house.folder))) as page:
            await page.open(f"{house.url}/login")
            await page.until("document.querySelector('form button')?.disabled === false")
            await page.value(f"document.querySelector('[name=token]').value = {house.tokens[by]!r}")
            await page.value("document.querySelector('form button').click()")
            await page.until("location.pathname === '/' && document.readyState === 'complete'")
            await use(page)

    asyncio.run(main())
