"""A server's first process without HTTP: prints the scheduler's pid whenever a new one has begun.

python -m tests.service.parent_script URL FOLDER                 (ends when its input does)
python -m tests.service.parent_script URL FOLDER --scheduler     its child
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from pathlib import Path

from autosft.profiles.child_python import python
from autosft.service import loop_child
from autosft.service.board import Board
from autosft.service.drivers.process_drivers import ProcessDrivers
from autosft.service.live import LiveBoard
from autosft.service.loop import Loop
from autosft.service.loop_child import LoopChild
from autosft.service.loop_process import Outbox, Parts, Work
from autosft.service.store.queue_store import open_queue
from tests.service.server_script import FixedDevices, script_command


def parent(url: str, folder: Path) -> None:
    seen: set[int] = set()

    def publish(_: Board) -> None:
        if child.pid is not None and child.pid not in seen:
            seen.add(child.pid)
            print(child.pid, flush=True)

    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    loop_child.FIRST_PAUSE_S = 0.0
    command = python("-m", "tests.service.parent_script", url, str(folder), "--scheduler")
    child = LoopChild(command, None, clock=time.time, publish=publish)
    child.begin()
    sys.stdin.read()
    child.end(checkpoint=False)


def scheduler(url: str, folder: Path) -> None:
    commands = os.fdopen(os.dup(0), "rb")
    pickle.load(commands)
    queue = open_queue(url)
    drivers = ProcessDrivers(
        folder / "items", database=url, command=lambda item, devices: script_command(folder, item, devices)
    )
    loop = Loop(queue, devices=FixedDevices(0), drivers=drivers, clock=time.time)
    live = LiveBoard(queue, loop, clock=time.time, uses=lambda _: ())
    with os.fdopen(os.dup(1), "wb") as out:
        Work(Parts(queue=queue, loop=loop, live=live, drivers=drivers, url=""), Outbox(out)).run(commands)


if __name__ == "__main__":
    (scheduler if "--scheduler" in sys.argv else parent)(sys.argv[1], Path(sys.argv[2]))
