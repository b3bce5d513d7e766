"""The process that asks the nodes of a Ray cluster for their devices.

    python -m autosft.service.watch_nodes ADDRESS FILE

Writes what they have to FILE whenever it changes, and touches it with each look; says each look on standard
output, an error as its last line.  Ends with its standard input, which is the server's.
"""

from __future__ import annotations

import json
import os
import select
import sys
from contextlib import closing
from pathlib import Path
from typing import IO

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import ClusterProfile
from autosft.profiles.hardware.discover import save_profile
from autosft.scheduler.cluster.nodes import NodeDevices
from autosft.scheduler.cluster.ray_cluster import look_at

LOOK_S = 1.0
NOBODY = ClusterProfile(devices=(), driver_version=None, cuda_version=None)


def main(address: str, file: str) -> None:
    """Watch until the server is gone, or the cluster is."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        try:
            _watch(address, Path(file), out)
        except UserError as error:
            _say(out, {"error": error.message, "remedy": error.remedy})
            raise SystemExit(2) from error


def _watch(address: str, file: Path, out: IO[str]) -> None:
    with look_at(address) as nodes, closing(NodeDevices(nodes, NOBODY)) as devices:
        known: ClusterProfile | None = None
        num_changes = 0
        while True:
            found = devices.devices()
            if found != known:
                part = file.with_suffix(".part")
                save_profile(found, part)
                part.replace(file)
                known = found
                num_changes += 1
            nodes.other_nodes()  # raises once the head is gone; without it no node answers
            os.utime(file)
            _say(out, {"num_changes": num_changes})
            if select.select([sys.stdin], [], [], LOOK_S)[0]:
                return


def _say(out: IO[str], value: object) -> None:
    out.write(json.dumps(value) + "\n")
    out.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
