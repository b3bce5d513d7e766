"""Replay searches over recorded learning curves, or record such curves.

    python benchmarks/search.py [--tables FOLDER ...] [--searchers NAME ...] [--workers 1 4 16]
                                [--replays 50] [--quick] [--json FILE]
    python benchmarks/search.py --record FOLDER
    python benchmarks/search.py --rules FILE

Without --tables, those in benchmarks/data/curves are replayed.  A folder may hold our own tables (their
format is described in benchmarks/replay/tables.py) and the kinds that ../shared/curves has; a table that was
kept aside is replayed with the same command.

A replay trains nothing: a trial's evaluations come out of its row, and time is virtual.  The unit is the
tokens of one full run, summed over all workers.  Every searcher begins with the default row, in full.  The
regret is that of the best checkpoint so far, relative to the best of the table; judged, on the other examples
of a table that has them, relative to what an exhaustive search would choose.  Printed are tokens until the
regret is within 1 % and within two tolerances, as the interquartile mean over replays with 95 % intervals
from bootstrapping; a replay that is not there by the end of the budget counts with the budget.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

DATA = Path(__file__).parent / "data" / "curves"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tables", type=Path, nargs="*", default=[DATA], help="folders of tables")
    parser.add_argument("--only", nargs="*", default=[], help="tables whose names contain one of these")
    parser.add_argument("--searchers", nargs="*", default=[], help="all by default")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--replays", type=int, default=50, help="of each searcher; a fifth of the slow ones")
    parser.add_argument("--slow-replays", type=int, default=0, help="of those with Gaussian processes")
    parser.add_argument("--evaluations", type=int, default=8, help="of a run, at most")
    parser.add_argument("--budget", type=float, default=60.0, help="full runs' worth of tokens per replay")
    parser.add_argument("--quick", action="store_true", help="4 replays, one worker, 20 full runs")
    parser.add_argument("--sweeps", action="store_true", help="also tables without curves")
    parser.add_argument("--json", type=Path, help="append one line per table, searcher and workers")
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="train, and write tables here")
    parser.add_argument("--rules", type=Path, metavar="FILE", help="compare rules for LoRA's rate on a sweep")
    arguments = parser.parse_args()
    if arguments.record:
        from replay.record import record

        record(arguments.record)
    elif arguments.rules:
        from replay.rules import compare_rules

        compare_rules(arguments.rules)
    else:
        from replay.report import run
        from replay.tables import TableError

        if arguments.quick:
            arguments.replays, arguments.workers, arguments.budget = 4, [1], 20.0
        try:
            run(arguments)
        except (TableError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    sys.exit(main())
