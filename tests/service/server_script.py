"""A server of a queue whose items are `drivers_script.py`: the process that a test kills.

python -m tests.service.server_script URL FOLDER NUM_DEVICES
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from autosft.service.drivers.command import DriverCommand
from autosft.service.drivers.process_drivers import ProcessDrivers
from autosft.service.loop import Loop
from autosft.service.store.queue_store import open_queue
from autosft.service.values import Device, Item
from autosft.studies.values import Driver
from tests.service.examples import device

SCRIPT = Path(__file__).with_name("drivers_script.py")


class FixedDevices:
    """Devices that nobody else uses."""

    def __init__(self, num_devices: int) -> None:
        self.devices = tuple(map(device, range(num_devices)))

    def read(self, own_pids: object) -> tuple[Device, ...]:
        return self.devices


def script_command(folder: Path, item: Item, devices: Sequence[Device]) -> DriverCommand:
    mode = dict(item.arguments.flags)["--mode"]
    argv = (sys.executable, str(SCRIPT), mode, str(folder / f"work-{item.id}"))
    return DriverCommand(argv=argv, environment={"DEVICES": ",".join(one.uuid for one in devices)})


def main(url: str, folder: Path, num_devices: int) -> None:
    is_stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: is_stopped.append(number))
    queue = open_queue(url)
    drivers = ProcessDrivers(
        folder / "items", database=url, command=lambda item, devices: script_command(folder, item, devices)
    )
    loop = Loop(queue, devices=FixedDevices(num_devices), drivers=drivers, clock=time.time)
    loop.begin(Driver.current())
    loop.run(lambda: bool(is_stopped), every_s=0.02)
    loop.end()
    queue.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
