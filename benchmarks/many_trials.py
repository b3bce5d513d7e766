"""A long study of no-op trials: does the driver's memory stay flat, and asking quick?

    python benchmarks/many_trials.py [--trials 2000] [--folder FOLDER] [--json OUT]

The whole loop with real processes under Ray, SQLite and TPE.  Printed are, for a hundred trials at the start
and at the end of each quarter, the driver's CPU time a trial, of it for asking, wall time, and its resident
memory.  With --folder the database stays there, to be opened with `autosft dashboard --storage sqlite:///FOLDER/study.db`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from empty_study import run_no_ops

from autosft.studies.store.study_records import StudyRecords

#: So many trials are compared, the second so many (the first make Python load what it needs) with the last of
#: each part of the study.
NUM_COMPARED = 100
NUM_STRETCHES = 4
NUM_CONCURRENT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """The driver when a trial ended."""

    wall_s: float
    cpu_s: float
    resident_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """What trials cost the driver over a part of the study."""

    end: int  # number of trials that had ended by then
    driver_cpu_ms: float
    ask_cpu_ms: float  # of it, the median
    wall_ms: float
    resident_mib: float  # at its end


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="keep the study here")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="many-trials-") as temporary:
        marks, asks_s = run(given.trials, given.folder or Path(temporary))
    assert len(marks) == given.trials, f"{len(marks)} of {given.trials} trials ended"
    number = min(NUM_COMPARED, given.trials // NUM_STRETCHES)
    ends = [2 * number, *(given.trials * part // NUM_STRETCHES for part in range(1, NUM_STRETCHES + 1))]
    stretches = [stretch(marks[end - number : end], asks_s[end - number : end], end=end) for end in ends]
    for span in stretches:
        print(
            f"the {number} up to trial {span.end}: {span.driver_cpu_ms:.1f} ms of the driver's CPU a trial, "
            f"asking {span.ask_cpu_ms:.1f}; {span.wall_ms:.0f} ms wall time; driver "
            f"{span.resident_mib:.0f} MiB"
        )
    if given.json is not None:
        document = {"num_trials": given.trials, "stretches": [asdict(item) for item in stretches]}
        given.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


def run(num_trials: int, folder: Path) -> tuple[list[Mark], list[float]]:
    """Run the study; return the driver at each trial's end, and the CPU seconds of each ask."""
    folder.mkdir(parents=True, exist_ok=True)
    me = psutil.Process()
    marks: list[Mark] = []
    asks_s: list[float] = []
    ask = StudyRecords.ask

    def timed(records: StudyRecords, **options: Any) -> Any:
        started = time.thread_time()
        trial = ask(records, **options)
        asks_s.append(time.thread_time() - started)
        return trial

    def mark() -> None:
        memory = me.memory_info()
        marks.append(Mark(wall_s=time.perf_counter(), cpu_s=time.process_time(), resident_bytes=memory.rss))

    StudyRecords.ask = timed  # type: ignore[assignment]
    run_no_ops(num_trials, folder, num_concurrent=NUM_CONCURRENT, on_end=mark)
    return marks, asks_s


def stretch(marks: Sequence[Mark], asks_s: Sequence[float], *, end: int) -> Stretch:
    number = len(marks) - 1
    return Stretch(
        end=end,
        driver_cpu_ms=1e3 * (marks[-1].cpu_s - marks[0].cpu_s) / number,
        ask_cpu_ms=1e3 * statistics.median(asks_s),
        wall_ms=1e3 * (marks[-1].wall_s - marks[0].wall_s) / number,
        resident_mib=marks[-1].resident_bytes / 2**20,
    )


if __name__ == "__main__":
    raise SystemExit(main())
