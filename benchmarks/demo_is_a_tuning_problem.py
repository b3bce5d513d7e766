"""Show that the embedded demo is a real tuning problem.

    python benchmarks/demo_is_a_tuning_problem.py [--seeds 3] [--workers 2]

Trains the demo's model on the demo's data as `autosft tune` does, one thread a trial: the rule-based
default, a grid over learning rates that leaves everything else at the default, and other batches at a
good rate; each over several seeds (order of the examples).  Prints, as a Markdown table, the loss on the
evaluation examples, its noise over seeds, the gain over the default with its paired standard error
(`studies.summary.compare`), and how many of the instructions that nothing was chosen by are answered
exactly right.  About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from unpredicted import unpredicted_memory

from autosft.profiles.dataset.demo import is_correct, write_demo_data
from autosft.profiles.recipe import Checkpointing, Method, Precision, Sharding
from autosft.studies.results.losses import ExampleLosses
from autosft.studies.results.summary import compare
from autosft.studies.search.dimensions import Value
from autosft.studies.search.space import FixedSettings, default_parameters, default_space, settings_from
from autosft.studies.trial import ExecutionPlan, PinnedSettings, TrialJob

EFFECTIVE_BATCH_SIZES = (8, 16, 32, 64)
LEARNING_RATES = (2e-4, 6e-4, 3e-3, 5e-3, 8e-3, 1.6e-2)
GOOD_RATE = 5e-3
NUM_EVALUATIONS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    losses: ExampleLosses
    accuracy: float
    cpu_s: float

    @property
    def loss(self) -> float:
        return math.fsum(self.losses.loss_sums) / sum(self.losses.num_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="trials at once")
    parser.add_argument("--rates", type=float, nargs="*", default=LEARNING_RATES)
    parser.add_argument("--batches", type=int, nargs="*", default=(16, 64))
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        base, space_defaults, examples = first_job(Path(folder))
        print(f"default: {in_words(space_defaults)}; {base.settings.num_train_examples} examples a trial")
        arms: dict[str, dict[str, Value]] = {"default": {}}
        arms |= {f"learning rate {rate:g}": {"learning_rate": rate} for rate in arguments.rates}
        arms |= {
            f"learning rate {GOOD_RATE:g}, batch {batch}": {
                "learning_rate": GOOD_RATE,
                "effective_batch_size": batch,
            }
            for batch in arguments.batches
        }
        jobs = [
            job_of(base, {**space_defaults, **changes}, seed=seed, number=number * arguments.seeds + seed)
            for number, changes in enumerate(arms.values())
            for seed in range(arguments.seeds)
        ]
        started = time.monotonic()
        # Fresh interpreters: torch's threads do not survive a fork.
        with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
            outcomes = list(pool.map(run, jobs, [examples] * len(jobs)))
            untuned = pool.submit(accuracy, base.model, examples).result()
        by_arm = {
            name: outcomes[i * arguments.seeds : (i + 1) * arguments.seeds] for i, name in enumerate(arms)
        }
        report(by_arm, untuned)
        print(f"\n{len(jobs)} trials, {time.monotonic() - started:.0f} s in all")


def first_job(folder: Path) -> tuple[TrialJob, dict[str, Value], Sequence[Mapping[str, Any]]]:
    """Make model and data and return the default trial, its parameters, and the final examples."""
    import json

    from datasets import load_from_disk

    from autosft.profiles.dataset.prepare import prepare
    from autosft.profiles.dataset.prepared import eval_fingerprint
    from autosft.profiles.model.profile import load_model_profile
    from autosft.workers.tools.demo_model import ensure_demo_model

    started = time.monotonic()
    model = ensure_demo_model(folder / "cache", num_threads=1)
    print(f"made the model in {time.monotonic() - started:.0f} s")
    paths = write_demo_data(folder / "demo")
    data = prepare(str(paths.train), eval_data=str(paths.eval), model=str(model), cache_dir=folder / "cache")
    seq_len = max(data.train.longest, data.eval.longest)
    num_train_examples = data.train.num_examples
    space = default_space(
        method=Method.FULL,
        num_parameters=load_model_profile(str(model)).num_parameters,
        num_train_examples=num_train_examples,
        seq_lens=[seq_len],
        effective_batch_sizes=EFFECTIVE_BATCH_SIZES,
    )
    defaults = default_parameters(space)
    settings = settings_from(space, defaults, FixedSettings(num_train_examples=num_train_examples))
    job = TrialJob(
        study="demo",
        trial=0,
        attempt=1,
        model=str(model),
        data_dir=str(data.path),
        output_dir=str(folder / "trials"),
        settings=settings,
        pinned=PinnedSettings(
            precision=Precision.FP32,
            tf32=False,
            attention="sdpa",
            eval_seq_len=seq_len,
            eval_micro_batch=16,
            eval_fingerprint=eval_fingerprint(load_from_disk(str(data.path / "eval")), seq_len),
            num_evaluations=NUM_EVALUATIONS,
        ),
        plan=plan(settings.effective_batch_size),
        device_uuids=("CPU-0",),
        resume_from=None,
        save_resume_state=False,
        trust_remote_code=False,
    )
    return job, defaults, [json.loads(line) for line in paths.final.open()]


def plan(effective_batch_size: int) -> ExecutionPlan:
    """Return the plan of a trial whose whole batch fits at once."""
    return ExecutionPlan(
        device_name="CPU",
        micro_batch=effective_batch_size,
        gradient_accumulation=1,
        data_parallel=1,
        checkpointing=Checkpointing.OFF,
        sharding=Sharding.NONE,
        num_threads=1,
        memory_cap_bytes=1 << 32,
        estimate=unpredicted_memory(upper_bytes=1 << 30),
        predicted_tokens_per_s=0.0,
        predicted_duration_s=0.0,
        reason="",
    )


def job_of(base: TrialJob, parameters: Mapping[str, Value], *, seed: int, number: int) -> TrialJob:
    changed: dict[str, Any] = {name: parameters[name] for name in ("learning_rate", "effective_batch_size")}
    settings = replace(base.settings, seed=seed, **changed)
    return replace(
        base,
        trial=number,
        output_dir=f"{base.output_dir}/{number}",
        settings=settings,
        plan=plan(settings.effective_batch_size),
    )


def run(job: TrialJob, examples: Sequence[Mapping[str, Any]]) -> Outcome:
    """Train one trial in this process and score its last checkpoint."""
    from autosft.studies.files.checkpoints import checkpoint_dir, evaluation_path
    from autosft.studies.results.losses import read_losses
    from autosft.workers.training.train import train

    started = time.process_time()
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # the trainer prints its losses
        end = train(job, report=lambda _: None, stop_requested=lambda: None)
    assert end.completed, end.message
    cpu_s = time.process_time() - started
    num_steps = job.settings.num_train_examples // job.settings.effective_batch_size
    return Outcome(
        losses=read_losses(evaluation_path(Path(job.output_dir), NUM_EVALUATIONS)),
        accuracy=accuracy(str(checkpoint_dir(Path(job.output_dir), num_steps)), examples),
        cpu_s=cpu_s,
    )


def accuracy(model: str, examples: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of the examples whose last turn the model gives word for word."""
    from autosft.workers.scoring.inference_server import answer

    answers = answer(model, [example["messages"][:-1] for example in examples], max_new_tokens=16)
    return statistics.fmean(is_correct(one, text) for one, text in zip(examples, answers, strict=True))


