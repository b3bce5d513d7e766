"""The first thing a driver does: claim its item, then become the command.

    python -P -m autosft.service.drivers.launch COMMAND...      (with the variables below)

Ends with NOT_CLAIMED, having done nothing, if the start was withdrawn or another process has claimed it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from contextlib import closing
from pathlib import Path

from autosft.service.store.queue_store import open_queue
from autosft.service.values import Item
from autosft.studies.store.database import AWAY_S, RETRY_S, DatabaseError
from autosft.studies.values import Driver

DATABASE = "AUTOSFT_QUEUE_DATABASE"
ITEM = "AUTOSFT_QUEUE_ITEM"
LAUNCH = "AUTOSFT_QUEUE_LAUNCH"
NOT_CLAIMED = 75


#: Of the kernel's choice when memory runs out, from -1000 to 1000: before the server, the shell that tells of
#: the driver's end and everything else that has said nothing.
OUT_OF_MEMORY_SCORE = 500


def be_chosen_first() -> None:
    """Have the kernel end this process and what it starts before the server, when memory runs out (Linux).

    What is ended goes on from its checkpoints; a server, a database or a login that is ended all would miss.
    """
    score = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError, ValueError):
        if int(score.read_text()) < OUT_OF_MEMORY_SCORE:
            score.write_text(str(OUT_OF_MEMORY_SCORE))


def claim(database: str) -> Item | None:
    """Claim the item of the environment, waiting for a database that is away; None if it is not to run.

    A claim whose answer was lost is found by claiming again: it is this process's then.
    """
    deadline = time.monotonic() + AWAY_S
    while True:
        try:
            with closing(open_queue(database)) as queue:
                return queue.claim(
                    int(os.environ[ITEM]),
                    launch=os.environ[LAUNCH],
                    process=Driver.current(),
                    now=time.time(),
                )
        except DatabaseError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(RETRY_S)


def main(command: list[str]) -> None:
    """Claim the item of the environment and run `command` in place of this process; raises SystemExit."""
    claimed = claim(os.environ.pop(DATABASE))
    if claimed is None:
        raise SystemExit(NOT_CLAIMED)
    be_chosen_first()
    sys.stdout.flush()
    os.execvp(command[0], command)  # nosec B606 - the server's own command, without a shell


if __name__ == "__main__":
    main(sys.argv[1:])
