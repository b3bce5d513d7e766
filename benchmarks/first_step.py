"""Measure how long a trial takes from being asked for to its first training step, the model's loading aside.

    python -m benchmarks.first_step [--trials 30] [--concurrent 1] [--json OUT]

Real trainings of a model of a few thousand parameters, a few steps each, by the whole loop: TPE, SQLite, Ray,
a forked process, trl.  Printed are medians over the trials but the first, in milliseconds, by what passes:

    asking     the sampler's proposal, planning and placing, until the attempt is written down
    starting   until training begins in a process of its own
    preparing  until the first step: data, trainer and optimizer; without the model's loading

The next trial's model is loaded while one trains, as in any study; what of it falls behind the asking is
taken off.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from autosft.profiles.hardware.discover import profile_hardware
from autosft.studies.files.checkpoints import trial_dir
from autosft.studies.search.sampling import GP_BELOW_NUM_TRIALS
from autosft.studies.search.space import FixedSettings
from autosft.studies.store import tables
from autosft.studies.trial import AttemptEnd, Measurement, StopReason, TrialJob
from autosft.workers.processes.starters import WARM_IMPORTS
from benchmarks.empty_study import describe_study, run_on_ray

NUM_TRAIN_EXAMPLES = 64
TIMES = "times.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """What one trial took until its first step, in milliseconds."""

    asking_ms: float
    starting_ms: float
    preparing_ms: float
    loading_ms: float  # of the model, not in any of the others

    @property
    def total_ms(self) -> float:
        return self.asking_ms + self.starting_ms + self.preparing_ms


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=30, help=f"{GP_BELOW_NUM_TRIALS} or more, for TPE")
    parser.add_argument("--concurrent", type=int, default=1, help="trials at once, a thread each")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    given = parser.parse_args(arguments)
    if given.trials < GP_BELOW_NUM_TRIALS:
        parser.error(f"below {GP_BELOW_NUM_TRIALS} trials a Gaussian process samples, not TPE")
    with tempfile.TemporaryDirectory(prefix="first-step-") as folder:
        measured = measure(given.trials, given.concurrent, Path(folder))[1:]
    names = ("asking_ms", "starting_ms", "preparing_ms", "loading_ms", "total_ms")
    medians = {name: statistics.median(getattr(item, name) for item in measured) for name in names}
    print(", ".join(f"{name.removesuffix('_ms')} {value:.0f} ms" for name, value in medians.items()))
    if given.json is not None:
        document = {
            "medians": medians,
            "trials": [asdict(item) for item in measured],
            "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "load": os.getloadavg()},
        }
        given.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


def measure(num_trials: int, num_concurrent: int, folder: Path) -> list[Overhead]:
    """Run the study; return what each trial took, in the order of asking."""
    from tests.workers.small import make_data, make_model, pinned

    model, data = make_model(folder / "model"), make_data(folder / "data")
    devices = profile_hardware("cpu").devices
    spec, run = describe_study(num_trials, folder, devices, slots_a_device=num_concurrent)
    like_theirs = pinned(data, num_evaluations=1)
    spec = replace(spec, pinned=like_theirs, fixed=FixedSettings(num_train_examples=NUM_TRAIN_EXAMPLES))
    run = replace(run, pinned=like_theirs, model=str(model), data_dir=str(data))
    run_on_ray(
        spec,
        run,
        folder,
        function="benchmarks.first_step:train",
        prepare_function="benchmarks.first_step:load_ahead",
        imports=WARM_IMPORTS,
        on_end=lambda: None,
    )
    engine = sa.create_engine(f"sqlite:///{folder / 'study.db'}")
    query = (
        sa.select(tables.trials.c.number, tables.trials.c.asked_at, tables.attempts.c.started_at)
        .join(tables.attempts)
        .order_by(tables.trials.c.number)
    )
    with closing(engine.connect()) as connection:
        rows = connection.execute(query).all()
    assert len(rows) == num_trials, f"{len(rows)} attempts for {num_trials} trials"
    return [overhead_of(folder, *row) for row in rows]


def overhead_of(folder: Path, number: int, asked_at: float, started_at: float) -> Overhead:
    times = json.loads((trial_dir(folder / "output", number) / TIMES).read_text())
    train_at, first_step_at = times["train"], times["first_step"]

    def loading_s(since: float, until: float) -> float:
        return sum(max(0.0, min(ended, until) - max(began, since)) for began, ended in times["loads"])

    return Overhead(
        asking_ms=1e3 * (started_at - asked_at),
        starting_ms=1e3 * (train_at - started_at - loading_s(asked_at, train_at)),
        preparing_ms=1e3 * (first_step_at - train_at - loading_s(train_at, first_step_at)),
        loading_ms=1e3 * loading_s(asked_at, first_step_at),
    )


# In the trial's process

_loads: list[tuple[float, float]] = []


def load_ahead(job: TrialJob) -> None:
    """Load ahead as training does, and note when the model was loaded."""
    from autosft.workers.training import train as training

    watch_loading(training)
    training.load_ahead(job)


def train(
    job: TrialJob,
    report: Callable[[Measurement], None],
    stop_requested: Callable[[], StopReason | None],
) -> AttemptEnd:
    """Train, and note when the first step begins."""
    from autosft.workers.training import train as training
    from autosft.workers.training import trainer

    times: dict[str, Any] = {"train": time.time()}
    if not _loads:
        watch_loading(training)

    class Trainer(trainer.Trainer):
        def training_step(self, *arguments: Any, **options: Any) -> Any:
            times.setdefault("first_step", time.time())
            return super().training_step(*arguments, **options)

    trainer.Trainer = Trainer  # type: ignore[misc]
    end = training.train(job, report, stop_requested)
    (Path(job.output_dir) / TIMES).write_text(json.dumps({**times, "loads": _loads}))
    return end


def watch_loading(training: Any) -> None:
    load_model = training.load_model

    def timed(job: TrialJob) -> Any:
        began = time.time()
        try:
            return load_model(job)
        finally:
            _loads.append((began, time.time()))

    training.load_model = timed


if __name__ == "__main__":
    raise SystemExit(main())