def report(by_arm: Mapping[str, Sequence[Outcome]], untuned: float) -> None:
    print(f"untuned model: {untuned:.0%} answered right\n")
    columns = ("configuration", "eval loss", "sd over seeds", "gain over default", "in standard errors")
    print("| " + " | ".join((*columns, "right", "CPU s")) + " |")
    print("|---|---|---|---|---|---|---|")
    default = by_arm["default"]
    for name, outcomes in by_arm.items():
        gains = [compare(one.losses, other.losses) for one, other in zip(outcomes, default, strict=True)]
        gain = statistics.fmean(gain.nats_per_token for gain in gains)
        error = max(gain.standard_error for gain in gains)
        losses = [outcome.loss for outcome in outcomes]
        noise = statistics.stdev(losses) if len(losses) > 1 else math.nan
        against = " | " if name == "default" else f"{gain:+.3f} ± {error:.3f} | {gain / error:+.1f}"
        print(
            f"| {name} | {statistics.fmean(losses):.3f} | {noise:.3f} | {against} "
            f"| {statistics.fmean(outcome.accuracy for outcome in outcomes):.0%} "
            f"| {statistics.fmean(outcome.cpu_s for outcome in outcomes):.1f} |"
        )


def in_words(parameters: Mapping[str, Value]) -> str:
    return ", ".join(f"{name} {value}" for name, value in parameters.items())


if __name__ == "__main__":
    main()
