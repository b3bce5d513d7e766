"""A real `autosft tune` as an item: held in the middle, its server replaced, and gone on with to its end."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.service.devices import MachineDevices
from autosft.service.drivers.command import DriverCommand, driver_command
from autosft.service.drivers.process_drivers import ProcessDrivers
from autosft.service.drivers.study_progress import study_progress
from autosft.service.loop import Loop
from autosft.service.store.queue_store import open_queue
from autosft.service.values import Arguments, Demand, Device, Item, ItemState, Submission, Way
from autosft.studies.store.records import Driver, Records, open_records
from tests.cli.chat_model import make_chat_model, write_chats

S = ItemState
NUM_TRIALS = 3


@pytest.mark.ray
@pytest.mark.slow
def test_a_study_is_held_adopted_and_finished(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    queue, records = open_queue(url), open_records(url)
    devices = MachineDevices("cpu")
    flags = {
        "--model": str(make_chat_model(tmp_path / "model")),
        "--data": str(write_chats(tmp_path / "chats.jsonl")),
        "--study": "small",
        "--storage": url,
        "--output": str(tmp_path / "runs"),
        "--method": "full",
        "--trials": str(NUM_TRIALS),
        "--epochs": "1",
        "--evaluations": "2",
        "--effective-batch-size": "8",
        "--max-concurrent": "1",
        "--learning-rate": "1e-5..1e-2 log",
    }
    arguments = Arguments(command="tune", flags=(*flags.items(), ("--no-prune", ""), ("--json", "")))
    [device] = devices.read(())
    way = Way(
        kind=device.kind,
        width=1,
        bytes_each=1 << 30,
        seconds=60.0,
        seconds_low=30.0,
        seconds_high=120.0,
    )
    item, _ = queue.submit(
        Submission(name="small", owner="ann", arguments=arguments, demand=Demand(ways=(way,))),
        now=time.time(),
    )

    def server() -> tuple[Loop, ProcessDrivers]:
        drivers = ProcessDrivers(
            tmp_path / "items",
            database=url,
            command=functools.partial(here, tmp_path),
            progress=study_progress(records),
        )
        loop = Loop(queue, devices=devices, drivers=drivers, clock=time.time)
        loop.begin(Driver.current())
        return loop, drivers

    def until(is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 600.0
        while not is_so():
            assert time.monotonic() < deadline, drivers.log_path(item.id).read_text()
            loop.tick()
            assert queue.get(item.id).state is not S.FAILED, queue.get(item.id).note
            time.sleep(0.3)

    loop, drivers = server()
    until(lambda: num_finished(records) >= 1)
    assert queue.get(item.id).state is S.RUNNING
    queue.hold(item.id, now=time.time())
    until(lambda: queue.get(item.id).state is S.HELD)
    kept = num_finished(records)
    assert kept < NUM_TRIALS
    queue.release(item.id, now=time.time())
    until(lambda: queue.get(item.id).state is S.RUNNING)
    loop, drivers = server()  # as if the first had been killed: it knows nothing of the driver
    until(lambda: queue.get(item.id).state is S.DONE)
    done = queue.get(item.id)
    assert (done.num_starts, done.num_lost, done.note) == (2, 0, "")
    assert done.progress > kept / NUM_TRIALS
    assert num_finished(records) == NUM_TRIALS
    assert [trial.number for trial in records.read_study("small").trials()] == list(range(NUM_TRIALS))
    records.close()
    queue.close()


def here(folder: Path, item: Item, devices: Sequence[Device]) -> DriverCommand:
    """The product's command, with its folders below the test's."""
    made = driver_command(item, devices, hardware="cpu")
    own = {
        "XDG_DATA_HOME": str(folder / "data"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    return DriverCommand(argv=made.argv, environment={**made.environment, **own})


def num_finished(records: Records) -> int:
    try:
        return records.read_study("small").num_finished()
    except UserError:
        return 0
