"""A scheduler's process that says what a test wants: its settings are the script of each of its lives.

Each life is a list of steps: "picture NUMBER" shows an item, "refuse" and "elsewhere" say that it cannot
serve, "hear" waits for one command and shows it as an item's note, "die" ends it, "live" hears until its end.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

from autosft.profiles.errors import UserError
from autosft.service.board import Board, difference
from autosft.service.loop_messages import Pictured, Refused, TrialTold
from autosft.service.store.server_lease import ServedElsewhereError
from tests.service.examples import item

NOW = 1_000_000.0


def main() -> None:
    with os.fdopen(os.dup(0), "rb") as commands, os.fdopen(os.dup(1), "wb") as out:
        folder, lives = pickle.load(commands)
        steps = lives[begun(folder)]
        board = Board()
        for step in steps:
            word, _, number = step.partition(" ")
            match word:
                case "die":
                    os._exit(9)
                case "refuse":
                    message: object = Refused(error=UserError("no device", remedy="add one"))
                case "elsewhere":
                    message = Refused(error=ServedElsewhereError("served by process 7"))
                case "trial":
                    message = TrialTold(owner="ann", data={"trial": int(number)})
                case "live":
                    while commands.readline().strip() not in (b"keep", b"checkpoint", b""):
                        pass
                    return
                case _:
                    note = commands.readline().decode().strip() if word == "hear" else ""
                    after = Board(at=NOW, looked_at=NOW, items=(item(int(number or 1), note=note),))
                    message = Pictured(change=difference(board, after))
                    board = after
            pickle.dump(message, out)
            out.flush()


def begun(folder: Path) -> int:
    """Return how many have lived before."""
    number = len(list(folder.iterdir()))
    (folder / str(number)).touch()
    return number


if __name__ == "__main__":
    main()
