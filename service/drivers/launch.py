"""The first thing a driver does: claim its item, then become the command.

    python -P -m autosft.service.drivers.launch COMMAND...      (with the variables below)

Ends with NOT_CLAIMED, having done nothing, if the start was withdrawn or another process has claimed it.
"""

from __future__ import annotations

import os
import sys
import time

from autosft.service.store.queue_store import open_queue
from autosft.studies.values import Driver

DATABASE = "AUTOSFT_QUEUE_DATABASE"
ITEM = "AUTOSFT_QUEUE_ITEM"
LAUNCH = "AUTOSFT_QUEUE_LAUNCH"
NOT_CLAIMED = 75


def main(command: list[str]) -> None:
    """Claim the item of the environment and run `command` in place of this process; raises SystemExit."""
    queue = open_queue(os.environ.pop(DATABASE))
    claimed = queue.claim(
        int(os.environ[ITEM]), launch=os.environ[LAUNCH], process=Driver.current(), now=time.time()
    )
    queue.close()
    if claimed is None:
        raise SystemExit(NOT_CLAIMED)
    sys.stdout.flush()
    os.execvp(command[0], command)  # nosec B606 - the server's own command, without a shell


if __name__ == "__main__":
    main(sys.argv[1:])
