"""What a test's driver does: `python drivers_script.py MODE FOLDER` in place of a command of autosft.

Counts its runs in FOLDER/runs and keeps what it has done in FOLDER/checkpoint, from which it goes on.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def main(mode: str, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    is_stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: is_stopped.append(number))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with (folder / "runs").open("a") as runs:
        runs.write(f"{os.getpid()} {os.environ['AUTOSFT_QUEUE_LAUNCH']} {os.environ.get('DEVICES', '')}\n")
    checkpoint = folder / "checkpoint"
    is_second = checkpoint.exists()
    print("running", mode, flush=True)
    match mode:
        case "done":
            return 0
        case "fails":
            print("some lines before")
            print("error: bad.jsonl line 3: no assistant turn.\n       Remove the record.", flush=True)
            return 1
        case "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        case "dies once" if is_second:
            return 0
        case "dies once":
            checkpoint.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        case "greedy":
            (folder / "score").write_text(Path("/proc/self/oom_score_adj").read_text().strip())
            held = []
            while True:  # until somebody is killed for it
                held.append(b"1" * (4 << 20))
        case "waits once" if is_second:
            return 0
    checkpoint.touch()
    while not is_stopped or mode == "hangs":
        time.sleep(0.02)
    return 130


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2])))
