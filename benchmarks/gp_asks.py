"""How long a Gaussian process takes to suggest a trial, with and without `greenlet`.

    python benchmarks/gp_asks.py [--trials 24,200] [--asks 3] [--json OUT]

Optuna's sampler improves its suggestion from many starts at once where `greenlet` is installed, else from one
after another, with a warning that the terminal never shows.  Each figure is the median CPU time of some asks,
in a process of its own on one thread, after as many finished trials (24: the longest study that we sample so;
200: as users of Optuna have it).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

WAYS = ("with", "without")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", default="24,200", help="finished trials before the asks")
    parser.add_argument("--asks", type=int, default=3, help="asks a figure")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(asks_s(int(options.trials), options.asks, has_greenlet=options.way == "with")))
        return 0
    rows = []
    for num_trials in map(int, options.trials.split(",")):
        taken = {way: statistics.median(in_process(way, num_trials, options.asks)) for way in WAYS}
        ratio = taken["without"] / taken["with"]
        rows.append({"num_trials": num_trials, **{f"{way}_s": taken[way] for way in WAYS}, "ratio": ratio})
        print(
            f"after {num_trials} trials an ask takes {taken['with']:.2f} s of one core with greenlet, "
            f"{taken['without']:.2f} s without: {ratio:.1f} times as long",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def in_process(way: str, num_trials: int, num_asks: int) -> list[float]:
    command = [sys.executable, __file__, "--way", way, "--trials", str(num_trials), "--asks", str(num_asks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    times: list[float] = json.loads(done.stdout.splitlines()[-1])
    return times


def asks_s(num_trials: int, num_asks: int, *, has_greenlet: bool) -> list[float]:
    """Return what asks after `num_trials` finished trials of a smooth function take, in seconds each."""
    if not has_greenlet:
        sys.modules["greenlet"] = None  # type: ignore[assignment]  # importing it raises ImportError
    import optuna
    import torch
    from optuna.distributions import FloatDistribution, IntDistribution

    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = {
        "learning_rate": FloatDistribution(1e-6, 1e-2, log=True),
        "warmup_ratio": FloatDistribution(0.0, 0.1),
        "weight_decay": FloatDistribution(0.0, 0.1),
        "lora_rank": IntDistribution(4, 128, log=True),
        "lora_alpha_ratio": FloatDistribution(0.5, 4.0),
    }
    study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=0, n_startup_trials=1))
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(num_trials):
        given = drawn.ask(space).params
        study.add_trial(
            optuna.trial.create_trial(params=given, distributions=space, value=smooth_loss(given))
        )
    times = []
    for _ in range(1 + num_asks):
        started = time.process_time()
        trial = study.ask(space)
        times.append(time.process_time() - started)
        study.tell(trial, smooth_loss(trial.params))
    return times[1:]  # the first imports what a Gaussian process needs


def smooth_loss(given: dict[str, float]) -> float:
    from math import log10

    distance = (log10(given["learning_rate"]) + 4) ** 2 + (log10(given["lora_rank"]) - 1.5) ** 2
    return 2.0 + 0.1 * distance + given["warmup_ratio"] * given["weight_decay"]


if __name__ == "__main__":
    raise SystemExit(main())
