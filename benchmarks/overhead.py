"""Measure what a trial costs beside its training: ours against Ray Tune and bare Optuna, with no-op trials.

    python benchmarks/overhead.py --json OUT [--trials 30] [--rounds 3] [--only ours,optuna]

Every figure is wall time a trial in milliseconds, from the end of the first trial to the end of the last, so
that starting Ray, a first actor or a warm server counts for nobody.  All sample with TPE and keep trials
in SQLite; two trials at once (bare Optuna: one), one report a trial:

    ours_ms            the whole loop: ask, plan, lease, place, run in a forked process under a Ray actor,
                       record, tell
    ray_tune_ms        Ray Tune with OptunaSearch, a new actor a trial (its default)
    ray_tune_reuse_ms  the same with reuse_actors=True
    optuna_ms          ask, report, tell in one process

The same keys with `_driver_cpu_ms` are the CPU time of the process that asks and tells, threads included.

Each measurement is a process of its own, rounds alternate between the contestants, medians are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from empty_study import objective

from autosft.studies.search.sampling import GP_BELOW_NUM_TRIALS

NUM_CONCURRENT = 2

Moment = tuple[float, float]  # seconds of wall time, and of CPU time of the driver


def moment() -> Moment:
    return time.perf_counter(), time.process_time()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result to this file")
    parser.add_argument("--trials", type=int, default=30, help="trials a measurement, 25 or more")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(CONTESTANTS), help="contestants, separated by commas")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trials < GP_BELOW_NUM_TRIALS:
        parser.error(
            f"below {GP_BELOW_NUM_TRIALS} trials ours samples with a Gaussian process, the others with TPE"
        )
    if options.contestant:
        print(json.dumps(measure(options.contestant, options.trials)))
        return 0

    measured: dict[str, list[Moment]] = {name: [] for name in options.only.split(",")}
    skipped: dict[str, str] = {}
    for round_number in range(1, options.rounds + 1):
        for name, times in measured.items():
            if name in skipped:
                continue
            milliseconds, problem = measure_in_process(name, options.trials)
            if problem:
                skipped[name] = problem
                print(f"round {round_number}: {name} skipped: {problem}", flush=True)
            else:
                times.append(milliseconds)
                wall_ms, cpu_ms = milliseconds
                print(
                    f"round {round_number}: {name} {wall_ms:.1f} ms a trial, driver's CPU {cpu_ms:.1f}",
                    flush=True,
                )
    result: dict[str, Any] = {
        f"{name}_ms": round(statistics.median(wall for wall, _ in times), 2) if times else None
        for name, times in measured.items()
    }
    result |= {
        f"{name}_driver_cpu_ms": round(statistics.median(cpu for _, cpu in times), 2) if times else None
        for name, times in measured.items()
    }
    result |= {
        "num_trials": options.trials,
        "num_concurrent": NUM_CONCURRENT,
        "rounds": {name: [round(wall, 2) for wall, _ in times] for name, times in measured.items()},
        "skipped": skipped,
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "load": os.getloadavg()},
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measure_in_process(name: str, num_trials: int) -> tuple[Moment, str]:
    """Return (milliseconds a trial, "") or (zeros, why it could not be measured)."""
    done = subprocess.run(
        [sys.executable, __file__, "--contestant", name, "--trials", str(num_trials)],
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    if done.returncode != 0:
        return (0.0, 0.0), (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    wall_ms, cpu_ms = json.loads(done.stdout.strip().splitlines()[-1])
    return (wall_ms, cpu_ms), ""


def measure(name: str, num_trials: int) -> Moment:
    """Run one contestant; return milliseconds a trial, of wall time and of the driver's CPU time."""
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        ends = CONTESTANTS[name](num_trials, Path(folder))
    assert len(ends) == num_trials, f"{len(ends)} of {num_trials} trials ended"
    wall_s, cpu_s = (last - first for first, last in zip(ends[0], ends[-1], strict=True))
    return wall_s / (len(ends) - 1) * 1000, cpu_s / (len(ends) - 1) * 1000


# --- contestants: run so many trials, return when each ended --------------------------------------------


def ours(num_trials: int, folder: Path) -> list[Moment]:
    from empty_study import run_no_ops

    ends: list[Moment] = []
    run_no_ops(num_trials, folder, num_concurrent=NUM_CONCURRENT, on_end=lambda: ends.append(moment()))
    return ends


def ray_tune(num_trials: int, folder: Path, *, reuse: bool = False) -> list[Moment]:
    import ray
    from optuna.samplers import TPESampler
    from optuna.storages import RDBStorage
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    ends: list[Moment] = []

    class Clock(tune.Callback):  # type: ignore[misc]
        def on_trial_complete(self, *_: Any, **__: Any) -> None:
            ends.append(moment())

    storage = RDBStorage(f"sqlite:///{folder / 'tune.db'}")

    def trainable(config: dict[str, float]) -> None:
        tune.report({"loss": objective(config["learning_rate"])})

    os.environ["RAY_AUTH_MODE"] = "disabled"  # else it leaves a token in the home folder
    ray.init(
        num_cpus=NUM_CONCURRENT,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=str(folder / "ray"),
    )
    tune.Tuner(
        trainable,
        param_space={"learning_rate": tune.loguniform(1e-6, 1e-2)},
        tune_config=tune.TuneConfig(
            metric="loss",
            mode="min",
            search_alg=OptunaSearch(sampler=TPESampler(seed=0), storage=storage),
            num_samples=num_trials,
            max_concurrent_trials=NUM_CONCURRENT,
            reuse_actors=reuse,
        ),
        run_config=tune.RunConfig(storage_path=str(folder), verbose=0, callbacks=[Clock()]),
    ).fit()
    ray.shutdown()
    return ends


def ray_tune_reuse(num_trials: int, folder: Path) -> list[Moment]:
    return ray_tune(num_trials, folder, reuse=True)


def optuna(num_trials: int, folder: Path) -> list[Moment]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'optuna.db'}", sampler=optuna.samplers.TPESampler(seed=0)
    )
    ends: list[Moment] = []
    for _ in range(num_trials):
        trial = study.ask()
        value = objective(trial.suggest_float("learning_rate", 1e-6, 1e-2, log=True))
        trial.report(value, step=1)
        study.tell(trial, value)
        ends.append(moment())
    return ends


CONTESTANTS: dict[str, Callable[[int, Path], list[Moment]]] = {
    "ours": ours,
    "ray_tune": ray_tune,
    "ray_tune_reuse": ray_tune_reuse,
    "optuna": optuna,
}


if __name__ == "__main__":
    sys.exit(main())
