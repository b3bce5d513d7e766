"""Kill the driver of a study with SIGKILL, start it again, count: ours against Ray Tune with OptunaSearch.

    python benchmarks/crash.py --json OUT [--trials 30] [--kill-after 8] [--rounds 1] [--only ours,ray_tune]

Both sample with TPE, keep trials in SQLite, run two at once and are asked for the same number of trials.  The
driver is killed when so many have ended, at whatever it does then; the second run is what each of them
documents for going on: the same command again, and `Tuner.restore`.  Reported are the trials that finished
over both runs, results that were recorded twice, and how the second run ended.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

NUM_CONCURRENT = 2
TRIAL_S = 0.3
RUN_LIMIT_S = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result to this file")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--kill-after", type=int, default=8, help="ended trials before the kill")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default=",".join(CONTESTANTS), help="contestants, separated by commas")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        run, _ = CONTESTANTS[options.contestant]
        run(options.trials, options.folder)
        return 0

    result: dict[str, Any] = {"num_trials": options.trials, "kill_after": options.kill_after}
    for name in options.only.split(","):
        result[name] = []
        for number in range(1, options.rounds + 1):
            outcome = crash(name, options.trials, options.kill_after)
            result[name].append(outcome)
            print(f"round {number}: {name}: {json.dumps(outcome)}", flush=True)
    result["machine"] = {"cpus": os.cpu_count(), "system": platform.platform(), "load": os.getloadavg()}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def crash(name: str, num_trials: int, kill_after: int) -> dict[str, Any]:
    """Run a contestant, kill it, run it again; return what is left."""
    with tempfile.TemporaryDirectory(prefix="crash-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        first = start(name, num_trials, folder)
        deadline = time.monotonic() + RUN_LIMIT_S
        while num_ended(folder) < kill_after and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.wait()
        ended_before = num_ended(folder)
        second = start(name, num_trials, folder)
        try:
            code = second.wait(RUN_LIMIT_S)
        except subprocess.TimeoutExpired:
            second.kill()
            code = second.wait()
        _, count = CONTESTANTS[name]
        errors = [
            line for line in (folder / "log").read_text(errors="replace").splitlines() if "Error" in line
        ]
        return {
            "ended_before_the_kill": ended_before,
            **count(folder),
            "exit_code_of_second_run": code,
            "last_error": errors[-1][:200] if code and errors else "",
        }


def start(name: str, num_trials: int, folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--contestant",
                name,
                "--trials",
                str(num_trials),
                "--folder",
                str(folder),
            ],
            stdout=log,
            stderr=log,
        )


def num_ended(folder: Path) -> int:
    path = folder / "ended"
    return len(path.read_text().splitlines()) if path.exists() else 0


def note_end(folder: Path) -> None:
    with (folder / "ended").open("a") as file:
        file.write("trial\n")


# --- contestants: run (or go on with) a study; count what it has ------------------------------------------


def slow_no_op(job: Any, report: Any, stop_requested: Any) -> Any:
    """Take a while, report one evaluation and end; runs in the forked process."""
    from empty_study import no_op

    time.sleep(TRIAL_S)
    return no_op(job, report, stop_requested)


def ours(num_trials: int, folder: Path) -> None:
    from empty_study import run_no_ops

    run_no_ops(
        num_trials,
        folder,
        num_concurrent=NUM_CONCURRENT,
        on_end=lambda: note_end(folder),
        function="crash:slow_no_op",
    )


def count_ours(folder: Path) -> dict[str, Any]:
    from autosft.studies.store.records import open_records

    with closing(open_records(f"sqlite:///{folder / 'study.db'}")) as records:
        study = records.read_study("empty")
        results = collections.Counter(
            attempt.trial for attempt in study.attempts() if attempt.outcome == "completed"
        )
        return {
            "finished": study.num_finished(),
            "started": len(study.trials()),
            "recorded_twice": sum(number > 1 for number in results.values()),
        }


def ray_tune(num_trials: int, folder: Path) -> None:
    import ray
    from empty_study import objective
    from optuna.samplers import TPESampler
    from optuna.storages import RDBStorage
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    class Clock(tune.Callback):  # type: ignore[misc]
        def on_trial_complete(self, *_: Any, **__: Any) -> None:
            note_end(folder)

    def trainable(config: dict[str, float]) -> None:
        time.sleep(TRIAL_S)
        tune.report({"loss": objective(config["learning_rate"])})

    os.environ["RAY_AUTH_MODE"] = "disabled"  # else it leaves a token in the home folder
    ray.init(num_cpus=NUM_CONCURRENT, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    path = folder / "experiment"
    if tune.Tuner.can_restore(path):
        tuner = tune.Tuner.restore(
            str(path), trainable, resume_unfinished=True, resume_errored=False, restart_errored=False
        )
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={"learning_rate": tune.loguniform(1e-6, 1e-2)},
            tune_config=tune.TuneConfig(
                metric="loss",
                mode="min",
                search_alg=OptunaSearch(
                    sampler=TPESampler(seed=0),
                    study_name="crash",
                    storage=RDBStorage(f"sqlite:///{folder / 'tune.db'}"),
                ),
                num_samples=num_trials,
                max_concurrent_trials=NUM_CONCURRENT,
            ),
            run_config=tune.RunConfig(
                name=path.name, storage_path=str(folder), verbose=0, callbacks=[Clock()]
            ),
        )
    tuner.fit()
    ray.shutdown()


def count_ray_tune(folder: Path) -> dict[str, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(study_name="crash", storage=f"sqlite:///{folder / 'tune.db'}")
    states = collections.Counter(trial.state.name for trial in study.trials)
    return {"finished": states["COMPLETE"], "started": len(study.trials), "states": dict(states)}


CONTESTANTS: dict[str, tuple[Callable[[int, Path], None], Callable[[Path], dict[str, Any]]]] = {
    "ours": (ours, count_ours),
    "ray_tune": (ray_tune, count_ray_tune),
}


if __name__ == "__main__":
    sys.exit(main())
