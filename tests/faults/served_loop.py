"""The scheduler's process of `served.py`: the product's, whose items are studies without a model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from autosft.service import loop_process
from autosft.service.drivers.command import DriverCommand
from autosft.service.settings import Settings
from autosft.service.values import Device, Item


def study_without_model(item: Item, _devices: Sequence[Device], settings: Settings) -> DriverCommand:
    flags = dict(item.arguments.flags)
    folder = settings.limits.outputs / item.name
    folder.mkdir(exist_ok=True)
    options = {
        "url": settings.storage,
        "folder": str(folder),
        "num_trials": int(flags["--trials"]),
        "study": item.name,
        "address": os.environ["DRIVERS_ADDRESS"] or None,
        "is_of_queue": True,
    }
    command = (sys.executable, "-m", "tests.faults.driver", json.dumps(options))
    return DriverCommand(argv=command, environment={"RAY_gcs_rpc_server_reconnect_timeout_s": "5"})


if __name__ == "__main__":
    loop_process.recorded = study_without_model
    loop_process.main()
